"""The dimensions of Multi-head Latent Attention, and the KV cache that follows from them."""

from __future__ import annotations

from dataclasses import dataclass

#: Bytes of one number of each cache dtype.
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True, slots=True)
class MLADims:
    """Dimension letters of one attention module (see `roles`); `L` is None without query compression."""

    H: int
    P: int
    R: int
    V: int
    C: int
    L: int | None
    D: int

    def latent_bytes(self, dtype: str) -> int:
        """Bytes a token of one module in the latent cache: the latent C and the shared rope key R."""
        return (self.C + self.R) * DTYPE_BYTES[dtype]

    def expanded_bytes(self, dtype: str) -> int:
        """Bytes a token of one module when every head's key (P+R) and value (V) is kept."""
        return self.H * (self.P + self.R + self.V) * DTYPE_BYTES[dtype]
