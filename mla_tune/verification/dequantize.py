"""What the tensors of a checkpoint stand for, and the factors of adapters, in torch: what the proof computes with.

It shares no arithmetic with the writer (numpy, `checkpoint.dtypes` and `checkpoint.quantized`); of the latter it takes
only which tensors belong to which weight.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch

from mla_tune.adapter.deltas import LoraDelta
from mla_tune.checkpoint.index import Checkpoint, TensorRef
from mla_tune.checkpoint.quantized.base import QuantizedTensor
from mla_tune.checkpoint.quantized.config import quantized_tensors
from mla_tune.verification.decoders import DECODERS, Decoder
from mla_tune.verification.read import TORCH, read_whole

#: Sites whose factors are kept at hand: two threads, each with gate and up, and down, of the experts of a layer.
_CACHED_FACTORS = 4


class Values:
    """The numbers of a checkpoint's tensors, quantized ones included."""

    def __init__(self, checkpoint: Checkpoint, quantized: Mapping[str, QuantizedTensor] | None = None) -> None:
        self.checkpoint = checkpoint
        self.quantized = dict(quantized_tensors(checkpoint) if quantized is None else quantized)
        #: Key of codes → key of the weight.
        self.by_codes = {tensor.codes.key: key for key, tensor in self.quantized.items()}
        self._decoders: dict[str, Decoder] = {}

    def ref(self, key: str) -> TensorRef | None:
        """Where the numbers of a weight or tensor are: the codes of a quantized one; None where it is missing."""
        return self.quantized[key].codes if key in self.quantized else self.checkpoint.tensors.get(key)

    def name(self, ref: TensorRef) -> str:
        """The key of the weight whose numbers a tensor holds: its own, unless codes have a key of their own."""
        return self.by_codes.get(ref.key, ref.key)

    def shape(self, ref: TensorRef) -> tuple[int, ...]:
        """The shape of the numbers in a tensor of this checkpoint, or of another that is not quantized."""
        tensor = self.quantized.get(self.name(ref))
        return tensor.shape if tensor is not None and tensor.codes is ref else ref.shape

    def decoder(self, key: str) -> Decoder | None:
        """The decoder of the weight `key`; None for one that is not quantized."""
        tensor = self.quantized.get(key)
        if tensor is None:
            return None
        if key not in self._decoders:
            if len(self._decoders) > 64:
                self._decoders.clear()
            self._decoders[key] = DECODERS.get(tensor.format.name)(tensor)
        return self._decoders[key]

    def of(self, ref: TensorRef, raw: torch.Tensor, begin: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """Bytes of rows [begin, end) of a tensor → numbers (rows, columns) of `dtype`."""
        decoder = self.decoder(self.name(ref)) if self.checkpoint.tensors.get(ref.key) is ref else None
        if decoder is None:
            return raw.view(TORCH[ref.dtype]).to(dtype).view(end - begin, -1)
        return decoder.numbers(raw, begin, end, dtype)


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
                if len(self._kept) >= _CACHED_FACTORS:
                    self._kept.pop(next(iter(self._kept)))
                A, B = read_whole(delta.A, dtype), read_whole(delta.B, dtype)
                A = A.view(delta.experts, delta.rank, -1) * (delta.scale * weight)
                B = torch.stack([B[:, e :: delta.experts] for e in range(delta.experts)])
                self._kept[name] = (A, B.contiguous())
            return self._kept[name]
