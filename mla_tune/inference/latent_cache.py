"""A cache for decoding that has room for tokens to come, and a token's latent and rope key side by side.

transformers' `DynamicCache` copies all it holds for each new token; in the latent space, where a step reads the cache
twice and little else, that is a third to a half of a long context's time.  Here a token is written behind the last, as
one row of C + R numbers, so that absorbed attention multiplies with both at once.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

#: Room that is taken ahead: this share of the tokens, but as many as this at least.
_SHARE, _LEAST = 0.125, 64


class PreallocatedLayer(DynamicLayer):
    """Latents (B, 1, S, C) and rope keys (B, 1, S, R) of one layer, views of rows of C + R for more tokens than S."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.memory: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, those that are given at the end."""
        alike = key_states.shape[:-1] == value_states.shape[:-1] and key_states.dtype == value_states.dtype
        if torch.is_grad_enabled() or not alike:  # backward may need what was there
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        B, heads, T, C = key_states.shape
        S = self.get_seq_length()
        end = S + T
        memory = self.memory
        if memory is None or memory.shape[2] < end or not self._holds(memory, B, heads):
            room = max(_LEAST, int(_SHARE * end))
            memory = key_states.new_empty(B, heads, end + room, C + value_states.shape[-1])
            if S:
                old: Any = (self.keys, self.values)
                torch.cat(old, dim=-1, out=memory.narrow(2, 0, S))
            self.memory = memory
        torch.cat((key_states, value_states), dim=-1, out=memory.narrow(2, S, T))
        self.keys, self.values = memory.narrow(2, 0, end).split((C, memory.shape[-1] - C), dim=-1)
        return self.keys, self.values

    def reset(self) -> None:
        """Drop all tokens and the memory that was taken ahead."""
        super().reset()
        self.memory = None

    def _holds(self, memory: torch.Tensor, B: int, heads: int) -> bool:
        """Whether keys and values are the beginning of `memory` (as they were handed out, or cropped since), and not
        tensors that somebody has put in their place (beams that were reordered, rows that were chosen)."""
        if memory.is_inference() and not torch.is_inference_mode_enabled():
            return False  # torch forbids to write there
        keys: Any = self.keys
        values: Any = self.values
        C, R = keys.shape[-1], values.shape[-1]
        place = memory.data_ptr()
        return (
            (B, heads) == memory.shape[:2] == keys.shape[:2]
            and memory.shape[-1] == C + R
            and memory.stride() == keys.stride() == values.stride()
            and place == keys.data_ptr()
            and (R == 0 or place + C * keys.element_size() == values.data_ptr())
        )


class LatentCache(DynamicCache):
    """A `DynamicCache` with room: `model.generate(..., past_key_values=LatentCache(config=model.config))`.

    It differs in time and memory alone.  Layers that cache something else (sliding windows, indexers, linear
    attention) stay as they are.  As with any cache whose tokens can be cropped, a view of its tensors that a caller has
    kept changes when other tokens are written after a crop; `copy.deepcopy` makes an independent one.
    """

    def __init__(self, *, config: Any) -> None:
        super().__init__(config=config)
        self.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]


def joined_rows(latent: torch.Tensor, k_rope: torch.Tensor) -> torch.Tensor | None:
    """Rows (B, S, C+R) of latent (B, S, C) and rope key (B, S, R) where they lie in one memory, as here; else None."""
    if k_rope.shape[-1] == 0:
        return latent
    (B, S, C), n = latent.shape, latent.shape[-1] + k_rope.shape[-1]
    if latent.stride() != k_rope.stride() or latent.stride()[1:] != (n, 1):
        return None
    if k_rope.data_ptr() - latent.data_ptr() != C * latent.element_size():
        return None
    if k_rope.untyped_storage().data_ptr() != latent.untyped_storage().data_ptr():
        return None
    return latent.as_strided((B, S, n), latent.stride())
