"""Rounding to the dtype, or to the codes, of one output tensor, and the projection of its numbers onto the change.

`tensors` explains the symbols and the rules.
"""

from __future__ import annotations

import math

import torch

from mla_tune.verification.decoders import Decoder
from mla_tune.verification.read import PRECISION, TORCH_DTYPES, ulp_of


class Rounding:
    """The numbers that an output tensor can hold: those of its dtype, or code · unit for a quantized weight.

    `unit`, an argument of the methods, is what one step of the codes is worth for each number (`Decoder.unit`); None
    for a tensor that is not quantized.
    """

    def __init__(self, out_dtype: str, decoder: Decoder | None, dtype: torch.dtype) -> None:
        """`out_dtype` is the dtype on disk, by its name in safetensors; `dtype` the one that is computed in."""
        self.out_dtype, self.decoder, self.dtype = out_dtype, decoder, dtype
        #: Significant bits of a number or code.
        self.bits = PRECISION[out_dtype][0] if decoder is None else decoder.bits

    def unit(self, begin: int, end: int) -> torch.Tensor | None:
        """Return what a code is worth in rows [begin, end), for each number; None where nothing is quantized."""
        return None if self.decoder is None else self.decoder.unit(begin, end).to(self.dtype)

    def stored(self, raw: torch.Tensor, rows: int) -> torch.Tensor:
        """View the bytes of `rows` rows as the numbers or codes that are stored."""
        return raw.view(TORCH_DTYPES[self.out_dtype]) if self.decoder is None else self.decoder.codes(raw, rows)

    def nearest(self, S: torch.Tensor, unit: torch.Tensor | None) -> torch.Tensor:
        """Round S to the nearest stored number or code."""
        if self.decoder is None or unit is None:
            return S.to(TORCH_DTYPES[self.out_dtype])
        return self.decoder.nearest(S / unit)

    def numbers(self, stored: torch.Tensor, unit: torch.Tensor | None) -> torch.Tensor:
        """Convert stored numbers or codes to numbers that can be computed with."""
        numbers = stored.to(self.dtype, copy=True)
        return numbers if unit is None else numbers.mul_(unit)

    def ulp(self, x: torch.Tensor, unit: torch.Tensor | None) -> torch.Tensor:
        """Return the unit in the last place at |x|: for codes, the distance of two neighbors times `unit`."""
        if self.decoder is None or unit is None:
            return ulp_of(x, self.out_dtype)
        return self.decoder.step(x / unit) * unit


class ChangeProjection:
    """How much of the adapter's change an output tensor holds: retained(O) against what it must be.

    Sums over all blocks of a tensor; then `failure` judges.
    """

    def __init__(self) -> None:
        #: ⟨O - W, Δ⟩ of the output, and ⟨Q(S) - W, Δ⟩, or ‖Δ‖² for stochastic rounding, of a right output.
        self.found = self.right = 0.0
        #: ‖Δ‖².
        self.delta_squared = 0.0
        #: σ²·‖Δ‖⁴: the variance of `found` for an output that is right.
        self.variance = 0.0

    def add_rounded_to_nearest(self, W: torch.Tensor, D: torch.Tensor, Q: torch.Tensor) -> None:
        """Add a block whose numbers are Q(S), flat; Q is overwritten.  `add_difference` then adds the exceptions."""
        right = float(torch.dot(Q.sub_(W).flatten(), D))
        self.delta_squared += float(torch.dot(D, D))
        self.right += right
        self.found += right

    def add_difference(self, difference: torch.Tensor, D: torch.Tensor) -> None:
        """Add the single numbers that differ from Q(S) by `difference`; D is Δ there."""
        self.found += float(torch.dot(difference, D))

    def add_stochastic(
        self, *, out: torch.Tensor, W: torch.Tensor, D: torch.Tensor, off: torch.Tensor, ulp: torch.Tensor,
        slack: torch.Tensor,
    ) -> None:  # fmt: skip
        """Add a block that was rounded stochastically; `off` is |Q(S) - S|.  D, off and ulp are float64."""
        D2 = D * D
        self.delta_squared += float(D2.sum())
        self.found += float(((out - W).double() * D).sum())
        self.right += float(D2.sum())
        self.variance += float((off * (ulp - off).clamp_min(0) * D2).sum()) + float((slack.double() ** 2 * D2).sum())

    def add_nearest(
        self, *, out: torch.Tensor, W: torch.Tensor, D: torch.Tensor, Q: torch.Tensor, variance: float
    ) -> None:
        """Add a block that was rounded to the nearest, with its part of the variance.  D and Q are float64."""
        self.delta_squared += float((D * D).sum())
        self.found += float(((out - W).double() * D).sum())
        self.right += float(((Q - W.double()) * D).sum())
        self.variance += variance

    def failure(self) -> str:
        """Say how much of the change the output holds, if that is not what it must hold; empty if it is."""
        if not self.delta_squared:
            return ""
        found, right = self.found / self.delta_squared, self.right / self.delta_squared
        tolerance = 0.05 * abs(right) + 6 * math.sqrt(self.variance) / self.delta_squared
        if abs(found - right) > tolerance:
            return f"holds {found:.1%} of the adapter's change; {right:.1%} ± {tolerance:.1%} is right"
        return ""
