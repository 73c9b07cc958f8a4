"""The proof's own reader: bytes of safetensors files as torch tensors, some rows at a time.

It shares no code with the writer, which is numpy (`checkpoint.dtypes`), so that one bug can't hide in both.  It reads
files instead of mapping them, because mapped pages would count as memory of the process.
"""

from __future__ import annotations

import threading

import numpy as np
import torch

from mla_tune.checkpoint.index import TensorRef, matrix_shape
from mla_tune.checkpoint.tensor_io import fill

#: Name of a dtype in safetensors files → torch's dtype.
TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
#: Dtypes that numbers are rounded to → (significant bits, exponent of the smallest normal number).
PRECISION = {"F64": (53, -1022), "F32": (24, -126), "F16": (11, -14), "BF16": (8, -126), "F8_E4M3": (4, -6)}


def ulp_of(x: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return the unit in the last place of `dtype` (its safetensors name) at each |x|; x is float32 or float64."""
    bits, smallest = PRECISION[dtype]
    if x.dtype == torch.float64:
        power = (x.view(torch.int64) & 0x7FF0 << 48).view(torch.float64)
    else:
        power = (x.view(torch.int32) & 0x7F80 << 16).view(torch.float32)  # the exponent alone: 2^⌊log2|x|⌋
    return power.clamp_min(2.0**smallest) * 2.0 ** (1 - bits)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Tell whether two one-dimensional uint8 tensors are equal.  Compares words of 8 bytes, which is much faster."""
    in_words = a.numel() // 8 * 8
    return (
        a.numel() == b.numel()
        and torch.equal(a[:in_words].view(torch.int64), b[:in_words].view(torch.int64))
        and torch.equal(a[in_words:], b[in_words:])
    )


def differing_positions(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """Return the flat positions where the bytes of two tensors of one dtype and size differ.

    Compares words of 8 bytes first: torch takes 20 times as long to compare numbers of 16 bits.
    """
    kind = np.dtype(f"u{a.element_size()}")
    a_bytes, b_bytes = (x.contiguous().view(torch.uint8).numpy().reshape(-1) for x in (a, b))
    per_word = 8 // kind.itemsize
    if a_bytes.size % 8:
        return np.flatnonzero(a_bytes.view(kind) != b_bytes.view(kind))
    words = np.flatnonzero(a_bytes.view(np.uint64) != b_bytes.view(np.uint64))
    positions = (words[:, None] * per_word + np.arange(per_word)).reshape(-1)
    return positions[a_bytes.view(kind)[positions] != b_bytes.view(kind)[positions]]


class TensorReader:
    """Reads bytes of tensors into buffers that each thread reuses.

    A returned tensor is valid until the same thread reads again into the buffer of the same name.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def rows(self, ref: TensorRef, begin: int, end: int, buffer: str) -> torch.Tensor:
        """Read rows [begin, end) of a tensor seen as a matrix; returns their bytes (uint8, one dimension)."""
        rows, _ = matrix_shape(ref.shape)
        width = ref.nbytes // rows if rows else 0
        return self.bytes(ref, begin * width, (end - begin) * width, buffer)

    def bytes(self, ref: TensorRef, offset: int, count: int, buffer: str) -> torch.Tensor:
        """Read `count` bytes of a tensor from byte `offset` on into this thread's buffer of that name."""
        buffers: dict[str, bytearray] = self._local.__dict__.setdefault("buffers", {})
        if len(buffers.get(buffer, b"")) < count:
            buffers[buffer] = bytearray(count)
        if not count:
            return torch.empty(0, dtype=torch.uint8)
        fill(ref, memoryview(buffers[buffer])[:count], offset)
        return torch.frombuffer(buffers[buffer], dtype=torch.uint8, count=count)


def read_tensor(ref: TensorRef, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Read a whole unquantized tensor, converted to `dtype`, into memory of its own."""
    rows, _ = matrix_shape(ref.shape)
    raw = TensorReader().rows(ref, 0, rows, "whole tensor")
    return raw.view(TORCH_DTYPES[ref.dtype]).to(dtype).reshape(ref.shape)
