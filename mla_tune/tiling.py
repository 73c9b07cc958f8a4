"""Sizes of the tiles in which large tensors are worked through, for what runs and for the memory estimate alike."""

from __future__ import annotations

#: Numbers in one tile of logits in training, by device type: 16 MB in float32 on a CPU, where a tile should fit the
#: cache, 512 MB on a GPU.
LOGITS_TILE = {"cpu": 1 << 22, "cuda": 1 << 27}
#: A tile of logits covers at least this many tokens, however large the vocabulary is.
LOGITS_TILE_MIN_TOKENS = 64
#: Numbers of a quantized matrix that are dequantized to float32 at a time.
DEQUANTIZED_TILE = 1 << 22
