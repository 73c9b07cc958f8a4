"""Absorbed forms of the KV up-projection in numpy: `split` and `fold`, what each costs, and where `fold` is exact.

    H heads   P qk_nope_head_dim   R qk_rope_head_dim   V v_head_dim   C kv_lora_rank   L q_lora_rank   D hidden size
    S cached tokens   Q what the query up-projection reads: L, or D without query compression

    split   W_UK[h] (C, P)   W_UV[h] (V, C)                     the rows of kv_b_proj, rearranged
    fold    W_QK[h] (Q, C) = W_UQ[h]ᵀ W_UK[h]ᵀ                   q̃[h] = c_q W_QK[h]
            W_VO[h] (D, C) = W_O[:, hV:(h+1)V] W_UV[h]           output = Σ_h W_VO[h] õ[h]

W_UQ[h] (P, Q) are the first P of the P+R rows of head h in q_b_proj (q_proj).  Its last R rows, W_QR, can't be folded:
their product is turned by an angle that depends on the token's position before it meets the key.  So q_b_proj is still
needed for them.  Absorption is DeepSeek-V2's (arXiv:2405.04434, section 2.1.2 and appendix C).
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

#: `--absorb` → the tensors of one attention module, and their layout in words.
LAYOUTS = {"split": "W_UK (H, C, P), W_UV (H, V, C)", "fold": "W_QK (H, Q, C), W_VO (H, D, C)"}


def absorbed_shapes(d: MLADims, mode: str) -> dict[str, tuple[int, int, int]]:
    """The tensors of one attention module in this mode."""
    if mode == "split":
        return {"W_UK": (d.H, d.C, d.P), "W_UV": (d.H, d.V, d.C)}
    return {"W_QK": (d.H, d.L or d.D, d.C), "W_VO": (d.H, d.D, d.C)}


def split_heads(rows: np.ndarray, d: MLADims) -> tuple[np.ndarray, np.ndarray]:
    """Rows of kv_b_proj of n whole heads (n(P+V), C), numbers or stored codes → W_UK (n, C, P) and W_UV (n, V, C),
    both contiguous."""
    heads = rows.reshape(-1, d.P + d.V, rows.shape[1])
    return np.ascontiguousarray(heads[:, : d.P].swapaxes(1, 2)), np.ascontiguousarray(heads[:, d.P :])


def fold_query(W_UQ: np.ndarray, W_UK: np.ndarray) -> np.ndarray:
    """One head: W_UQ (P, Q), the rows without rope, and W_UK (C, P) → W_QK (Q, C)."""
    return W_UQ.T @ W_UK.T


def fold_output(W_O: np.ndarray, W_UV: np.ndarray) -> np.ndarray:
    """One head: n rows of its columns of o_proj, (n, V), and W_UV (V, C) → those rows of W_VO (n, C)."""
    return W_O @ W_UV


@dataclass(frozen=True, slots=True)
class Form:
    """What one way to compute attention costs.

    `query_params` and `output_params` count the matrices that absorption touches: W_UQ without its rope rows and W_UK,
    or W_QK; W_UV and W_O, or W_VO.  `flops` are the multiplications and additions for one decoded token with S cached
    ones: those matrices, the scores and the weighted sum.  W_DQ, W_DKV and the rope rows are alike in all forms and not
    counted.  `cache` are the numbers kept for each cached token.
    """

    name: str
    query_params: int
    output_params: int
    flops: int
    cache: int

    @property
    def params(self) -> int:
        """Parameters of both sides together."""
        return self.query_params + self.output_params


def forms(d: MLADims, context: int, modules: int = 1) -> tuple[Form, ...]:
    """Every form at S = `context`, for so many attention modules.

    `expanded` keeps keys and values of every head, `re-expanded` keeps the latent and expands all of it for each token
    (transformers' own `expand_kv`), `split` and `fold` keep the latent and never expand it.
    """
    Q, S = d.L or d.D, context
    query, output = d.H * d.P * (Q + d.C), d.H * d.V * (d.D + d.C)
    up = d.H * (d.P + d.V) * d.C
    folded_query, folded_output = d.H * Q * d.C, d.H * d.D * d.C
    plain = S * d.H * (d.P + d.R + d.V)
    latent = S * d.H * (2 * d.C + d.R)
    rows = (
        ("expanded", query, output, query + output + plain, d.H * (d.P + d.R + d.V)),
        ("re-expanded", query, output, query + output - up + S * up + plain, d.C + d.R),
        ("split", query, output, query + output + latent, d.C + d.R),
        ("fold", folded_query, folded_output, folded_query + folded_output + latent, d.C + d.R),
    )
    return tuple(Form(name, modules * q, modules * o, 2 * modules * n, modules * c) for name, q, o, n, c in rows)


def costs(modules: Sequence[MLADims], context: int) -> tuple[Form, ...]:
    """`forms` of all modules of a model together, which may have different dimensions."""
    total: list[Form] = []
    for dims, count in Counter(modules).items():
        found = forms(dims, context, count)
        total = [_sum(a, b) for a, b in zip(total, found, strict=True)] if total else list(found)
    return tuple(total)


def _sum(a: Form, b: Form) -> Form:
    numbers = ("query_params", "output_params", "flops", "cache")
    return Form(a.name, *(getattr(a, n) + getattr(b, n) for n in numbers))


def foldable_families() -> tuple[str, ...]:
    """Model types of the families for which folding is known to be exact (`Family.fold`)."""
    return tuple(family.model_type for family in FAMILIES if family.fold)


def latent_scales(family: Family, d: MLADims) -> dict[str, float]:
    """Numbers that a family multiplies the query (both parts) and the latent with, and that are in no tensor."""
    if not family.scaled_latents:
        return {}
    assert d.L is not None, f"{family.model_type} always compresses the query"
    return {"query": sqrt(d.D / d.L), "latent": sqrt(d.D / d.C)}


#: Parts of an attention module that lie before the factors: a bias or a norm there changes nothing.
_BEFORE = ("q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm", "rotary_emb")
#: What the factors themselves consist of; o_proj's bias is added after the sum over heads.
_SCALES = ("weight_scale_inv", "weight_scale", "input_scale")
_FACTORS = {f"{m}.{leaf}" for m in ("q_proj", "q_b_proj", "kv_b_proj", "o_proj") for leaf in ("weight", *_SCALES)}
_FACTORS.add("o_proj.bias")
_OBSTACLES = {
    "q_b_proj.bias": "a bias on the query adds W_UK b to it, which W_QK has no place for",
    "q_proj.bias": "a bias on the query adds W_UK b to it, which W_QK has no place for",
    "kv_b_proj.bias": "keys and values with a bias are not products with the latent alone",
    "q_norm": "a norm stands between W_UQ and W_UK",
    "q_b_layernorm": "a norm stands between W_UQ and W_UK",
    "k_norm": "a norm stands between W_UK and the scores",
    "v_norm": "a norm stands between W_UV and W_O",
    "g_proj": "an output gate stands between W_UV and W_O",
    "gate_proj": "an output gate stands between W_UV and W_O",
    "q_gate_proj": "an output gate stands between W_UV and W_O",
}


def unsupported_reason(name: str) -> str | None:
    """Why a tensor of this name inside an attention module (`q_b_proj.bias`, `g_proj.weight`) makes `fold` inexact;
    None where it doesn't."""
    part = name.split(".", 1)[0]
    if part in _BEFORE or name in _FACTORS:
        return None
    known = _OBSTACLES.get(name) or _OBSTACLES.get(part)
    return known or "what it does to queries, keys and values is not known"
