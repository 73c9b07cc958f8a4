"""Absorbed attention in transformers' decoder layers, for the comparison of logits: prefill only, no cache.

    B batch   T tokens   H heads   P qk_nope_head_dim   R qk_rope_head_dim   V v_head_dim   C kv_lora_rank
    D hidden size   Q what the query up-projection reads: L, or D without query compression

    split   q̃ = q_nope W_UK[h]ᵀ  (C)      o[h] = W_UV[h] õ[h] (V)           W_UK (H, C, P)   W_UV (H, V, C)
    fold    q̃ = c_q W_QK[h]      (C)      output = Σ_h W_VO[h] õ[h] (D)     W_QK (H, Q, C)   W_VO (H, D, C)
    both    score = (q̃ · c + q_rope · k_rope) · scale      õ[h] = Σ softmax(score) c (C)

c is the latent and c_q what the query up-projection reads (DeepSeek-V2, arXiv:2405.04434, section 2.1).  LongCat-Flash
multiplies queries and latent by constants: c and q_nope contain them, but fold's q̃ must be multiplied by the query's.

A batch of two equal rows goes through each layer.  Row 0 attends as transformers does and row 1 absorbed; everything
else, experts included, is computed for both rows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from mla_tune.absorption.fold import absorbed_shapes
from mla_tune.arch.dims import MLADims
from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.index import TensorRef
from mla_tune.errors import CheckError
from mla_tune.verification.logits.streamed_weights import WeightReader

#: The name under which transformers finds this attention.
ATTENTION = "mla_tune_logits"
_STATE = "mla_tune_logits_state"


class AbsorbedAttention:
    """One attention module whose row 1 attends absorbed; its absorbed tensors are read for each call."""

    def __init__(
        self, module: nn.Module, dims: MLADims, refs: Mapping[str, TensorRef], weights: WeightReader, dtype: torch.dtype
    ) -> None:
        self.module, self.dims, self.refs, self.weights, self.dtype = module, dims, refs, weights, dtype
        self.fold = "W_QK" in refs
        self.expand: Callable[..., tuple[torch.Tensor, torch.Tensor]] = getattr(module, "expand_kv")  # noqa: B009
        self.latent = self.k_rope = self.c_q = self.output = torch.empty(0)
        setattr(module, "expand_kv", self._expand)  # noqa: B010
        setattr(module, _STATE, self)
        if self.fold:
            query = module.get_submodule("q_proj" if dims.L is None else "q_b_proj")
            query.register_forward_pre_hook(self._keep_query)
            module.get_submodule("o_proj").register_forward_hook(self._replace_output)

    def _expand(self, latent: torch.Tensor, k_rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Expand row 0 of latent (B, 1, T, C) and rope key (B, 1, T, R), and keep row 1 for `attend`."""
        self.latent, self.k_rope = latent[1:], k_rope[1:]
        return self.expand(latent[:1], k_rope[:1])

    def _keep_query(self, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.c_q = args[0][1:]

    def _replace_output(self, module: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        bias = getattr(module, "bias", None)
        return torch.cat((output[:1], self.output if bias is None else self.output + bias))

    def _read(self, name: str) -> torch.Tensor:
        tensor = torch.empty(self.refs[name].shape, dtype=self.dtype)
        self.weights.read(self.refs[name], tensor)
        return tensor

    def attend(self, query: torch.Tensor, mask: torch.Tensor, scale: float, sinks: torch.Tensor | None) -> torch.Tensor:
        """Attend absorbed: query (1, H, T, P+R), mask (1, 1, T, T), sinks (H) → values (1, T, H, V).

        `fold` computes the output of o_proj directly: it returns zeros, and `_replace_output` puts the output in.
        """
        q_nope, q_rope = query.split([self.dims.P, self.dims.R], dim=-1)
        if self.fold:
            q = torch.einsum("btq,hqc->bhtc", self.c_q, self._read("W_QK")) * getattr(
                self.module, "mla_scale_q_lora", 1.0
            )
        else:
            q = torch.einsum("bhtp,hcp->bhtc", q_nope, self._read("W_UK"))
        scores = (q @ self.latent.mT + q_rope @ self.k_rope.mT) * scale + mask
        weighted_latent = _softmax(scores, sinks).to(query.dtype) @ self.latent  # õ (1, H, T, C)
        if self.fold:
            self.output = torch.einsum("bhtc,hdc->btd", weighted_latent, self._read("W_VO"))
            return query.new_zeros(*self.output.shape[:2], self.dims.H, self.dims.V)
        return torch.einsum("bhtc,hvc->bthv", weighted_latent, self._read("W_UV"))


def absorb_attention(
    model: nn.Module, arch: Architecture, tensors: Mapping[str, TensorRef], weights: WeightReader, dtype: torch.dtype
) -> None:
    """Make row 1 of a batch of two attend absorbed, in a model that was built with the attention `ATTENTION`.

    `tensors` are the absorbed tensors by `<attention path>.<name>`.  Raises `CheckError` where one is missing or has
    another shape.
    """
    fold = any(key.endswith("W_QK") for key in tensors)
    for path in arch.attention_paths:
        refs, d = {}, arch.dims_at(path)
        shapes = absorbed_shapes(d, "fold" if fold else "split")
        for name, shape in shapes.items():
            ref = tensors.get(f"{path}.{name}")
            if ref is None or ref.shape != shape:
                what = "is missing" if ref is None else f"has the shape {ref.shape}"
                raise CheckError(f"absorbed tensors: '{path}.{name}' {what}; the model needs {shape}")
            refs[name] = ref
        AbsorbedAttention(model.get_submodule(path), d, refs, weights, dtype)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    *,
    scaling: float,
    s_aux: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls: row 0 by SDPA, row 1 by `AbsorbedAttention.attend`."""
    if indices is not None:
        # The keys that an indexer chose (2, T, keys): transformers turns them into a mask only for eager and sdpa.
        others = torch.ones(mask.shape[0], *mask.shape[2:], dtype=torch.bool).scatter(-1, indices.long(), False)
        mask = mask.masked_fill(others[:, None], float("-inf"))
    if s_aux is None:
        first, _ = sdpa_attention_forward(module, query[:1], key, value, mask[:1], scaling=scaling, **kwargs)
    else:  # attention sinks, which SDPA does not support
        scores = query[:1] @ key.mT * scaling + mask[:1]
        first = (_softmax(scores, s_aux).to(value.dtype) @ value).transpose(1, 2)
    second = getattr(module, _STATE).attend(query[1:], mask[1:], scaling, s_aux)
    return torch.cat((first, second)), None


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax of scores (1, H, T, S) over keys, in float32; a sink (H) is one more score, without a value."""
    if sinks is None:
        return scores.softmax(dim=-1, dtype=torch.float32)
    column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat((scores, column), dim=-1).softmax(dim=-1, dtype=torch.float32)[..., :-1]


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)
