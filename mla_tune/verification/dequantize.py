"""The numbers of a checkpoint, quantized weights included, and the LoRA factors of adapters, as torch tensors.

This is what the proof computes with.  It shares no arithmetic with the writer (numpy, `checkpoint.dtypes` and
`checkpoint.quantized`); from the latter it takes only which tensors belong to which weight.
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
from mla_tune.verification.read import TORCH_DTYPES, read_tensor

#: Sites whose factors stay in memory: two threads, each with the gate and up, and the down, experts of a layer.
_CACHED_FACTORS = 4
#: Decoders, with the scales of their weight, that stay in memory.
_CACHED_DECODERS = 64


class DequantizedCheckpoint:
    """A checkpoint whose tensors are read as numbers, whether they are quantized or not.

    A quantized weight has a key (`….weight`) and a tensor of codes, which some formats store under another key.
    Raises `InputError` when built from a checkpoint whose quantized weights can't be decoded for certain.
    """

    def __init__(self, checkpoint: Checkpoint, quantized: Mapping[str, QuantizedTensor] | None = None) -> None:
        self.checkpoint = checkpoint
        self.quantized = dict(quantized_tensors(checkpoint) if quantized is None else quantized)
        self._weight_keys = {tensor.codes.key: key for key, tensor in self.quantized.items()}
        self._decoders: dict[str, Decoder] = {}

    def find(self, key: str) -> TensorRef | None:
        """Return the tensor that holds the numbers of weight `key` (the codes, if quantized); None if there is none."""
        return self.quantized[key].codes if key in self.quantized else self.checkpoint.tensors.get(key)

    def weight_key(self, ref: TensorRef) -> str:
        """Return the key of the weight that a tensor holds: its own key, unless it is codes under another key."""
        return self._weight_keys.get(ref.key, ref.key)

    def is_quantized(self, ref: TensorRef) -> bool:
        """Tell whether the tensor has the key of a quantized weight, or holds its codes."""
        return self.weight_key(ref) in self.quantized

    def shape(self, ref: TensorRef) -> tuple[int, ...]:
        """Return the shape of the numbers in a tensor of this checkpoint, or in an unquantized one of another file."""
        tensor = self.quantized.get(self.weight_key(ref))
        return tensor.shape if tensor is not None and tensor.codes is ref else ref.shape

    def decoder(self, key: str) -> Decoder | None:
        """Return the decoder of the weight `key`; None for one that is not quantized."""
        tensor = self.quantized.get(key)
        if tensor is None:
            return None
        if key not in self._decoders:
            if len(self._decoders) > _CACHED_DECODERS:
                self._decoders.clear()
            self._decoders[key] = DECODERS.get(tensor.format.name)(tensor)
        return self._decoders[key]

    def numbers(self, ref: TensorRef, raw: torch.Tensor, begin: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """Convert the bytes `raw` of rows [begin, end) of a tensor to numbers (end - begin, columns) of `dtype`."""
        decoder = self.decoder(self.weight_key(ref)) if self.checkpoint.tensors.get(ref.key) is ref else None
        if decoder is None:
            return raw.view(TORCH_DTYPES[ref.dtype]).to(dtype).view(end - begin, -1)
        return decoder.numbers(raw, begin, end, dtype)


class FactorCache:
    """The LoRA factors of the sites used last, read once for all blocks of a site and shared by all threads."""

    def __init__(self) -> None:
        self._factors: dict[tuple[str, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}
        self._lock = threading.Lock()

    def get(self, delta: LoraDelta, weight: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A (E, r, in), multiplied by s and the adapter's `weight`, and B (E, out, r), both of `dtype`.

        PEFT stacks B of experts rank-major (`ParamWrapper.get_delta_weight`); here each expert gets its own B.
        """
        with self._lock:
            name = (f"{delta.A.file}:{delta.A.key}", dtype)
            if name not in self._factors:
                if len(self._factors) >= _CACHED_FACTORS:
                    self._factors.pop(next(iter(self._factors)))
                A, B = read_tensor(delta.A, dtype), read_tensor(delta.B, dtype)
                A = A.view(delta.experts, delta.rank, -1) * (delta.scale * weight)
                B = torch.stack([B[:, e :: delta.experts] for e in range(delta.experts)])
                self._factors[name] = (A, B.contiguous())
            return self._factors[name]
