"""Absorbed forms of the KV up-projection in numpy: `split` and `fold`, what each costs, and where `fold` is exact.

    H heads   P qk_nope_head_dim   R qk_rope_head_dim   V v_head_dim   C kv_lora_rank   L q_lora_rank   D hidden size
    S cached tokens   Q what the query up-projection reads: L, or D without query compression

    split   W_UK[h] (C, P)   W_UV[h] (V, C)                     the rows of kv_b_proj, rearranged
    fold    W_QK[h] (Q, C) = W_UQ[h]ᵀ W_UK[h]ᵀ                   q̃[h] = c_q W_QK[h]
            W_VO[h] (D, C) = W_O[:, hV:(h+1)V] W_UV[h]           output = Σ_h W_VO[h] õ[h]

W_UQ[h] (P, Q) are the first P of the P+R rows of head h in q_b_proj (q_proj).  The last R rows, W_QR, can't be folded,
because their product is rotated by the token's position before it is multiplied with the key; so q_b_proj stays needed
for them.  Absorption is described in DeepSeek-V2 (arXiv:2405.04434, section 2.1.2 and appendix C).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from mla_tune.arch.dims import MLADims
from mla_tune.arch.families import FAMILIES
from mla_tune.arch.family import Family

#: Value of `--absorb` → the tensors of one attention module and their layouts, as text for reports.
LAYOUTS = {"split": "W_UK (H, C, P), W_UV (H, V, C)", "fold": "W_QK (H, Q, C), W_VO (H, D, C)"}


def absorbed_shapes(d: MLADims, mode: str) -> dict[str, tuple[int, int, int]]:
    """Return name and shape of the absorbed tensors of one attention module; `mode` is `split` or `fold`."""
    if mode == "split":
        return {"W_UK": (d.H, d.C, d.P), "W_UV": (d.H, d.V, d.C)}
    return {"W_QK": (d.H, d.L or d.D, d.C), "W_VO": (d.H, d.D, d.C)}


def split_heads(rows: np.ndarray, d: MLADims) -> tuple[np.ndarray, np.ndarray]:
    """Split the rows of n whole heads of kv_b_proj, (n(P+V), C), into W_UK (n, C, P) and W_UV (n, V, C), contiguous.

    `rows` may be numbers or the stored bits of numbers.
    """
    heads = rows.reshape(-1, d.P + d.V, rows.shape[1])
    return np.ascontiguousarray(heads[:, : d.P].swapaxes(1, 2)), np.ascontiguousarray(heads[:, d.P :])


def fold_query(W_UQ: np.ndarray, W_UK: np.ndarray) -> np.ndarray:
    """Fold one head: W_UQ (P, Q), the rows without rope, and W_UK (C, P) → W_QK (Q, C)."""
    return W_UQ.T @ W_UK.T


def fold_output(W_O: np.ndarray, W_UV: np.ndarray) -> np.ndarray:
    """Fold one head: n rows of its columns of o_proj, (n, V), and W_UV (V, C) → the same n rows of W_VO, (n, C)."""
    return W_O @ W_UV


@dataclass(frozen=True, slots=True)
class AttentionCost:
    """What one form of attention costs in parameters, operations and cache.

    Only the matrices that absorption changes are counted; W_DQ, W_DKV and the rope rows are the same in all forms.
    """

    name: str
    """`expanded`, `re-expanded`, `split` or `fold` (see `attention_costs`)."""
    query_params: int
    """Parameters of W_UQ without its rope rows and W_UK; for `fold`, of W_QK."""
    output_params: int
    """Parameters of W_UV and W_O; for `fold`, of W_VO."""
    flops: int
    """Multiplications and additions for one decoded token: those matrices, the scores and the weighted sum."""
    cache: int
    """Numbers kept for each cached token."""

    @property
    def params(self) -> int:
        """Parameters of query and output side together."""
        return self.query_params + self.output_params


def attention_costs(d: MLADims, context: int, modules: int = 1) -> tuple[AttentionCost, ...]:
    """Return the cost of every form of attention with `context` cached tokens, for `modules` equal attention modules.

    `expanded` caches keys and values of every head.  `re-expanded` caches the latent and expands all of it for each new
    token (transformers' own `expand_kv`).  `split` and `fold` cache the latent and never expand it.
    """
    Q, S = d.L or d.D, context
    query, output = d.H * d.P * (Q + d.C), d.H * d.V * (d.D + d.C)
    kv_up = d.H * (d.P + d.V) * d.C
    folded_query, folded_output = d.H * Q * d.C, d.H * d.D * d.C
    expanded = S * d.H * (d.P + d.R + d.V)
    latent = S * d.H * (2 * d.C + d.R)
    rows = (
        ("expanded", query, output, query + output + expanded, d.H * (d.P + d.R + d.V)),
        ("re-expanded", query, output, query + output - kv_up + S * kv_up + expanded, d.C + d.R),
        ("split", query, output, query + output + latent, d.C + d.R),
        ("fold", folded_query, folded_output, folded_query + folded_output + latent, d.C + d.R),
    )
    return tuple(
        AttentionCost(name, modules * q, modules * o, 2 * modules * n, modules * c) for name, q, o, n, c in rows
    )


def model_costs(modules: Sequence[MLADims], context: int) -> tuple[AttentionCost, ...]:
    """Return `attention_costs` summed over the attention modules of a model, which may have different dimensions."""
    total: list[AttentionCost] = []
    for dims, count in Counter(modules).items():
        found = attention_costs(dims, context, count)
        total = [_sum(a, b) for a, b in zip(total, found, strict=True)] if total else list(found)
    return tuple(total)


def _sum(a: AttentionCost, b: AttentionCost) -> AttentionCost:
    numbers = ("query_params", "output_params", "flops", "cache")
    return AttentionCost(a.name, *(getattr(a, n) + getattr(b, n) for n in numbers))


def foldable_families() -> tuple[str, ...]:
    """Return the model types of the families for which folding is known to be exact (`Family.fold`)."""
    return tuple(family.model_type for family in FAMILIES if family.fold)


def latent_scales(family: Family, d: MLADims) -> dict[str, float]:
    """Return the constants, stored in no tensor, by which a family multiplies the query (both parts) and the latent."""
    if not family.scaled_latents:
        return {}
    assert d.L is not None, f"{family.model_type} always compresses the query"
    return {"query": sqrt(d.D / d.L), "latent": sqrt(d.D / d.C)}


#: Parts of an attention module before the folded matrices: a bias or norm there does not affect folding.
_BEFORE = ("q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm", "rotary_emb")
#: Tensors of the folded matrices themselves; o_proj's bias is added after the sum over heads.
_SCALES = ("weight_scale_inv", "weight_scale", "input_scale")
_FOLDED = {f"{m}.{leaf}" for m in ("q_proj", "q_b_proj", "kv_b_proj", "o_proj") for leaf in ("weight", *_SCALES)}
_FOLDED.add("o_proj.bias")
#: Tensor, or part of an attention module → why folding is not exact with it.
_REASONS = {
    "q_b_proj.bias": "a bias on the query adds W_UK b to the absorbed query, which W_QK can't express",
    "q_proj.bias": "a bias on the query adds W_UK b to the absorbed query, which W_QK can't express",
    "kv_b_proj.bias": "keys and values with a bias are not a linear map of the latent",
    "q_norm": "a norm stands between W_UQ and W_UK",
    "q_b_layernorm": "a norm stands between W_UQ and W_UK",
    "k_norm": "a norm stands between W_UK and the scores",
    "v_norm": "a norm stands between W_UV and W_O",
    "g_proj": "an output gate stands between W_UV and W_O",
    "gate_proj": "an output gate stands between W_UV and W_O",
    "q_gate_proj": "an output gate stands between W_UV and W_O",
}


def unsupported_reason(name: str) -> str | None:
    """Say why `fold` is not exact if an attention module has a tensor of this name; None where it is.

    `name` is the name within the module: `q_b_proj.bias`, `g_proj.weight`.
    """
    part = name.split(".", 1)[0]
    if part in _BEFORE or name in _FOLDED:
        return None
    known = _REASONS.get(name) or _REASONS.get(part)
    return known or "its effect on queries, keys and values is not known"
