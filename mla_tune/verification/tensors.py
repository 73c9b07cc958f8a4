"""The proof of one tensor: recompute every number of it and compare it with the number that was written.

    W    the base's number
    S    the exact sum W + Σ w·s·B·A over the adapters with their weights w; for DoRA, its rows scaled to the magnitude
    O    the number in the output
    Δ    S - W, the adapter's change
    P    Σ|w·s·B||A|, which the error of a float sum is proportional to
    ulp  unit in the last place of the output's dtype

S is computed in torch one precision above what is written: float32 for 16-bit and FP8 outputs, float64 for float32.
With u the unit roundoff of a computation (2⁻²⁴ or 2⁻⁵³) and r the sum of the adapters' ranks, a dot product is off by
at most (r + 2)·u·P (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1).  `ExactSum.slack`
adds up this error of the merge's sum and of the sum computed here.

Rule for merge-absorb's own output (strict)
    |O - S| ≤ ulp/2 + slack: O is the nearest number.  Stochastic rounding: < ulp + slack, and no drift in one
    direction: |Σ(O - S)/ulp| ≤ 3√N + N/100 for N numbers.

Rule for the output of other tools
    |O - S| ≤ 1.5 ulp of the largest of |W|, |Δ|, |S| and |O|, + slack + 3ρP, with ρ the unit roundoff of the output's
    dtype.  Some tools round factors, product and delta to that dtype before they add (PEFT rounds the delta in
    places).  A DoRA is rounded four times (4 ulp), and each further adapter once more.

A whole adapter can be smaller than an ulp and so pass that rule without being merged at all.  So the output is also
projected onto the change:

    retained(O) = ⟨O - W, Δ⟩ / ‖Δ‖²   must be   retained(Q(S)) within 5 % of it + 6σ,   Q rounding to the nearest

It is 0 for an adapter that was dropped, and 1/√r of what it must be for an rsLoRA that was scaled by alpha/r.  O can
differ from Q(S) only where S lies so near to the border between two roundings that the tool's own error d carries it
across: σ² = Σ (ulp + d)²Δ² / ‖Δ‖⁴ over these numbers.  For stochastic rounding retained(O) must be 1, with
σ² = Σ f(1 - f)ulp²Δ² / ‖Δ‖⁴, f the part of an ulp that S lies above its lower neighbor.
"""

from __future__ import annotations

import math

import torch

from mla_tune.checkpoint.index import TensorRef, matrix_shape
from mla_tune.verification.dequantize import DequantizedCheckpoint, FactorCache
from mla_tune.verification.exact_sum import BlockUpdate, ExactSum
from mla_tune.verification.layout import ExpectedTensor, ProofRules
from mla_tune.verification.read import PRECISION, differing_positions
from mla_tune.verification.rounding import ChangeProjection, Rounding

#: Numbers computed at once: a few float32 arrays of this size fit into a core's cache.
_BLOCK = 1 << 19
#: Where fewer than one number in this many is not the nearest one, the quick way looks at those numbers alone.
_FEW = 32


