"""Attention over samples laid end to end, one fused call for each sample: no mask, no padding, no wasted scores.

A batch is one row (1, N) of samples laid end to end.  Their borders, `cu_seq_lens_q` in the convention of flash
attention, are passed through the model to its attention function.  transformers' sdpa would get rows of `max_length`
with a mask each, and would compute scores that the mask discards: with samples of a third of a row, two thirds of them.

On a CPU, values are padded to the size P+R of keys, because torch's fused kernel there needs one size for both, and
without the kernel all scores would be in memory.  One autograd node computes the whole batch.  Its output is the tensor
that W_O reads, so it is saved once, and a recomputed forward pass (`mla_checkpointing`) reuses it.

    H  heads      N  tokens of a batch      n  tokens of a sample      P+R, V  sizes of keys and values
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

#: The name of this attention in transformers.
NAME = "mla_tune_packed"
#: Under `mla_checkpointing`: [output, log-sum-exps] of the attention that runs, filled by the first forward pass and
#: used by the recomputed one; an empty list before, None without checkpointing.
ATTENTION_CACHE: ContextVar[list[Any] | None] = ContextVar("attention_cache", default=None)
#: Arguments of some families' attention that are not implemented here.
UNSUPPORTED = ("s_aux", "indices", "sliding_window", "softcap", "position_bias")


def register() -> str:
    """Register this attention with transformers, as one that takes no mask, and return its name."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    return NAME


@torch.compiler.disable  # the loop over samples has another length in each batch
def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query, key (1, H, N, P+R), value (1, H, N, V), cu_seq_lens_q (samples + 1) → output (1, N, H, V).

    Raises `NotImplementedError` without borders, for several rows, and for a mask, sinks, a window or an indexer's
    choice.
    """
    unsupported = [k for k in UNSUPPORTED if kwargs.get(k) is not None]
    if cu_seq_lens_q is None or attention_mask is not None or unsupported or query.shape[0] != 1:
        raise NotImplementedError(
            f"packed attention: no borders, a mask, or {', '.join(unsupported) or 'several rows'}: "
            "take model.attention: sdpa or eager"
        )
    cpu, V = query.device.type == "cpu", value.shape[-1]
    if torch.is_autocast_enabled(query.device.type):
        low = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(low), key.to(low), value.to(low)
    if cpu and key.shape[-1] > V:
        value = F.pad(value, (0, key.shape[-1] - V))
    lengths = cu_seq_lens_q.diff().tolist()
    if cpu and not dropout and key.shape[-1] == value.shape[-1]:
        scale = key.shape[-1] ** -0.5 if scaling is None else scaling
        out = _Packed.apply(query, key, value, lengths, scale)
    else:
        parts = [
            F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling).transpose(1, 2)
            for q, k, v in zip(*(t.split(lengths, dim=2) for t in (query, key, value)), strict=True)
        ]
        out = torch.cat(parts, dim=1)
    return (out[..., :V] if out.shape[-1] > V else out), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Return no mask: the samples' borders replace it."""


class _Packed(torch.autograd.Function):
    """torch's fused attention for CPUs, a sample at a time: query, key, value (1, H, N, d) → output (1, N, H, d)."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, lengths: list[int], scale: float) -> torch.Tensor:
        cache = ATTENTION_CACHE.get()
        if cache:
            out, lse = cache
        else:
            out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
            lse = []
            for q, k, v, o in zip(
                *(t.split(lengths, 2) for t in (query, key, value)), out.split(lengths, 1), strict=True
            ):
                part, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
                o.copy_(part.transpose(1, 2))
                lse.append(sums)
            if cache is not None:
                cache[:] = [out.detach(), lse]
        ctx.save_for_backward(query, key, value, out, *lse)
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        query, key, value, out, *lse = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in (query, key, value)]
        split = [t.split(ctx.lengths, 2) for t in (query, key, value)]
        into = [t.split(ctx.lengths, 2) for t in grads]
        by_head = [t.transpose(1, 2).split(ctx.lengths, 2) for t in (grad.to(out.dtype), out)]
        for q, k, v, dq, dk, dv, g, o, sums in zip(*split, *into, *by_head, lse, strict=True):
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                g, q, k, v, o, sums, 0.0, True, scale=ctx.scale
            )
            for target, part in zip((dq, dk, dv), found, strict=True):
                target.copy_(part)
        return *grads, None, None
