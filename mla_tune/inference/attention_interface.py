"""The attention function and the mask function that an absorbed model uses in transformers.

Each attention implementation that a model had before gets its own pair ("sdpa" → "mla_tune_sdpa").  A call that is not
absorbed goes on to the original implementation, with expanded keys and values and the mask that it expects.

In mode `auto`, a call is absorbed where that is estimated to take less time.  The estimate counts floating-point
operations, numbers moved between memory and processor, and a fixed cost of absorbed attention, for B rows, T queries
and S keys; W = C·H(P+V) is the size of W_UKV:

                operations / 2                             numbers moved
    expanded    B·S·W + B·T·S·H(P+R+V)                     W + B·S(C+R) + B·S·H(4P+2R+2V)
    absorbed    B·T·W + B·T·S·H(2C+R)                      W + B·S(2C+R) + 8·B·T·S·H          + fixed cost

Expanded: the keys and values of all heads are written, concatenated and read.  Absorbed: a score is written and read by
each of several products and a softmax.  So decoding (T = 1) is absorbed, and a long prompt (T = S) is expanded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mla_tune.inference.latent_attention import LatentAttention

#: What the names of our attention implementations in transformers begin with.
PREFIX = "mla_tune_"
#: Attribute of an attention module that holds its `LatentAttention`.
STATE = "_mla_tune_latent"
#: By type of device, for a typical machine: operations a second, bytes a second, and the fixed seconds of absorbed
#: attention.  Only their proportions matter, and only where both forms take about the same time
#: (`scripts/bench_choice.py` measures what a wrong choice costs).
_RATES = {"cpu": (2e11, 2e10, 0.0), "cuda": (4e14, 2.5e12, 1.6e-4)}


def register(original: str) -> str:
    """Register the pair of functions over the implementation `original` in transformers; return its name."""
    name = PREFIX + original
    AttentionInterface.register(name, _attention_function(original))
    mask = original if original in ALL_MASK_ATTENTION_FUNCTIONS else "eager"
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[mask])
    return name


def prefers_absorbed(latent: LatentAttention, B: int, T: int, S: int, device: str = "cpu", itemsize: int = 4) -> bool:
    """Whether a call with B rows, T queries and S keys is estimated to be faster absorbed than expanded.

    `device` is the type of the device (`cpu`, `cuda`), `itemsize` the number of bytes of a cached number.
    """
    m = latent.module
    H, C, R, P, V = m.num_heads, m.kv_lora_rank, m.qk_rope_head_dim, latent.P, latent.V
    W, pairs = C * H * (P + V), B * T * S * H
    operations = 2 * (B * T * W + pairs * (2 * C + R)) - 2 * (B * S * W + pairs * (P + R + V))
    numbers = B * S * C + 8 * pairs - B * S * H * (4 * P + 2 * R + 2 * V)
    operation_rate, byte_rate, fixed_seconds = _RATES.get(device, _RATES["cuda"])
    return operations / operation_rate + numbers * itemsize / byte_rate + fixed_seconds < 0


def _attention_function(original: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """Return an attention function that computes absorbed, or expands and calls the implementation `original`.

    On an absorbed module, its `key` is the latent (B, 1, S, C) and its `value` the rope key (B, 1, S, R).
    """

    def attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        state: LatentAttention | None = getattr(module, STATE, None)
        if state is None:  # an attention module without MLA that shares the configuration
            return _original(original, module)(module, query, key, value, attention_mask, **kwargs)
        B, T, S = query.shape[0], query.shape[2], key.shape[2]
        if T > 1:
            state.clear_derived()
        mask = _mask_by_indices(attention_mask, kwargs.get("indices"), query, S)
        if not _uses_absorbed(state, B, T, key, kwargs):
            if kwargs.get("indices") is not None:
                kwargs["indices"] = None
            keys, values = state.expand(key, value)
            if original == "sdpa" and T > 1:
                values, V = _pad_to_key_size(keys, values), values.shape[-1]
                out, weights = _original(original, module)(module, query, keys, values, mask, **kwargs)
                return out[..., :V], weights
            return _original(original, module)(module, query, keys, values, mask, **kwargs)
        sinks = kwargs.get("s_aux")
        return_weights = original == "eager"
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if mask is None and T > 1 and causal:
            mask = torch.ones(T, S, dtype=torch.bool, device=query.device).tril()[None, None]
        return state.attend(
            query, key, value, mask, float(kwargs["scaling"]), sinks=sinks, return_weights=return_weights
        )

    return attention


def _pad_to_key_size(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """On a CPU, pad values (B, H, S, V) with zeros to the size P+R of keys; elsewhere return them unchanged.

    Torch's fused attention for CPUs needs keys and values of one size; without it, SDPA would write all B·H·T·S scores
    to memory.
    """
    missing = keys.shape[-1] - values.shape[-1]
    return F.pad(values, (0, missing)) if missing > 0 and values.device.type == "cpu" else values


def _uses_absorbed(state: LatentAttention, B: int, T: int, latent: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether this call is computed absorbed: the module and the arguments allow it, and the mode asks for it."""
    if state.mode == "expanded" or state.unsupported_reason() or kwargs.get("position_bias") is not None:
        return False
    if kwargs.get("dropout") or kwargs.get("softcap") is not None:
        return False
    device, itemsize = latent.device.type, latent.element_size()
    return state.mode == "absorbed" or prefers_absorbed(state, B, T, latent.shape[2], device, itemsize)


def _mask_by_indices(
    mask: torch.Tensor | None, indices: torch.Tensor | None, query: torch.Tensor, S: int
) -> torch.Tensor | None:
    """Return the mask, restricted to the keys `indices` (B, T, k) of an indexer where a model passes them."""
    if indices is None:
        return mask if mask is None else mask[..., :S]
    chosen = torch.zeros(indices.shape[0], indices.shape[1], S, dtype=torch.bool, device=query.device)
    chosen = chosen.scatter(-1, indices.long(), True).unsqueeze(1)
    if mask is None:
        return chosen
    mask = mask[..., :S]
    if mask.dtype == torch.bool:
        return mask & chosen
    return mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)


def _original(name: str, module: Any) -> Callable[..., Any]:
    """Return the attention function of this name; `eager` is defined in the file of the model's class."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward")  # noqa: B009
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
