"""The proof of one tensor: every number of it, computed again.

    W the base's number   P = Σ|w·s·B||A|, what an error of a sum is measured by   S the exact sum, for DoRA its rows
    scaled to the magnitude   O the number in the output   Δ = S - W   ulp unit in the last place of the output's dtype

S is computed in torch one precision above what is written: float32 for 16-bit and FP8 outputs, float64 for float32.
With u the unit roundoff of a computation (2⁻²⁴, 2⁻⁵³) and r its ranks, a dot product is off by at most (r + 2)·u·P
(Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1); `ExactSum.slack` sums
this up for both sides.

Strict    |O - S| ≤ ulp/2 + slack, or < ulp + slack for stochastic rounding.
          Then |Σ(O - S)/ulp| ≤ 3√N + N/100 too, for N numbers: no drift.
Others    |O - S| ≤ 1.5 ulp of the largest of |W|, |Δ|, |S| and |O|, + slack + 3ρP.  ρ is the unit roundoff of the
          output's dtype: some tools round factors, product and delta to it (PEFT the delta, in places) and add then;
          a DoRA is rounded four times (4 ulp), and each further adapter once more.

A whole adapter can hide below an ulp, so there is the projection onto the change as well:

    kept(O) = ⟨O - W, Δ⟩ / ‖Δ‖²   must be   kept(Q(S)) within 5 % of it + 6σ

Q rounds to the nearest.  O can differ from Q(S) only where S lies so near to a border between two roundings that the
tool's own errors d carry it across: σ² = Σ (ulp + d)²Δ² / ‖Δ‖⁴ over these numbers.  An adapter that was dropped has
kept = 0, an rsLoRA scaled by alpha/r has 1/√r.  For stochastic rounding kept(O) = 1 with σ² = Σ f(1 - f)ulp²Δ² / ‖Δ‖⁴,
f the part of an ulp that S lies above its lower neighbor.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from mla_tune.checkpoint.index import TensorRef, matrix_shape
from mla_tune.verification.dequantize import FactorCache, Values
from mla_tune.verification.exact_sum import ExactSum, Part
from mla_tune.verification.layout import Expected, Rules
from mla_tune.verification.read import PRECISION, TORCH, ulp_of

#: Numbers computed at once: a few float32 arrays of this size fit into a core's cache.
_BLOCK = 1 << 19
#: Where fewer than one number in this many differs from the nearest one, those are looked at alone.
_FEW = 32


class TensorCheck:
    """One tensor of the output, given piece by piece; then `verdict`.

    Where nearly all numbers are the nearest ones, σ is not computed.  Without it a right tensor may not be told from a
    wrong one: then `unsure` is true, there is no verdict, and the tensor is to be given to a `thorough` check.
    """

    def __init__(
        self,
        out: TensorRef,
        expected: Expected,
        values: Values,
        out_values: Values,
        factors: FactorCache,
        rules: Rules,
        thorough: bool = False,
    ) -> None:
        self.out, self.expected, self.rules = out, expected, rules
        self.values, self.out_values, self.factors = values, out_values, factors
        self.dtype = torch.float64 if out.dtype in ("F32", "F64") else torch.float32
        name = out_values.name(out)
        self.quant = out_values.decoder(name)
        self.shape = out_values.shape(out)
        self.thorough, self.skipped = thorough, False
        self.exact_sum = ExactSum(name, expected, factors, dtype=self.dtype, out_dtype=out.dtype, exact=rules.exact)
        self.dora = self.exact_sum.dora
        self.worst, self.wrong, self.example = 0.5 if rules.rounding == "nearest" else 0.0, 0, ""
        self.got = self.due = self.delta2 = self.spread = 0.0
        self.projects = bool(expected.updates) and (not rules.strict or rules.rounding == "stochastic")
        #: The largest code and the largest right number of each scale, where the weight was quantized anew.
        self.largest = None if self.quant is None else (self.quant.blocks(), self.quant.blocks())
        # Stochastic: Σ (O - S)/ulp, Σ (|O| - |S|)/ulp, and of how many numbers.
        self.drift, self.outward, self.drawn = 0.0, 0.0, 0
        # Only what an adapter changes may be rounded otherwise than once to the nearest, by other tools too.
        quantized = values.name(expected.source) in values.quantized
        self.strict = rules.strict or not (expected.updates or quantized or self.quant is not None)

    def piece(self, raw: torch.Tensor, source: torch.Tensor, begin: int, end: int) -> None:
        """Bytes of rows [begin, end) of the output and of the source."""
        rows = end - begin
        width, source_width = raw.numel() // rows, source.numel() // rows
        step = max(1, _BLOCK // max(1, matrix_shape(self.shape)[1]))
        for a in range(0, rows, step):
            b = min(a + step, rows)
            block = raw[a * width : b * width], source[a * source_width : b * source_width]
            self._block(*block, begin + a, begin + b)

    @property
    def unsure(self) -> bool:
        """Whether the quick check can not tell a right tensor from a wrong one: give it to a `thorough` one."""
        return self.skipped and not self.wrong and self._off_projection() != ""

    def verdict(self) -> str:
        """What is wrong with the tensor; empty where nothing is."""
        if self.wrong:
            verb = "is" if self.wrong == 1 else "are"
            return f"{self.wrong:,} of {math.prod(self.shape):,} numbers {verb} wrong: {self.example}"
        drift = max(abs(self.drift), abs(self.outward))
        if drift > 3 * math.sqrt(self.drawn) + 0.01 * self.drawn:  # a draw has a variance of ulp²/4 at most: 6σ
            return f"is off by {drift / self.drawn:.2f} ulp in one direction: not rounded stochastically"
        return self._off_projection() or self._scales()

    def _off_projection(self) -> str:
        if not self.projects or not self.delta2:
            return ""
        got, due = self.got / self.delta2, self.due / self.delta2
        tolerance = 0.05 * abs(due) + 6 * math.sqrt(self.spread) / self.delta2
        if abs(got - due) > tolerance:
            return f"holds {got:.1%} of the adapter's change, and {due:.1%} ± {tolerance:.1%} is right"
        return ""

    def _block(self, O_raw: torch.Tensor, W_raw: torch.Tensor, begin: int, end: int) -> None:
        W = self.values.of(self.expected.source, W_raw, begin, end, self.dtype)
        parts = self.exact_sum.parts(begin, end)
        sums = self.exact_sum.sums(W, parts)
        S, factor = (sums, None) if not self.dora else self.exact_sum.scaled(sums, begin, end)
        if self._nearly_all_nearest(W, S, parts, O_raw, begin, end):
            return
        out = self.out_values.of(self.out, O_raw, begin, end, self.dtype)
        unit = None if self.quant is None else self.quant.unit(begin, end).to(self.dtype)
        P = self.exact_sum.magnitudes(parts, W)
        slack = self.exact_sum.slack(W, sums, P)
        if factor is not None:
            slack = self.exact_sum.scaled_slack(S, sums, slack, factor)
            P = P * factor.abs().unsqueeze(1)
        row, column = torch.arange(begin, end).unsqueeze(1), torch.arange(S.shape[1]).unsqueeze(0)
        slack = slack + self._of_others(P)
        self._compare(W, S, out, unit, slack, row, column)
        if self.projects:
            self._project(W, S, out, unit, slack)
        self._note_largest(O_raw, S, begin, end)

    def _nearly_all_nearest(
        self, W: torch.Tensor, S: torch.Tensor, parts: list[Part], O_raw: torch.Tensor, begin: int, end: int
    ) -> bool:
        """Whether nearly all numbers are the nearest ones: then the others are looked at alone, which is much faster.

        The nearest is right for every tool, and where O = Q it adds the same to kept(O) and to kept(Q(S)).
        """
        if self.dora or self.thorough or self.rules.rounding != "nearest":
            return False
        unit = None if self.quant is None else self.quant.unit(begin, end).to(self.dtype)
        codes = O_raw.view(TORCH[self.out.dtype]) if self.quant is None else self.quant.codes(O_raw, end - begin)
        Q = self._nearest(S, unit)
        different = _different(Q, codes)
        # A number that is infinite, or is rounded to infinity, equals itself; a sum is the cheapest look for it.
        fits = self.out.dtype != "F16" or float(S.abs().max()) <= torch.finfo(torch.float16).max
        if not fits or not math.isfinite(float(S.sum())) or different.size * _FEW >= S.numel():
            return False
        if self.projects:
            D = (S - W).flatten()
            due = float(torch.dot(self._numbers(Q, unit).sub_(W).flatten(), D))
            self.delta2 += float(torch.dot(D, D))
            self.due += due
            self.got += due
        if different.size:
            index = torch.from_numpy(different)
            row, column = index // S.shape[1], index % S.shape[1]
            w, s, q, out = (x.flatten()[index] for x in (W, S, Q, codes))
            at = None if unit is None else unit.flatten()[index]
            q, out = self._numbers(q, at), self._numbers(out, at)
            P = self.exact_sum.magnitudes_at(parts, row, column)
            self._compare(w, s, out, at, self.exact_sum.slack(w, s, P) + self._of_others(P), begin + row, column)
            if self.projects:
                self.got += float(torch.dot(out - q, s - w))
                self.skipped = True  # σ, that is
        self._note_largest(O_raw, S, begin, end)
        return True

    def _numbers(self, codes: torch.Tensor, unit: torch.Tensor | None) -> torch.Tensor:
        numbers = codes.to(self.dtype, copy=True)
        return numbers if unit is None else numbers.mul_(unit)

    def _nearest(self, S: torch.Tensor, unit: torch.Tensor | None) -> torch.Tensor:
        """The nearest number of the output's dtype, or the nearest code of a quantized weight."""
        if self.quant is None or unit is None:
            return S.to(TORCH[self.out.dtype])
        return self.quant.nearest(S / unit)

    def _of_others(self, P: torch.Tensor) -> torch.Tensor | float:
        """What other tools may be off by beyond the last rounding."""
        bits = PRECISION[self.out.dtype][0] if self.quant is None else self.quant.bits
        return 0.0 if self.rules.strict else 3 * 2.0**-bits * P

    def _note_largest(self, O_raw: torch.Tensor, S: torch.Tensor, begin: int, end: int) -> None:
        if self.quant is not None and self.largest is not None:
            codes, sums = self.largest
            self.quant.note(self.quant.codes(O_raw, end - begin).to(torch.float32), codes, begin, end)
            self.quant.note(S, sums, begin, end)

    def _compare(
        self,
        W: torch.Tensor,
        S: torch.Tensor,
        out: torch.Tensor,
        unit: torch.Tensor | None,
        slack: torch.Tensor,
        row: torch.Tensor,
        column: torch.Tensor,
    ) -> None:
        error = (out - S).abs()
        if self.strict:
            ulp = self._ulp(S.abs() + slack, unit)
            stochastic = self.rules.strict and self.rules.rounding == "stochastic"
            allowed = (1.0 if stochastic else 0.5) * ulp + slack
            # Sums in float32 have nothing left to round stochastically to float32.
            if stochastic and (self.rules.exact or self.out.dtype not in ("F32", "F64")):
                self.drift += float(((out - S) / ulp).sum())
                self.outward += float(((out.abs() - S.abs()) / ulp).sum())
                self.drawn += S.numel()
        else:
            largest = torch.maximum(torch.maximum(W.abs(), S.abs()), torch.maximum((S - W).abs(), out.abs()))
            ulp = self._ulp(largest, unit)
            # One adapter after the other is rounded in between.
            allowed = (4.0 if self.dora else 0.5 + max(1, len(self.expected.updates))) * ulp + slack
        bad = ~(error <= allowed)  # a NaN is bad
        self.worst = max(self.worst, float(((error - slack) / ulp).nan_to_num(math.inf).max()))
        count = int(bad.sum())
        if count and not self.wrong:
            i = tuple(bad.nonzero()[0].tolist())
            at = f"[{int(row.expand_as(bad)[i])}, {int(column.expand_as(bad)[i])}]"
            found, right, old = (float(x[i]) for x in (out, S, W))
            self.example = f"at {at} it is {found:.6g}, and {right:.6g} is right (base: {old:.6g})"
        self.wrong += count

    def _ulp(self, x: torch.Tensor, unit: torch.Tensor | None) -> torch.Tensor:
        if self.quant is None or unit is None:
            return ulp_of(x, self.out.dtype)
        return self.quant.step(x / unit) * unit

    def _project(
        self, W: torch.Tensor, S: torch.Tensor, out: torch.Tensor, unit: torch.Tensor | None, slack: torch.Tensor
    ) -> None:
        D = (S - W).double()
        Q = self._nearest(S, unit).to(self.dtype)
        Q = (Q if unit is None else Q * unit).double()
        ulp = self._ulp(S, unit).double()
        off = (Q - S.double()).abs()
        D2 = D * D
        self.delta2 += float(D2.sum())
        self.got += float(((out - W).double() * D).sum())
        if self.rules.rounding == "stochastic":
            self.due += float(D2.sum())
            self.spread += float((off * (ulp - off).clamp_min(0) * D2).sum()) + float((slack.double() ** 2 * D2).sum())
            return
        self.due += float(((Q - W.double()) * D).sum())
        rho = 2.0 ** -PRECISION["BF16" if unit is not None else self.out.dtype][0]
        d = slack.double() + rho * D.abs() + ulp / 2 * (len(self.expected.updates) - 1)
        if self.values.name(self.expected.source) in self.values.quantized:
            d = d + rho * W.double().abs()  # other tools round the dequantized weight to bfloat16 first
        if self.dora:
            # Four roundings, of which that of the row's factor moves the whole row.
            self.spread += float((4 * ulp * ulp / 3 * D2).sum())
            self.spread += float((2 * rho * (S.double() * D).sum(1)).square().sum())
            return
        near = ulp / 2 - off <= d
        self.spread += float((near * (ulp + d) ** 2 * D2).sum())

    def _scales(self) -> str:
        """Whether a scale is so large that numbers of its block were lost."""
        if self.quant is None or self.largest is None or not self.expected.updates:
            return ""
        return self.quant.bad_scales(*self.largest, strict=self.rules.strict)


def _different(wanted: torch.Tensor, raw: torch.Tensor) -> np.ndarray:
    """Where, as flat positions, the bytes of numbers differ.  Words of 8 bytes are compared: torch takes 20 times as
    long over numbers of 16 bits."""
    kind = np.dtype(f"u{wanted.element_size()}")
    a, b = (x.contiguous().view(torch.uint8).numpy().reshape(-1) for x in (wanted, raw))
    each = 8 // kind.itemsize
    if a.size % 8:
        return np.flatnonzero(a.view(kind) != b.view(kind))
    words = np.flatnonzero(a.view(np.uint64) != b.view(np.uint64))
    places = (words[:, None] * each + np.arange(each)).reshape(-1)
    return places[a.view(kind)[places] != b.view(kind)[places]]
