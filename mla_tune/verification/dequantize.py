"""What a tensor of a checkpoint stands for, in torch, some rows at a time: the proof's own reader.

It shares no arithmetic with the writer (numpy, `checkpoint.codec` and `checkpoint.quant`); of the latter it takes only
which scale belongs to which weight.  Files are read, not mapped: mapped pages would count as memory of the process.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mla_tune.adapter.files import LoraDelta
from mla_tune.checkpoint.index import Checkpoint, TensorRef, matrix_shape
from mla_tune.checkpoint.quantized.base import QuantizedTensor
from mla_tune.checkpoint.quantized.config import quantized_tensors
from mla_tune.checkpoint.tensor_io import fill

TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
#: Significant bits, and the exponent of the smallest normal number, of the dtypes that are rounded to.
PRECISION = {"F64": (53, -1022), "F32": (24, -126), "F16": (11, -14), "BF16": (8, -126), "F8_E4M3": (4, -6)}

#: Sites whose factors are kept at hand: two threads, each with gate and up, and down, of the experts of a layer.
_KEPT_FACTORS = 4


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
    read_whole = a.numel() // 8 * 8
    return (
        a.numel() == b.numel()
        and torch.equal(a[:read_whole].view(torch.int64), b[:read_whole].view(torch.int64))
        and torch.equal(a[read_whole:], b[read_whole:])
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


@dataclass(frozen=True, slots=True)
class Scaled:
    """The scales of an FP8 weight: value = code · scale of its block."""

    scales: torch.Tensor
    dtype: str
    block: tuple[int, int] | None
    power_of_two: bool

    def spread(self, begin: int, end: int, shape: tuple[int, ...]) -> torch.Tensor:
        """(end - begin, columns): the scale of each number of these rows of the weight seen as a matrix."""
        if self.block is None:
            return self.scales.reshape(1, 1).expand(end - begin, shape[-1])
        return self._of_rows(begin, end, shape).repeat_interleave(self.block[1], dim=1)[:, : shape[-1]]

    def apply(self, codes: torch.Tensor, begin: int, shape: tuple[int, ...]) -> torch.Tensor:
        """codes (rows, columns), from row `begin` on, times their scales; overwrites the codes where it can."""
        end = begin + len(codes)
        if self.block is None or shape[-1] % self.block[1]:
            return codes * self.spread(begin, end, shape).to(codes.dtype)
        scales = self._of_rows(begin, end, shape).to(codes.dtype)
        codes.view(len(codes), -1, self.block[1]).mul_(scales.unsqueeze(2))
        return codes

    def _of_rows(self, begin: int, end: int, shape: tuple[int, ...]) -> torch.Tensor:
        """(end - begin, blocks across)."""
        assert self.block is not None
        row = torch.arange(begin, end)
        if len(shape) == 3:
            return self.scales[row // shape[1], row % shape[1] // self.block[0]]
        return self.scales[row // self.block[0]]


class Values:
    """The numbers of a checkpoint's tensors."""

    def __init__(self, checkpoint: Checkpoint, quantized: Mapping[str, QuantizedTensor] | None = None) -> None:
        self.checkpoint = checkpoint
        self.quantized = dict(quantized_tensors(checkpoint) if quantized is None else quantized)
        self._scales: dict[str, Scaled] = {}

    def scaled(self, key: str) -> Scaled | None:
        """The scales of this weight, or None for one that is not quantized."""
        how = self.quantized.get(key)
        if how is None:
            return None
        if key not in self._scales:
            if len(self._scales) > 64:
                self._scales.clear()
            self._scales[key] = Scaled(read_whole(how.scale), how.scale.dtype, how.block, how.power_of_two)
        return self._scales[key]

    def of(self, ref: TensorRef, raw: torch.Tensor, begin: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """Bytes of rows [begin, end) as numbers (rows, columns) of `dtype`."""
        value = raw.view(TORCH[ref.dtype]).to(dtype).view(end - begin, -1)
        scaled = self.scaled(ref.key) if self.checkpoint.tensors.get(ref.key) is ref else None
        return value if scaled is None else scaled.apply(value, begin, ref.shape)


class FactorCache:
    """A (E, r, in), times s and the adapter's weight, and B (E, out, r) of the deltas used last."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}
        self._lock = threading.Lock()

    def of(self, delta: LoraDelta, weight: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The rank-major layout of PEFT's stacked B is undone here (`ParamWrapper.get_delta_weight`)."""
        with self._lock:
            name = (f"{delta.A.file}:{delta.A.key}", dtype)
            if name not in self._kept:
                if len(self._kept) >= _KEPT_FACTORS:
                    self._kept.pop(next(iter(self._kept)))
                A, B = read_whole(delta.A, dtype), read_whole(delta.B, dtype)
                A = A.view(delta.experts, delta.rank, -1) * (delta.scale * weight)
                B = torch.stack([B[:, e :: delta.experts] for e in range(delta.experts)])
                self._kept[name] = (A, B.contiguous())
            return self._kept[name]
