"""The proof's own decoders of quantized weights, one class for each format.

A decoder shares no arithmetic with `checkpoint.quantized`, which wrote the codes; it takes from there only which
tensors belong to a weight.  `DECODERS` has one entry for each name in `sockets.QUANT_FORMATS`.

    number = code · unit        the unit of each number comes from its scale
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from mla_tune.checkpoint.quantized.base import QuantizedTensor
from mla_tune.registry import Registry
from mla_tune.verification.read import PRECISION, read_tensor, ulp_of


class Decoder(ABC):
    """Decodes one quantized weight, some rows at a time; rows are those of the weight seen as a matrix."""

    #: Significant bits of a code, from which the proof derives what other tools may be off by.
    bits: int

    def __init__(self, tensor: QuantizedTensor) -> None:
        self.tensor = tensor
        self.shape = tensor.shape

    @abstractmethod
    def codes(self, raw: torch.Tensor, rows: int) -> torch.Tensor:
        """View the stored bytes of `rows` rows as codes (rows, columns), one element for each number."""

    @abstractmethod
    def unit(self, begin: int, end: int) -> torch.Tensor:
        """Return what a code is worth, for each number of rows [begin, end): (end - begin, columns)."""

    @abstractmethod
    def nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        """Round numbers, divided by their unit, to the nearest code; returns codes as `codes` does."""

    @abstractmethod
    def step(self, scaled: torch.Tensor) -> torch.Tensor:
        """Return the distance between neighboring codes at each number, divided by its unit."""

    def numbers(self, raw: torch.Tensor, begin: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """Decode the bytes of rows [begin, end) to numbers (end - begin, columns) of `dtype`."""
        return self.codes(raw, end - begin).to(dtype) * self.unit(begin, end).to(dtype)

    def zeros(self) -> torch.Tensor:
        """Return zeros in the shape of the scales, for `track_largest` to fill."""
        raise NotImplementedError

    def track_largest(self, x: torch.Tensor, largest: torch.Tensor, begin: int, end: int) -> None:
        """Raise `largest` to the largest |x| of each scale's numbers; x holds rows [begin, end)."""
        raise NotImplementedError

    def bad_scales(self, codes: torch.Tensor, sums: torch.Tensor, *, strict: bool) -> str:
        """Say what is wrong with the scales of a weight that was quantized again; empty where nothing is.

        `codes` and `sums` are the largest code and the largest right number of each scale, from `track_largest`.
        `strict` says that merge-absorb wrote it, whose scales are the smallest that hold their numbers.
        """
        return ""


class Fp8Decoder(Decoder):
    """FP8: E4M3 codes with one scale for each block, each row, or the whole weight."""

    bits = PRECISION["F8_E4M3"][0]
    #: The largest code.
    largest = 448.0
    #: The least code that the largest number of a block may have: below, its scale is so large that precision is lost.
    #: Scales that are powers of two can be up to twice as large as needed.  Other tools choose scales less tightly.
    _LEAST, _LEAST_POWER_OF_TWO, _LEAST_OF_OTHERS = 416.0, 224.0 * 0.93, 28.0
    #: Dtype of the scales → scales up to this are never called too large, since smaller ones can't be stored: the
    #: smallest float16 is 2⁻²⁴.  Other dtypes: 2⁻¹²⁶.
    _SMALLEST_SCALE = {"F16": 2.0**-20}  # noqa: RUF012

    def __init__(self, tensor: QuantizedTensor) -> None:
        super().__init__(tensor)
        self.scales, self.block = read_tensor(tensor.scale), tensor.block

    def codes(self, raw: torch.Tensor, rows: int) -> torch.Tensor:
        return raw.view(torch.float8_e4m3fn).view(rows, -1)

    def unit(self, begin: int, end: int) -> torch.Tensor:
        if self.block is None:
            return self.scales.reshape(1, 1).expand(end - begin, self.shape[-1])
        return self._scales_of_rows(begin, end).repeat_interleave(self.block[1], dim=1)[:, : self.shape[-1]]

    def nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        return scaled.clamp(-self.largest, self.largest).to(torch.float8_e4m3fn)

    def step(self, scaled: torch.Tensor) -> torch.Tensor:
        return ulp_of(scaled, "F8_E4M3")

    def numbers(self, raw: torch.Tensor, begin: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        value = self.codes(raw, end - begin).to(dtype)
        if self.block is None or self.shape[-1] % self.block[1]:
            return value * self.unit(begin, end).to(dtype)
        scales = self._scales_of_rows(begin, end).to(dtype)
        value.view(len(value), -1, self.block[1]).mul_(scales.unsqueeze(2))  # in place: half the time
        return value

    def zeros(self) -> torch.Tensor:
        return torch.zeros_like(self.scales)

    def track_largest(self, x: torch.Tensor, largest: torch.Tensor, begin: int, end: int) -> None:
        x = x.abs().to(largest.dtype)
        if self.block is None:
            largest.clamp_min_(float(x.max()))
            return
        rows, width = self.block
        padded = torch.nn.functional.pad(x, (0, -x.shape[1] % width))
        across = padded.view(len(x), -1, width).amax(2)
        row = torch.arange(begin, end)
        if len(self.shape) == 3:
            largest, row = largest[begin // self.shape[1]], row % self.shape[1]
        largest.scatter_reduce_(0, (row // rows).unsqueeze(1).expand_as(across), across, "amax")

    def bad_scales(self, codes: torch.Tensor, sums: torch.Tensor, *, strict: bool) -> str:
        least = self._LEAST_OF_OTHERS
        if strict:
            least = self._LEAST_POWER_OF_TWO if self.tensor.power_of_two else self._LEAST
        small = self.scales <= self._SMALLEST_SCALE.get(self.tensor.scale.dtype, 2.0**-126)
        lost = (codes < least) & (sums > 0) & ~small
        if not bool(lost.any()):
            return ""
        worst = float((self.scales * self.largest / sums)[lost].max())
        return f"{int(lost.sum()):,} of {lost.numel():,} scales are too large, by up to {worst:.3g} times"

    def _scales_of_rows(self, begin: int, end: int) -> torch.Tensor:
        """Return the scales of rows [begin, end): (end - begin, blocks in a row)."""
        assert self.block is not None
        row = torch.arange(begin, end)
        if len(self.shape) == 3:
            return self.scales[row // self.shape[1], row % self.shape[1] // self.block[0]]  # (expert, block of rows)
        return self.scales[row // self.block[0]]


#: Name of a format → the class that decodes its weights in the proof.
DECODERS: Registry[type[Decoder]] = Registry(
    "decoder of the proof",
    {
        "fp8-block": "mla_tune.verification.decoders:Fp8Decoder",
        "fp8-tensor": "mla_tune.verification.decoders:Fp8Decoder",
    },
)
