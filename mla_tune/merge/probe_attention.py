"""Absorbed attention beside stock attention in one forward pass: row 0 of the batch is stock, row 1 absorbed.

    H heads   P qk_nope_head_dim   R qk_rope_head_dim   V v_head_dim   C kv_lora_rank   D hidden   T tokens   Q = L or D

    split   q̃[h] = W_UK[h] q_nope[h]          õ[h] = Σ softmax(scores) c      o[h] = W_UV[h] õ[h], then o_proj
    fold    q̃[h] = c_q W_QK[h]                                                output = Σ_h W_VO[h] õ[h] + bias
    scores[h] = (q̃[h] · c + q_rope[h] · k_rope) · scale

(DeepSeek-V2, arXiv:2405.04434, appendix C.)  Both rows hold the same tokens, so each weight is read once for both.
LongCat-Flash multiplies query and latent by numbers that are in no tensor: those of the latent and of q_rope are in
what `expand_kv` and the attention function are given, that of a folded query is put in here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.index import Checkpoint, TensorRef
from mla_tune.errors import CheckError
from mla_tune.merge.probe_weights import Stored, StoredWeight, linear
from mla_tune.merge.proof_values import Reader, Values

ABSORBED = "mla_tune_stock_and_absorbed"


def absorb_second_row(
    model: Any, arch: Architecture, merged: Checkpoint, tensors: Mapping[str, TensorRef], mode: str
) -> None:
    """Make `model`, opened with the attention function `ABSORBED`, attend with `tensors` in row 1 of its batch.

    `tensors` are `<attention path>.W_UK` and `.W_UV` for the mode `split`, `.W_QK` and `.W_VO` for `fold`.
    Raises `CheckError` for tensors that are missing or of another shape.
    """
    d, values, reader = arch.dims, Values(merged, {}), Reader()
    shapes = (
        {"W_UK": (d.H, d.C, d.P), "W_UV": (d.H, d.V, d.C)}
        if mode == "split"
        else {"W_QK": (d.H, d.L or d.D, d.C), "W_VO": (d.H, d.D, d.C)}
    )
    for path in arch.attention_paths:
        weights = {}
        for name, shape in shapes.items():
            ref = tensors.get(f"{path}.{name}")
            if ref is None or ref.shape != shape:
                have = "missing" if ref is None else f"{ref.shape}, and {shape} was expected"
                raise CheckError(f"{merged.folder}: absorbed tensor '{path}.{name}' is {have}")
            weights[name] = StoredWeight(Stored(values, reader, ref))
        module = model.get_submodule(path)
        module.absorbed = _Split(**weights) if mode == "split" else _Fold(module, **weights)
        module.expand_kv = _keep_latent


def _keep_latent(latent: torch.Tensor, k_rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of `expand_kv`: the attention function gets (B, 1, T, C) and (B, 1, T, R) as they are cached."""
    return latent, k_rope


def _attention(
    module: Any,
    query: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query (2, H, T, P+R) → (2, T, H, V)."""
    keys, values = type(module).expand_kv(module, latent[:1], k_rope[:1])
    eager = sys.modules[type(module).__module__].eager_attention_forward
    stock, _ = eager(module, query[:1], keys, values, mask[:1], scaling=scaling, **kwargs)

    c, k = latent[1, 0], k_rope[1, 0]  # (T, C), (T, R)
    q_nope, q_rope = query[1].split([query.shape[-1] - k.shape[-1], k.shape[-1]], dim=-1)  # (H, T, P), (H, T, R)
    scores = (module.absorbed.query(q_nope) @ c.T + q_rope @ k.T) * scaling + mask[-1]
    weighted = scores.softmax(dim=-1) @ c  # (H, T, C)
    row = module.absorbed.output(weighted).transpose(0, 1)  # (T, H, V)
    return torch.cat((stock, row[None])), None


class _Split:
    """W_UK (H, C, P) and W_UV (H, V, C), head by head."""

    def __init__(self, W_UK: StoredWeight, W_UV: StoredWeight) -> None:
        self.W_UK, self.W_UV = W_UK, W_UV

    def query(self, q_nope: torch.Tensor) -> torch.Tensor:
        return torch.stack([linear(q, self.W_UK[h]) for h, q in enumerate(q_nope)])

    def output(self, weighted: torch.Tensor) -> torch.Tensor:
        return torch.stack([linear(o, self.W_UV[h]) for h, o in enumerate(weighted)])


class _Fold:
    """W_QK (H, Q, C) and W_VO (H, D, C).  What q_b_proj reads is taken from it on its way, and what o_proj gives for
    row 1 is replaced."""

    def __init__(self, module: Any, W_QK: StoredWeight, W_VO: StoredWeight) -> None:
        self.W_QK, self.W_VO, self.V = W_QK, W_VO, module.v_head_dim
        self.scale = getattr(module, "mla_scale_q_lora", 1.0)
        (module.q_proj if getattr(module, "q_lora_rank", None) is None else module.q_b_proj).register_forward_pre_hook(
            self._before_query
        )
        module.o_proj.register_forward_hook(self._after_output)

    def _before_query(self, _module: Any, args: tuple[torch.Tensor]) -> None:
        self.c_q = args[0][1]  # (T, Q)

    def query(self, q_nope: torch.Tensor) -> torch.Tensor:
        c_q = self.c_q * self.scale
        return torch.stack([c_q @ self.W_QK[h].source.whole() for h in range(len(q_nope))])

    def output(self, weighted: torch.Tensor) -> torch.Tensor:
        self.result = sum(linear(o, self.W_VO[h]) for h, o in enumerate(weighted))  # (T, D)
        return weighted.new_zeros(*weighted.shape[:2], self.V)

    def _after_output(self, module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        row = self.result if module.bias is None else self.result + module.bias
        return torch.stack((output[0], row))  # type: ignore[arg-type]


AttentionInterface.register(ABSORBED, _attention)
AttentionMaskInterface.register(ABSORBED, eager_mask)
