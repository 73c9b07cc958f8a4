"""The attention function and the mask function that transformers finds for an absorbed model.

One pair for each implementation that a model may have had ("sdpa" → "mla_tune_sdpa"): a call that is not absorbed goes
to the old one, with expanded keys and values and the mask that it expects.

Which of the two a call takes is a count of floating-point operations, for T queries and S keys:

    expanded    S·C·H(P+V)              keys and values of every cached token
              + T·S·H(P+R+V)            scores and sums
    absorbed    T·H·C(P+V)              queries into the latent space, sums out of it
              + T·S·H(2C+R)             scores and sums, in rows of C

times `_SPREAD` where a kernel makes less of it.  Decoding (T = 1) is absorbed, a long prompt (T = S) expanded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mla_tune.runtime.latent import Latent

PREFIX = "mla_tune_"
#: Where an attention module keeps its `Latent`.
STATE = "_mla_tune_latent"
#: What a floating-point operation of plain products and a softmax takes, against one inside a fused kernel.
_SPREAD = 1.5


def register(original: str) -> str:
    """Make the pair for `original` known to transformers; returns its name."""
    name = PREFIX + original
    AttentionInterface.register(name, _attention_over(original))
    mask = original if original in ALL_MASK_ATTENTION_FUNCTIONS else "eager"
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[mask])
    return name


def prefers_absorbed(latent: Latent, T: int, S: int) -> bool:
    """Whether a call with these counts of queries and keys is cheaper absorbed."""
    m = latent.module
    H, C, R = m.num_heads, m.kv_lora_rank, m.qk_rope_head_dim
    P, V = latent.P, latent.V
    expanded = S * C * H * (P + V) + T * S * H * (P + R + V)
    absorbed = T * H * C * (P + V) + T * S * H * (2 * C + R) * _SPREAD
    return absorbed < expanded


def _attention_over(original: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    def attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        state: Latent | None = getattr(module, STATE, None)
        if state is None:  # another attention module under the same configuration
            return _original(original, module)(module, query, key, value, attention_mask, **kwargs)
        T, S = query.shape[2], key.shape[2]
        if T > 1:
            state.forget()
        mask = _with_indices(attention_mask, kwargs.get("indices"), query, S)
        if not _is_absorbed(state, T, S, kwargs):
            if kwargs.get("indices") is not None:
                kwargs["indices"] = None
            keys, values = state.expand(key, value)
            return _original(original, module)(module, query, keys, values, mask, **kwargs)
        sinks = kwargs.get("s_aux")
        keep = original == "eager"
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if mask is None and T > 1 and causal:
            mask = torch.ones(T, S, dtype=torch.bool, device=query.device).tril()[None, None]
        return state.attend(query, key, value, mask, float(kwargs["scaling"]), sinks, keep)

    return attention


def _is_absorbed(state: Latent, T: int, S: int, kwargs: dict[str, Any]) -> bool:
    if state.mode == "expanded" or state.obstacle() or kwargs.get("position_bias") is not None:
        return False
    if kwargs.get("dropout") or kwargs.get("softcap") is not None:
        return False
    return state.mode == "absorbed" or prefers_absorbed(state, T, S)


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
