"""The attention function and the mask function that transformers finds for an absorbed model.

One pair for each implementation that a model may have had ("sdpa" → "mla_tune_sdpa"): a call that is not absorbed goes
to the old one, with expanded keys and values and the mask that it expects.

Which of the two a call takes is a count of floating-point operations, of numbers moved, and of a fixed cost, for B
rows, T queries and S keys; W = C·H(P+V) is the size of W_UKV:

                operations / 2                             numbers
    expanded    B·S·W + B·T·S·H(P+R+V)                     W + B·S(C+R) + B·S·H(4P+2R+2V)
    absorbed    B·T·W + B·T·S·H(2C+R)                      W + B·S(2C+R) + 8·B·T·S·H          and some calls more

(keys and values of all heads are made, copied together and read; a score is written and read by each of a few products
and a softmax).  Decoding (T = 1) is absorbed, a long prompt (T = S) expanded.
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

PREFIX = "mla_tune_"
#: Where an attention module keeps its `LatentAttention`.
STATE = "_mla_tune_latent"
#: Operations and bytes a second, and seconds that absorbed attention takes besides, of a usual machine of each kind:
#: only their proportions matter, and these only where both ways take about the same time (`scripts/bench_choice.py`).
_RATES = {"cpu": (2e11, 2e10, 0.0), "cuda": (4e14, 2.5e12, 1.6e-4)}


def register(original: str) -> str:
    """Make the pair for `original` known to transformers; returns its name."""
    name = PREFIX + original
    AttentionInterface.register(name, _attention_over(original))
    mask = original if original in ALL_MASK_ATTENTION_FUNCTIONS else "eager"
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[mask])
    return name


def prefers_absorbed(latent: LatentAttention, B: int, T: int, S: int, device: str = "cpu", itemsize: int = 4) -> bool:
    """Whether a call with these counts of rows, queries and keys is cheaper absorbed; `itemsize`: bytes of a number."""
    m = latent.module
    H, C, R, P, V = m.num_heads, m.kv_lora_rank, m.qk_rope_head_dim, latent.P, latent.V
    W, pairs = C * H * (P + V), B * T * S * H
    operations = 2 * (B * T * W + pairs * (2 * C + R)) - 2 * (B * S * W + pairs * (P + R + V))
    numbers = B * S * C + 8 * pairs - B * S * H * (4 * P + 2 * R + 2 * V)
    per_operation, per_byte, besides = _RATES.get(device, _RATES["cuda"])
    return operations / per_operation + numbers * itemsize / per_byte + besides < 0


def _attention_over(original: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    def attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        state: LatentAttention | None = getattr(module, STATE, None)
        if state is None:  # another attention module under the same configuration
            return _original(original, module)(module, query, key, value, attention_mask, **kwargs)
        B, T, S = query.shape[0], query.shape[2], key.shape[2]
        if T > 1:
            state.forget()
        mask = _with_indices(attention_mask, kwargs.get("indices"), query, S)
        if not _is_absorbed(state, B, T, key, kwargs):
            if kwargs.get("indices") is not None:
                kwargs["indices"] = None
            keys, values = state.expand(key, value)
            if original == "sdpa" and T > 1:
                values, V = _as_wide_as(keys, values), values.shape[-1]
                out, weights = _original(original, module)(module, query, keys, values, mask, **kwargs)
                return out[..., :V], weights
            return _original(original, module)(module, query, keys, values, mask, **kwargs)
        sinks = kwargs.get("s_aux")
        keep = original == "eager"
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if mask is None and T > 1 and causal:
            mask = torch.ones(T, S, dtype=torch.bool, device=query.device).tril()[None, None]
        return state.attend(query, key, value, mask, float(kwargs["scaling"]), sinks, keep)

    return attention


def _as_wide_as(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Values (B, H, S, V), with zeros behind up to the P+R of keys on a CPU: torch's fused attention for CPUs takes one
    size for both, and else there is a score in memory for each pair of tokens."""
    missing = keys.shape[-1] - values.shape[-1]
    return F.pad(values, (0, missing)) if missing > 0 and values.device.type == "cpu" else values


def _is_absorbed(state: LatentAttention, B: int, T: int, latent: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    if state.mode == "expanded" or state.unsupported_reason() or kwargs.get("position_bias") is not None:
        return False
    if kwargs.get("dropout") or kwargs.get("softcap") is not None:
        return False
    device, itemsize = latent.device.type, latent.element_size()
    return state.mode == "absorbed" or prefers_absorbed(state, B, T, latent.shape[2], device, itemsize)


def _with_indices(
    mask: torch.Tensor | None, indices: torch.Tensor | None, query: torch.Tensor, S: int
) -> torch.Tensor | None:
    """The mask, and the keys that an indexer chose, (B, T, k), where a model hands them over apart from it."""
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
    """The function of this name; `eager` is a function of the model's own file."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward")  # noqa: B009
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
