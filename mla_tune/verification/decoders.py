"""The proof's own decoders of quantized weights, one for each format, by the format's name.

A decoder shares no arithmetic with `checkpoint.quantized`, which wrote the codes; it takes from there only which
tensors belong to a weight.  `DECODERS` has one entry for each name of `sockets.QUANT_FORMATS`.

    number = code · unit        unit: what one step of the codes is worth there, from the scales
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from mla_tune.checkpoint.quantized.base import QuantizedTensor
from mla_tune.registry import Registry
from mla_tune.verification.read import PRECISION, read_whole, ulp_of


class Decoder(ABC):
    """Reads one quantized weight, some rows at a time: rows of the weight seen as a matrix (rows, columns)."""

    #: Significant bits of a code: other tools may be off by half a unit of its last place more.
    bits: int
    #: The largest code.
    largest: float

    def __init__(self, tensor: QuantizedTensor) -> None:
        self.tensor = tensor
        self.shape = tensor.shape

    @abstractmethod
    def codes(self, raw: torch.Tensor, rows: int) -> torch.Tensor:
        """Bytes of `rows` rows as stored → the codes, one element a number, (rows, columns)."""

    @abstractmethod
    def unit(self, begin: int, end: int) -> torch.Tensor:
        """What a code is worth, for each number of rows [begin, end): (end - begin, columns)."""

    @abstractmethod
    def nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        """The nearest code of each number that is divided by its unit already, as `codes` has them."""

    @abstractmethod
    def step(self, scaled: torch.Tensor) -> torch.Tensor:
        """The distance of neighboring codes at each number that is divided by its unit already."""

    def numbers(self, raw: torch.Tensor, begin: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """Bytes of rows [begin, end) → numbers (end - begin, columns) of `dtype`."""
        return self.codes(raw, end - begin).to(dtype) * self.unit(begin, end).to(dtype)

    def blocks(self) -> torch.Tensor:
        """Zeros, one for each scale: what `note` fills."""
        raise NotImplementedError

    def note(self, x: torch.Tensor, seen: torch.Tensor, begin: int, end: int) -> None:
        """Raise `seen` to the largest |x| of each scale's numbers; x (end - begin, columns) are rows [begin, end)."""
        raise NotImplementedError

    def bad_scales(self, codes: torch.Tensor, sums: torch.Tensor, *, strict: bool) -> str:
        """What is wrong with the scales of a weight that was quantized anew; empty where nothing is.

        `codes` and `sums` are the largest code and the largest right number of each scale, from `note`.  `strict`: the
        merge wrote it, so a scale is the smallest that holds its numbers.
        """
        return ""


class Fp8Decoder(Decoder):
    """E4M3 codes under one scale a block, a row or the whole weight."""

    bits, largest = PRECISION["F8_E4M3"][0], 448.0
    #: The least that the largest number of a block may be coded as; more is lost to a scale that is too large.  Powers
    #: of two can be up to twice the scale that is needed.
    _LEAST, _LEAST_POWER, _LEAST_OF_OTHERS = 416.0, 224.0 * 0.93, 28.0
    #: Scales below this are not made smaller: float16 ends at 2⁻²⁴.
    _SMALL = {"F16": 2.0**-20}  # noqa: RUF012

    def __init__(self, tensor: QuantizedTensor) -> None:
        super().__init__(tensor)
        self.scales, self.block = read_whole(tensor.scale), tensor.block

    def codes(self, raw: torch.Tensor, rows: int) -> torch.Tensor:
        return raw.view(torch.float8_e4m3fn).view(rows, -1)

    def unit(self, begin: int, end: int) -> torch.Tensor:
        if self.block is None:
            return self.scales.reshape(1, 1).expand(end - begin, self.shape[-1])
        return self._of_rows(begin, end).repeat_interleave(self.block[1], dim=1)[:, : self.shape[-1]]

    def nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        return scaled.clamp(-self.largest, self.largest).to(torch.float8_e4m3fn)

    def step(self, scaled: torch.Tensor) -> torch.Tensor:
        return ulp_of(scaled, "F8_E4M3")

    def numbers(self, raw: torch.Tensor, begin: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        value = self.codes(raw, end - begin).to(dtype)
        if self.block is None or self.shape[-1] % self.block[1]:
            return value * self.unit(begin, end).to(dtype)
        scales = self._of_rows(begin, end).to(dtype)
        value.view(len(value), -1, self.block[1]).mul_(scales.unsqueeze(2))  # in place: half the time
        return value

    def blocks(self) -> torch.Tensor:
        return torch.zeros_like(self.scales)

    def note(self, x: torch.Tensor, seen: torch.Tensor, begin: int, end: int) -> None:
        x = x.abs().to(seen.dtype)
        if self.block is None:
            seen.clamp_min_(float(x.max()))
            return
        rows, width = self.block
        padded = torch.nn.functional.pad(x, (0, -x.shape[1] % width))
        across = padded.view(len(x), -1, width).amax(2)
        row = torch.arange(begin, end)
        if len(self.shape) == 3:
            seen, row = seen[begin // self.shape[1]], row % self.shape[1]
        seen.scatter_reduce_(0, (row // rows).unsqueeze(1).expand_as(across), across, "amax")

    def bad_scales(self, codes: torch.Tensor, sums: torch.Tensor, *, strict: bool) -> str:
        least = self._LEAST_OF_OTHERS
        if strict:
            least = self._LEAST_POWER if self.tensor.power_of_two else self._LEAST
        small = self.scales <= self._SMALL.get(self.tensor.scale.dtype, 2.0**-126)
        lost = (codes < least) & (sums > 0) & ~small
        if not bool(lost.any()):
            return ""
        worst = float((self.scales * self.largest / sums)[lost].max())
        return f"{int(lost.sum()):,} of {lost.numel():,} scales are too large, by up to {worst:.3g} times"

    def _of_rows(self, begin: int, end: int) -> torch.Tensor:
        """(end - begin, blocks across)."""
        assert self.block is not None
        row = torch.arange(begin, end)
        if len(self.shape) == 3:
            return self.scales[row // self.shape[1], row % self.shape[1] // self.block[0]]
        return self.scales[row // self.block[0]]


#: Name of a format → the proof's decoder of its weights.
DECODERS: Registry[type[Decoder]] = Registry(
    "decoder of the proof",
    {
        "fp8-block": "mla_tune.verification.decoders:Fp8Decoder",
        "fp8-tensor": "mla_tune.verification.decoders:Fp8Decoder",
    },
)
