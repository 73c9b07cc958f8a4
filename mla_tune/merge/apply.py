"""The merge of one tensor, some rows at a time: weight plus delta, rounded once, and how much the rounding retained.

Sums are float32 (or float64).

    W the base's weight   Δ the adapters' change (for DoRA: W' - W)   Q rounding to the dtype that is written

Everything is numpy, so that merging needs no torch; the proof (`verification.tensors`) computes the same in torch, by
other code.
PEFT rounds the delta of a bfloat16 adapter to bfloat16 before it adds it; one rounding less can differ from its merge
by one unit in the last place and is never further from the exact sum.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mla_tune.adapter.deltas import LoraDelta
from mla_tune.checkpoint.dtypes import STORAGE, decode, encode, round_bf16
from mla_tune.checkpoint.index import matrix_shape
from mla_tune.checkpoint.quantized.base import QuantizedTensor
from mla_tune.checkpoint.tensor_io import read_float, read_into, read_raw
from mla_tune.errors import WorkError
from mla_tune.merge.output import MergePlan, OutTensor, WeightedDelta
from mla_tune.merge.retention import DeltaRetention

#: Numbers computed at once: three float32 arrays of this size fit into a core's cache.
_BLOCK = 1 << 17
#: Bytes read and written at once.
PIECE_BYTES = 1 << 23
#: Sites whose factors are cached: the files of a checkpoint alternate between gate, up and down of the experts.
CACHED_FACTORS = 4


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows [begin, end) of a tensor seen as a matrix: its last dimension are the columns."""

    out: OutTensor
    begin: int
    end: int


