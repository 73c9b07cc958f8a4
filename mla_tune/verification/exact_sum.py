"""The exact sum of one tensor, base plus all updates, and how far float sums may lie from it.

See `tensors` for the symbols and the bound.
"""

from __future__ import annotations

import re

import torch

from mla_tune.arch.site import Site
from mla_tune.errors import InputError
from mla_tune.verification.dequantize import FactorCache
from mla_tune.verification.layout import Expected
from mla_tune.verification.read import read_whole

#: Adapter methods that the proof recomputes by itself: W + Σ s·B·A, and DoRA's rows scaled to their magnitudes.
RECOMPUTED = {"lora", "rslora", "dora"}
#: Rows of a block, and A (r, in), scaled, and B (rows, r) that reach them.
Part = tuple[slice, torch.Tensor, torch.Tensor]


class ExactSum:
    """S of one tensor, some rows at a time."""

    def __init__(
        self,
        name: str,
        expected: Expected,
        factors: FactorCache,
        *,
        dtype: torch.dtype,
        out_dtype: str,
        exact: bool,
    ) -> None:
        self.expected, self.factors, self.dtype = expected, factors, dtype
        self.out_dtype, self.exact = out_dtype, exact
        self.dora = any(delta.method.name == "dora" for delta, _ in expected.updates)
        unknown = {delta.method.name for delta, _ in expected.updates} - RECOMPUTED
        if unknown:
            raise InputError(f"{name}: the proof can't recompute {', '.join(sorted(unknown))} (`RECOMPUTED`)")
        self.ranks = sum(delta.rank for delta, _ in expected.updates)
        self.first_row, self.expert = _place(name, expected.site)
        self.ours = 2.0**-53 if self.dtype == torch.float64 else 2.0**-24
        self.theirs = 2.0**-53 if exact else 2.0**-24

    def parts(self, begin: int, end: int) -> list[Part]:
        """(rows of the block, scaled A, B of these rows) of each update that reaches rows [begin, end)."""
        if self.expected.is_bias:
            result = []
            for delta, weight in self.expected.updates:
                assert delta.bias is not None
                bias = read_whole(delta.bias, self.dtype) * (delta.scale * weight)
                result.append((slice(0, 1), bias.unsqueeze(0), torch.ones(1, 1, dtype=self.dtype)))
            return result
        result = []
        for delta, weight in self.expected.updates:
            assert self.expected.site is not None
            expert, row = self.expert, self.first_row + begin
            if self.expected.site.is_experts and expert is None:
                expert, row = divmod(begin, self.expected.site.shape[0])
            if delta.expert is not None and delta.expert != expert:
                continue
            low, high = delta.rows or (0, self.expected.site.shape[0])
            first, last = max(row, low), min(row + end - begin, high)
            if first < last:
                A, B = self.factors.of(delta, weight, self.dtype)
                which = expert if delta.experts > 1 and expert is not None else 0
                result.append((slice(first - row, last - row), A[which], B[which, first - low : last - low]))
        return result

    def sums(self, W: torch.Tensor, parts: list[Part]) -> torch.Tensor:
        S = W
        for rows, A, B in parts:
            if len(B) == len(W):
                S = torch.addmm(S, B, A)
            else:
                S = S.clone() if S is W else S
                S[rows] += B @ A
        return S

    def scaled(self, sums: torch.Tensor, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows scaled to the magnitude, the factor of each row)."""
        (delta, _), *_ = self.expected.updates
        (magnitude,) = delta.vectors
        first = self.first_row + begin - (delta.rows[0] if delta.rows else 0)
        m = read_whole(magnitude, self.dtype)[first : first + end - begin]
        factor = m / torch.linalg.vector_norm(sums, dim=1)
        return sums * factor.unsqueeze(1), factor

    def magnitudes(self, parts: list[Part], W: torch.Tensor) -> torch.Tensor:
        P = torch.zeros_like(W)
        for rows, A, B in parts:
            P[rows] += B.abs() @ A.abs()
        return P

    def magnitudes_at(self, parts: list[Part], row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """The same at single places of the block."""
        P = torch.zeros(len(row), dtype=self.dtype)
        for rows, A, B in parts:
            inside = (row >= rows.start) & (row < rows.stop)
            at = (row - rows.start).clamp(0, len(B) - 1)
            P += inside * (B[at].abs() * A[:, column].T.abs()).sum(1)
        return P

    def slack(self, W: torch.Tensor, S: torch.Tensor, P: torch.Tensor) -> torch.Tensor:
        """How far two sums, the one here and the one that was rounded, may lie from each other."""
        k = len(self.expected.updates)
        slack = P * ((self.ranks + 3 + 2 * k) * (self.ours + self.theirs))
        if k:
            slack = slack + W.abs() * ((self.ranks + 3) * self.ours)
        if self.out_dtype != "F32" or self.exact or self.dora:
            slack = slack + S.abs() * (2 * self.theirs)  # the sum was rounded once before it was rounded to the dtype
        if self.expected.source.dtype not in ("F32", "BF16", "F16"):
            slack = slack + W.abs() * (self.ours + self.theirs)  # code · scale
        return slack

    def scaled_slack(
        self, S: torch.Tensor, sums: torch.Tensor, slack: torch.Tensor, factor: torch.Tensor
    ) -> torch.Tensor:
        # ‖S‖ is off by (n/2 + 2)u of itself and by what its numbers are off; the factor and the product round.
        error = torch.linalg.vector_norm(slack, dim=1) / torch.linalg.vector_norm(sums, dim=1)
        share = error + (S.shape[1] / 2 + 6) * (self.ours + self.theirs)
        return slack * factor.abs().unsqueeze(1) + S.abs() * share.unsqueeze(1)


def _place(key: str, site: Site | None) -> tuple[int, int | None]:
    """(first row of the site's matrix, expert) that a tensor holds."""
    match = re.search(r"\.experts\.(\d+)\.(\w+)\.weight$", key)
    if match is None or site is None or not site.is_experts:
        return 0, None
    return (site.shape[0] // 2 if match[2] in ("up_proj", "w3") else 0), int(match[1])
