"""Bytes of tensors into torch, some rows at a time: the proof's own reader.

It shares no code with the writer (numpy, `checkpoint.dtypes`).  Files are read, not mapped: mapped pages would count as
memory of the process.
"""

from __future__ import annotations

import threading

import torch

from mla_tune.checkpoint.index import TensorRef, matrix_shape
from mla_tune.checkpoint.tensor_io import fill

TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
#: Significant bits, and the exponent of the smallest normal number, of the dtypes that are rounded to.
PRECISION = {"F64": (53, -1022), "F32": (24, -126), "F16": (11, -14), "BF16": (8, -126), "F8_E4M3": (4, -6)}


def ulp_of(x: torch.Tensor, dtype: str) -> torch.Tensor:
    """The unit in the last place of `dtype` at |x|."""
    bits, smallest = PRECISION[dtype]
    if x.dtype == torch.float64:
        power = (x.view(torch.int64) & 0x7FF0 << 48).view(torch.float64)
    else:
        power = (x.view(torch.int32) & 0x7F80 << 16).view(torch.float32)  # the exponent alone: 2^⌊log2|x|⌋
    return power.clamp_min(2.0**smallest) * 2.0 ** (1 - bits)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two byte tensors of one dimension are equal; in words of 8 bytes, which is much faster."""
    whole = a.numel() // 8 * 8
    return (
        a.numel() == b.numel()
        and torch.equal(a[:whole].view(torch.int64), b[:whole].view(torch.int64))
        and torch.equal(a[whole:], b[whole:])
    )


class TensorReader:
    """Bytes of tensors into buffers of this thread: what is read stays valid until the next read under its name."""

    def __init__(self) -> None:
        self._local = threading.local()

    def rows(self, ref: TensorRef, begin: int, end: int, name: str) -> torch.Tensor:
        """Rows [begin, end) of a tensor seen as a matrix, as bytes (uint8, one dimension)."""
        rows, _ = matrix_shape(ref.shape)
        width = ref.nbytes // rows if rows else 0
        return self.bytes(ref, begin * width, (end - begin) * width, name)

    def bytes(self, ref: TensorRef, offset: int, count: int, name: str) -> torch.Tensor:
        """`count` bytes of a tensor from `offset` on, in this thread's buffer of that name."""
        buffers: dict[str, bytearray] = self._local.__dict__.setdefault("buffers", {})
        if len(buffers.get(name, b"")) < count:
            buffers[name] = bytearray(count)
        if not count:
            return torch.empty(0, dtype=torch.uint8)
        fill(ref, memoryview(buffers[name])[:count], offset)
        return torch.frombuffer(buffers[name], dtype=torch.uint8, count=count)


def read_whole(ref: TensorRef, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The whole tensor as floats, in memory of its own."""
    rows, _ = matrix_shape(ref.shape)
    raw = TensorReader().rows(ref, 0, rows, "read_whole")
    return raw.view(TORCH[ref.dtype]).to(dtype).reshape(ref.shape)