class Merger:
    """Merged rows of a plan's tensors.  Holds the factors of a few sites and nothing else; any thread may call it."""

    def __init__(self, plan: MergePlan) -> None:
        self.plan = plan
        self.float_type: type = np.float64 if plan.options.exact else np.float32
        self._weights = {out.key: out for out in plan.changed if out.requantize is not None}
        self._factors: OrderedDict[str, tuple[np.ndarray, ...]] = OrderedDict()
        self._scales: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        self._local = threading.local()

    def pieces(self, out: OutTensor) -> Iterator[RowRange]:
        """The tensor in pieces of about `PIECE_BYTES`, that end where experts and quantized blocks end.  They depend on
        the tensor alone, never on the number of threads, and so do the results."""
        rows, columns = matrix_shape(out.shape)
        if out.scale_of is not None:
            yield RowRange(out, 0, rows)
            return
        step = max(1, PIECE_BYTES // max(1, columns * STORAGE[out.dtype].itemsize))
        for first, last, unit in self._spans(out, rows):
            size = max(unit, step // unit * unit)
            for begin in range(first, last, size):
                yield RowRange(out, begin, min(begin + size, last))

    def _spans(self, out: OutTensor, rows: int) -> Iterator[tuple[int, int, int]]:
        """(begin, end, granularity) of the rows that belong to one matrix."""
        unit = _row_group(out)
        matrices = out.shape[0] if len(out.shape) == 3 else 1
        for i in range(matrices):
            yield i * rows // matrices, (i + 1) * rows // matrices, unit

    def compute(self, piece: RowRange) -> tuple[np.ndarray, DeltaRetention | None]:
        """The codes to write for a piece, (rows, columns) in the storage dtype, and what the rounding retained; None
        where no adapter changes the tensor.  The codes lie in memory that the thread's next call uses again.
        Raises `WorkError` where a result is not finite."""
        out = piece.out
        if out.scale_of is not None:
            return self._fresh_scales(out), None
        _, columns = matrix_shape(out.shape)
        codes = self._spare("codes", (piece.end - piece.begin, columns), STORAGE[out.dtype])
        retention = DeltaRetention() if out.updates else None
        code = out.requantize
        # Computed before the rows are read, because it reads and merges in the same spare arrays.
        absmax = self._absmax(out) if code is not None and code.format.needs_absmax(code) else None
        raw = self._read(out, piece.begin, piece.end, columns)
        for begin, end in self._blocks(piece, columns):
            W = self._weight(out, raw[begin - piece.begin : end - piece.begin], begin)
            merged, added = self._merged(out, W, begin)
            block = codes[begin - piece.begin : end - piece.begin]
            if code is not None:
                block[...], scales = code.format.encode(merged, code, rng=self._rng(out.key, begin), absmax=absmax)
                written = code.format.decode_fresh(block, scales, code, self.float_type)
            else:
                written = self._round(merged, out, begin, block)
            if retention is None or added is None:
                if not np.isfinite(written).all():
                    raise _not_finite(out, W)
                continue
            np.subtract(written, W, out=written)
            part = DeltaRetention(_dot(written, added), _dot(added, added), _dot(written, written), _dot(W, W))
            if not np.isfinite(part.written2):
                raise _not_finite(out, W)
            retention.add(part)
        return codes, retention

    def _blocks(self, piece: RowRange, columns: int) -> Iterator[tuple[int, int]]:
        unit = _row_group(piece.out)
        step = max(unit, _BLOCK // max(1, columns) // unit * unit)
        for begin in range(piece.begin, piece.end, step):
            yield begin, min(begin + step, piece.end)

    def _read(self, out: OutTensor, begin: int, end: int, columns: int) -> np.ndarray:
        """The codes of rows of the source, which may hold several numbers in one element."""
        if out.quant is not None:
            columns = matrix_shape(out.source.shape)[1]
        raw = self._spare("raw", (end - begin, columns), STORAGE[out.source.dtype])
        read_into(out.source, raw, begin * columns * raw.itemsize)
        return raw

    def _weight(self, out: OutTensor, raw: np.ndarray, begin: int) -> np.ndarray:
        """The numbers that the codes of rows from `begin` on stand for."""
        if out.quant is None:
            if out.source.dtype == "BF16" and self.float_type is np.float32:
                return decode(raw, "BF16", out=self._spare("W", raw.shape))
            return decode(raw, out.source.dtype, self.float_type)
        expert, row = divmod(begin, out.shape[1]) if len(out.shape) == 3 else (None, begin)
        code, scales = out.quant, self._scale(out.quant)
        return code.format.decode(raw, scales, code, row=row, expert=expert, float_type=self.float_type)

    def _merged(self, out: OutTensor, W: np.ndarray, begin: int) -> tuple[np.ndarray, np.ndarray | None]:
        """(W', W' - W) of these rows; the second is None where nothing is added."""
        if not out.updates:
            return W.copy(), None
        if out.is_bias:
            added = np.zeros_like(W)
            for update in out.updates:
                assert update.delta.bias is not None
                added += read_float(update.delta.bias, self.float_type) * (update.delta.scale * update.weight)
            return W + added, added
        added = self._spare("added", W.shape)
        for i, update in enumerate(out.updates):
            self._add(update, out, begin, added, first=i == 0)
        merged = np.add(W, added, out=self._spare("merged", W.shape))
        delta = out.updates[0].delta
        if not delta.method.additive:
            # A vector has the rows of its own delta: gate's or up's alone where experts were adapted one by one.
            first = out.first_row + begin - (delta.rows or (0,))[0]
            vectors = {
                name: decode(read_raw(ref, first, first + len(W)), ref.dtype, self.float_type)
                for name, ref in zip(delta.method.vectors, delta.vectors, strict=True)
            }
            delta.method.finish(merged, vectors)
            np.subtract(merged, W, out=added)
        return merged, added

    def _add(self, update: WeightedDelta, out: OutTensor, begin: int, added: np.ndarray, *, first: bool) -> None:
        """Add s·B·A of these rows; `first` means that `added` holds nothing yet."""
        site, delta = out.site, update.delta
        assert site is not None
        expert, row = out.expert, out.first_row + begin
        if site.is_experts and expert is None:
            expert, row = divmod(begin, site.shape[0])
        low, high = delta.rows or (0, site.shape[0])
        a, b = max(row, low), min(row + len(added), high)
        if (delta.expert is not None and delta.expert != expert) or a >= b:
            if first:
                added[...] = 0
            return
        A, B = self._load(delta, update.weight)
        which = (expert or 0) if delta.experts > 1 else 0
        rows = B[which, a - low : b - low]
        if first and b - a == len(added):
            np.dot(rows, A[which], out=added)
            return
        if first:
            added[...] = 0
        added[a - row : b - row] += rows @ A[which]

    def _load(self, delta: LoraDelta, weight: float) -> tuple[np.ndarray, ...]:
        """A (E, r, in) and s·w·B (E, out, r) of one update, as floats.

        PEFT stacks A (E·r, in) by experts and B (out, r·E) by ranks: the columns of B count the experts fastest.
        """
        with self._lock:
            name = f"{delta.A.file}:{delta.A.key}"
            if name not in self._factors:
                A, B = read_float(delta.A, self.float_type), read_float(delta.B, self.float_type)
                E = delta.experts
                B = np.ascontiguousarray(B.reshape(len(B), -1, E).transpose(2, 0, 1))
                B *= self.float_type(delta.scale * weight)
                self._factors[name] = (A.reshape(E, -1, A.shape[1]), B)
                if len(self._factors) > CACHED_FACTORS * len(self.plan.adapters):
                    self._factors.popitem(last=False)
            self._factors.move_to_end(name)
            return self._factors[name]

    def _round(self, merged: np.ndarray, out: OutTensor, begin: int, codes: np.ndarray) -> np.ndarray:
        """Write the codes of `merged`, which is overwritten, and return the numbers that they stand for."""
        rng = self._rng(out.key, begin)
        if out.dtype == "BF16" and rng is None and merged.dtype == np.float32 and out.updates:
            # A NaN shows in the sums of DeltaRetention, whatever its code.
            round_bf16(merged, self._spare("bits", merged.shape, np.dtype(np.uint32)), codes)
            bits = merged.view(np.uint32)
            np.bitwise_and(bits, 0xFFFF0000, out=bits)
            return merged
        codes[...] = encode(merged, out.dtype, rng)
        return decode(codes, out.dtype, self.float_type)

    def _rng(self, key: str, begin: int) -> np.random.Generator | None:
        """The same numbers for the same seed, tensor and rows, whatever runs beside them."""
        if self.plan.options.round == "nearest":
            return None
        digest = hashlib.sha256(f"{self.plan.options.seed}:{key}:{begin}".encode()).digest()
        return np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "little")))

    def _spare(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any] | None = None) -> np.ndarray:
        """An array of this thread, to be used again: fresh memory costs a page fault every 4 KB."""
        spares = self._local.__dict__.setdefault("spares", {})
        kind = np.dtype(self.float_type) if dtype is None else dtype
        size = math.prod(shape) * kind.itemsize
        if name not in spares or spares[name].nbytes < size:
            spares[name] = np.empty(size, np.uint8)
        return spares[name][:size].view(kind).reshape(shape)

    def _scale(self, quant: QuantizedTensor) -> np.ndarray:
        """The scales of a quantized weight, kept for the next rows."""
        with self._lock:
            key = quant.key
            if key not in self._scales:
                self._scales[key] = quant.format.read_scales(quant, self.float_type)
                if len(self._scales) > 8:
                    self._scales.popitem(last=False)
            return self._scales[key]

    def _absmax(self, out: OutTensor) -> float:
        """max |W'| of a whole tensor: what a scale for the whole tensor has to reach."""
        with self._lock:
            known = self._scales.get(f"absmax {out.key}")
        if known is None:
            rows, columns = matrix_shape(out.shape)
            largest = 0.0
            for begin, end in self._blocks(RowRange(out, 0, rows), columns):
                merged, _ = self._merged(out, self._weight(out, self._read(out, begin, end, columns), begin), begin)
                largest = max(largest, float(np.abs(merged).max()))
            known = np.array(largest)
            with self._lock:
                self._scales[f"absmax {out.key}"] = known
        return float(known)

    def _fresh_scales(self, out: OutTensor) -> np.ndarray:
        """One tensor of scales of a requantized weight, in the dtype and shape of the base's.

        It may lie in another shard than the weight, so it is computed from the weight once more.
        """
        quant = out.requantize
        assert quant is not None
        assert out.scale_of is not None
        weight = self._weights[out.scale_of]
        rows, columns = matrix_shape(weight.shape)
        absmax = self._absmax(weight) if quant.format.needs_absmax(quant) else None
        index = [scale.key for scale in quant.scales].index(out.key)
        parts = []
        for first, last, _ in self._spans(weight, rows):
            for begin, end in self._blocks(RowRange(weight, first, last), columns):
                W = self._weight(weight, self._read(weight, begin, end, columns), begin)
                merged, _ = self._merged(weight, W, begin)
                scales = quant.format.encode(merged, quant, absmax=absmax)[1][index]
                assert scales.dtype == STORAGE[out.dtype], f"{out.key}: {scales.dtype} is not how {out.dtype} is stored"
                if scales.size == math.prod(out.shape):  # for the whole weight: the other blocks give the same
                    return scales.reshape(matrix_shape(out.shape))
                parts.append(scales.reshape(-1))
        return np.concatenate(parts).reshape(matrix_shape(out.shape))


def _row_group(out: OutTensor) -> int:
    """How many rows of a tensor have to be computed together, because they share scales."""
    code = out.quant or out.requantize
    return 1 if code is None else code.format.row_group(code)


def _not_finite(out: OutTensor, W: np.ndarray) -> WorkError:
    why = (
        f"too large for {out.dtype}: take --dtype bfloat16 or float32"
        if np.isfinite(W).all()
        else "the base is damaged"
    )
    return WorkError(f"{out.source.file}: '{out.key}' would hold NaN or infinity ({why})")


def _dot(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.dot(x.reshape(-1), y.reshape(-1)))