class TensorCheck:
    """Compares one tensor of the output: call `add_rows` for all of its rows, then `failure`.

    Where nearly all numbers are the nearest ones, a quick way skips the variance σ².  If the tensor then fails the
    projection, that may be because σ² is missing: `is_undecided` is true, and the caller must repeat the check with
    `thorough=True`.
    """

    def __init__(
        self,
        out: TensorRef,
        expected: ExpectedTensor,
        base: DequantizedCheckpoint,
        merged: DequantizedCheckpoint,
        factors: FactorCache,
        rules: ProofRules,
        *,
        thorough: bool = False,
    ) -> None:
        """`out` is the tensor of `merged` to check; `base` decodes the bytes of `expected.source`."""
        self.out, self.expected, self.rules = out, expected, rules
        self.base, self.merged = base, merged
        self.dtype = torch.float64 if out.dtype in ("F32", "F64") else torch.float32
        key = merged.weight_key(out)
        self.decoder = merged.decoder(key)
        self.shape = merged.shape(out)
        self.thorough = thorough
        self.rounding = Rounding(out.dtype, self.decoder, self.dtype)
        self.sum = ExactSum(key, expected, factors, dtype=self.dtype, out_dtype=out.dtype, exact=rules.exact)
        #: The largest distance from S, less the error of float sums, in ulp.
        self.worst = 0.5 if rules.rounding == "nearest" else 0.0
        #: How many numbers are wrong, and a description of the first.
        self.wrong, self.example = 0, ""
        self.projection = ChangeProjection()
        self.is_projected = bool(expected.updates) and (not rules.strict or rules.rounding == "stochastic")
        self.variance_skipped = False
        #: Of each scale: the largest code, and the largest right number, where the weight is quantized in the output.
        self.largest = None if self.decoder is None else (self.decoder.zeros(), self.decoder.zeros())
        # Stochastic rounding: Σ (O - S)/ulp, Σ (|O| - |S|)/ulp, and the count of numbers in these sums.
        self.drift, self.drift_outward, self.drift_count = 0.0, 0.0, 0
        # Of other tools only what an adapter changes, or a quantized weight, may be rounded more than once.
        self.strict = rules.strict or not (
            expected.updates or base.is_quantized(expected.source) or self.decoder is not None
        )

    def add_rows(self, raw: torch.Tensor, source: torch.Tensor, begin: int, end: int) -> None:
        """Compare rows [begin, end): `raw` are their bytes in the output, `source` those of W."""
        rows = end - begin
        width, source_width = raw.numel() // rows, source.numel() // rows
        step = max(1, _BLOCK // max(1, matrix_shape(self.shape)[1]))
        for a in range(0, rows, step):
            b = min(a + step, rows)
            block = raw[a * width : b * width], source[a * source_width : b * source_width]
            self._add_block(*block, begin + a, begin + b)

    @property
    def is_undecided(self) -> bool:
        """Whether the quick way can't tell if the tensor is right, so that a `thorough` check must."""
        return self.variance_skipped and not self.wrong and self._projection_failure() != ""

    def failure(self) -> str:
        """Say what is wrong with the tensor; empty where nothing is."""
        if self.wrong:
            verb = "is" if self.wrong == 1 else "are"
            return f"{self.wrong:,} of {math.prod(self.shape):,} numbers {verb} wrong: {self.example}"
        drift = max(abs(self.drift), abs(self.drift_outward))
        # The variance of one number is at most ulp²/4, so 3√N ulp are 6σ.
        if drift > 3 * math.sqrt(self.drift_count) + 0.01 * self.drift_count:
            return f"is off by {drift / self.drift_count:.2f} ulp in one direction: not rounded stochastically"
        return self._projection_failure() or self._scale_failure()

    def _projection_failure(self) -> str:
        return self.projection.failure() if self.is_projected else ""

    def _scale_failure(self) -> str:
        """Say whether a scale is so large that numbers of its block were lost."""
        if self.decoder is None or self.largest is None or not self.expected.updates:
            return ""
        return self.decoder.bad_scales(*self.largest, strict=self.rules.strict)

    def _add_block(self, O_raw: torch.Tensor, W_raw: torch.Tensor, begin: int, end: int) -> None:
        W = self.base.numbers(self.expected.source, W_raw, begin, end, self.dtype)
        updates = self.sum.updates(begin, end)
        sums = self.sum.add(W, updates)
        S, factor = (sums, None) if not self.sum.is_dora else self.sum.scale_rows(sums, begin, end)
        if self._add_nearly_nearest(W, S, updates, O_raw, begin, end):
            return
        out = self.merged.numbers(self.out, O_raw, begin, end, self.dtype)
        unit = self.rounding.unit(begin, end)
        P = self.sum.magnitudes(updates, W)
        slack = self.sum.slack(W, sums, P)
        if factor is not None:
            slack = self.sum.scaled_slack(slack, sums=sums, S=S, factor=factor)
            P = P * factor.abs().unsqueeze(1)
        row, column = torch.arange(begin, end).unsqueeze(1), torch.arange(S.shape[1]).unsqueeze(0)
        slack = slack + self._error_of_other_tools(P)
        self._compare(W, S, out, unit, slack, row, column)
        if self.is_projected:
            self._project(W, S, out, unit, slack)
        self._track_largest(O_raw, S, begin, end)

    def _add_nearly_nearest(
        self, W: torch.Tensor, S: torch.Tensor, updates: list[BlockUpdate], O_raw: torch.Tensor, begin: int, end: int
    ) -> bool:
        """Compare a block the quick way; False where it is not one in which nearly all numbers are the nearest ones.

        The nearest number is right for every tool, and where O = Q(S) it adds the same to retained(O) and to
        retained(Q(S)).  So only the other numbers need bounds, which is much faster.
        """
        if self.sum.is_dora or self.thorough or self.rules.rounding != "nearest":
            return False
        unit = self.rounding.unit(begin, end)
        stored = self.rounding.stored(O_raw, end - begin)
        Q = self.rounding.nearest(S, unit)
        different = differing_positions(Q, stored)
        # A number that is infinite, or is rounded to infinity, equals itself; their sum is the cheapest test for that.
        fits = self.out.dtype != "F16" or float(S.abs().max()) <= torch.finfo(torch.float16).max
        if not fits or not math.isfinite(float(S.sum())) or different.size * _FEW >= S.numel():
            return False
        if self.is_projected:
            self.projection.add_rounded_to_nearest(W, (S - W).flatten(), self.rounding.numbers(Q, unit))
        if different.size:
            index = torch.from_numpy(different)
            row, column = index // S.shape[1], index % S.shape[1]
            w, s, q, out = (x.flatten()[index] for x in (W, S, Q, stored))
            at = None if unit is None else unit.flatten()[index]
            q, out = self.rounding.numbers(q, at), self.rounding.numbers(out, at)
            P = self.sum.magnitudes_at(updates, row, column)
            slack = self.sum.slack(w, s, P) + self._error_of_other_tools(P)
            self._compare(w, s, out, at, slack, begin + row, column)
            if self.is_projected:
                self.projection.add_difference(out - q, s - w)
                self.variance_skipped = True
        self._track_largest(O_raw, S, begin, end)
        return True

    def _error_of_other_tools(self, P: torch.Tensor) -> torch.Tensor | float:
        """Return 3ρP, what other tools may be off by beyond the last rounding; 0 for merge-absorb."""
        return 0.0 if self.rules.strict else 3 * 2.0**-self.rounding.bits * P

    def _track_largest(self, O_raw: torch.Tensor, S: torch.Tensor, begin: int, end: int) -> None:
        if self.decoder is not None and self.largest is not None:
            codes, sums = self.largest
            stored = self.decoder.codes(O_raw, end - begin).to(torch.float32)
            self.decoder.track_largest(stored, codes, begin, end)
            self.decoder.track_largest(S, sums, begin, end)

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
        """Count the numbers of `out` that are too far from S; `row` and `column` are their places in the tensor."""
        error = (out - S).abs()
        if self.strict:
            ulp = self.rounding.ulp(S.abs() + slack, unit)
            stochastic = self.rules.strict and self.rules.rounding == "stochastic"
            allowed = (1.0 if stochastic else 0.5) * ulp + slack
            # Sums in float32 have nothing left to round stochastically to float32.
            if stochastic and (self.rules.exact or self.out.dtype not in ("F32", "F64")):
                self.drift += float(((out - S) / ulp).sum())
                self.drift_outward += float(((out.abs() - S.abs()) / ulp).sum())
                self.drift_count += S.numel()
        else:
            largest = torch.maximum(torch.maximum(W.abs(), S.abs()), torch.maximum((S - W).abs(), out.abs()))
            ulp = self.rounding.ulp(largest, unit)
            # Several adapters may be merged one after the other, each sum rounded.
            roundings = 4.0 if self.sum.is_dora else 0.5 + max(1, len(self.expected.updates))
            allowed = roundings * ulp + slack
        bad = ~(error <= allowed)  # a NaN is bad
        self.worst = max(self.worst, float(((error - slack) / ulp).nan_to_num(math.inf).max()))
        count = int(bad.sum())
        if count and not self.wrong:
            i = tuple(bad.nonzero()[0].tolist())
            at = f"[{int(row.expand_as(bad)[i])}, {int(column.expand_as(bad)[i])}]"
            found, right, old = (float(x[i]) for x in (out, S, W))
            self.example = f"at {at} it is {found:.6g}, and {right:.6g} is right (base: {old:.6g})"
        self.wrong += count

    def _project(
        self, W: torch.Tensor, S: torch.Tensor, out: torch.Tensor, unit: torch.Tensor | None, slack: torch.Tensor
    ) -> None:
        """Add a block to the projection, with the variance that the rounding of a right tool has."""
        D = (S - W).double()
        Q = self.rounding.nearest(S, unit).to(self.dtype)
        Q = (Q if unit is None else Q * unit).double()
        ulp = self.rounding.ulp(S, unit).double()
        off = (Q - S.double()).abs()
        if self.rules.rounding == "stochastic":
            self.projection.add_stochastic(out=out, W=W, D=D, off=off, ulp=ulp, slack=slack)
            return
        rho = 2.0 ** -PRECISION["BF16" if unit is not None else self.out.dtype][0]
        if self.sum.is_dora:
            # Four roundings, of which that of the row's factor moves the whole row.
            variance = float((4 * ulp * ulp / 3 * (D * D)).sum())
            variance += float((2 * rho * (S.double() * D).sum(1)).square().sum())
        else:
            d = slack.double() + rho * D.abs() + ulp / 2 * (len(self.expected.updates) - 1)
            if self.base.is_quantized(self.expected.source):
                d = d + rho * W.double().abs()  # other tools round the dequantized weight to bfloat16 first
            near_border = ulp / 2 - off <= d
            variance = float((near_border * (ulp + d) ** 2 * (D * D)).sum())
        self.projection.add_nearest(out=out, W=W, D=D, Q=Q, variance=variance)
