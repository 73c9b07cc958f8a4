"""The dimensions of one attention module with MLA, and the bytes of KV cache that follow from them."""

from __future__ import annotations

from dataclasses import dataclass

#: Bytes per number of each dtype that a KV cache may have.
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True, slots=True)
class MLADims:
    """The dimensions of one attention module, by the letters of `mla_tune.arch.roles`."""

    H: int
    """Heads."""
    P: int
    """Size of a head's key and query without rope."""
    R: int
    """Size of the part with rope; all heads share one rope key."""
    V: int
    """Size of a head's value."""
    C: int
    """Size of the latent."""
    L: int | None
    """Size of the query latent; None without query compression."""
    D: int
    """Hidden size."""

    def latent_bytes(self, dtype: str) -> int:
        """Return the bytes per token of a latent cache: the latent (C) and the shared rope key (R)."""
        return (self.C + self.R) * DTYPE_BYTES[dtype]

    def expanded_bytes(self, dtype: str) -> int:
        """Return the bytes per token of a cache that holds a key (P+R) and a value (V) for each head."""
        return self.H * (self.P + self.R + self.V) * DTYPE_BYTES[dtype]
