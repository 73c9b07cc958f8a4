"""The exact sum of one tensor, W + Σ w·s·B·A or a DoRA's rows, recomputed in torch, and the error of float sums.

`tensors` explains the symbols and cites the source of the error bound.
"""

from __future__ import annotations

import re

import torch

from mla_tune.arch.site import Site
from mla_tune.errors import InputError
from mla_tune.verification.dequantize import FactorCache
from mla_tune.verification.layout import ExpectedTensor
from mla_tune.verification.read import read_tensor

#: Adapter methods that the proof can recompute: W + Σ s·B·A, and DoRA, which scales the rows of that sum.
RECOMPUTED = {"lora", "rslora", "dora"}
#: One update of a block of rows: which rows of the block it changes, A (r, in) times its scale, and B of these rows.
BlockUpdate = tuple[slice, torch.Tensor, torch.Tensor]


class ExactSum:
    """Computes S, and the bound on its error, for blocks of rows of one tensor.

    Raises `InputError` when built for an adapter method that is not in `RECOMPUTED`.
    """

    def __init__(
        self,
        key: str,
        expected: ExpectedTensor,
        factors: FactorCache,
        *,
        dtype: torch.dtype,
        out_dtype: str,
        exact: bool,
    ) -> None:
        """`key` is the weight's key.  `dtype` is the precision of this computation, `out_dtype` the dtype written.

        `exact` says that the merge added in float64.
        """
        self.expected, self.factors, self.dtype = expected, factors, dtype
        self.out_dtype, self.exact = out_dtype, exact
        methods = {delta.method.name for delta, _ in expected.updates}
        self.is_dora = "dora" in methods
        if methods - RECOMPUTED:
            raise InputError(f"{key}: the proof can't recompute {', '.join(sorted(methods - RECOMPUTED))}")
        self.ranks = sum(delta.rank for delta, _ in expected.updates)
        self.first_row, self.expert = _rows_on_disk(key, expected.site)
        #: Unit roundoff of the sums computed here, and of those that the merge computed.
        self.u_here = 2.0**-53 if self.dtype == torch.float64 else 2.0**-24
        self.u_merge = 2.0**-53 if exact else 2.0**-24

    def updates(self, begin: int, end: int) -> list[BlockUpdate]:
        """Return the updates that change rows [begin, end) of the tensor."""
        result = []
        if self.expected.is_bias:
            for delta, weight in self.expected.updates:
                assert delta.bias is not None
                bias = read_tensor(delta.bias, self.dtype) * (delta.scale * weight)
                result.append((slice(0, 1), bias.unsqueeze(0), torch.ones(1, 1, dtype=self.dtype)))
            return result
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
                A, B = self.factors.get(delta, weight, self.dtype)
                index = expert if delta.experts > 1 and expert is not None else 0
                result.append((slice(first - row, last - row), A[index], B[index, first - low : last - low]))
        return result

    def add(self, W: torch.Tensor, updates: list[BlockUpdate]) -> torch.Tensor:
        """Return W + Σ B·A for a block W (rows, in); W itself where there is no update."""
        S = W
        for rows, A, B in updates:
            if len(B) == len(W):
                S = torch.addmm(S, B, A)
            else:
                S = S.clone() if S is W else S
                S[rows] += B @ A
        return S

    def scale_rows(self, sums: torch.Tensor, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale rows [begin, end) of a DoRA's sum to its magnitudes; returns them and the factor of each row."""
        (delta, _), *_ = self.expected.updates
        (magnitude,) = delta.vectors
        first = self.first_row + begin - (delta.rows[0] if delta.rows else 0)
        m = read_tensor(magnitude, self.dtype)[first : first + end - begin]
        factor = m / torch.linalg.vector_norm(sums, dim=1)
        return sums * factor.unsqueeze(1), factor

    def magnitudes(self, updates: list[BlockUpdate], W: torch.Tensor) -> torch.Tensor:
        """Return P = Σ|B||A| of a block, in the shape of W."""
        P = torch.zeros_like(W)
        for rows, A, B in updates:
            P[rows] += B.abs() @ A.abs()
        return P

    def magnitudes_at(self, updates: list[BlockUpdate], row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Return P at single positions (row, column) of the block."""
        P = torch.zeros(len(row), dtype=self.dtype)
        for rows, A, B in updates:
            inside = (row >= rows.start) & (row < rows.stop)
            at = (row - rows.start).clamp(0, len(B) - 1)
            P += inside * (B[at].abs() * A[:, column].T.abs()).sum(1)
        return P

    def slack(self, W: torch.Tensor, S: torch.Tensor, P: torch.Tensor) -> torch.Tensor:
        """Return how far the sum computed here and the sum that the merge rounded may lie from each other."""
        count = len(self.expected.updates)
        slack = P * ((self.ranks + 3 + 2 * count) * (self.u_here + self.u_merge))
        if count:
            slack = slack + W.abs() * ((self.ranks + 3) * self.u_here)
        if self.out_dtype != "F32" or self.exact or self.is_dora:
            slack = slack + S.abs() * (2 * self.u_merge)  # the sum was rounded once before it was rounded to the dtype
        if self.expected.source.dtype not in ("F32", "BF16", "F16"):
            slack = slack + W.abs() * (self.u_here + self.u_merge)  # code · scale
        return slack

    def scaled_slack(
        self, slack: torch.Tensor, *, sums: torch.Tensor, S: torch.Tensor, factor: torch.Tensor
    ) -> torch.Tensor:
        """Return the `slack` of a DoRA's `sums` after its rows were multiplied by `factor`, which gave `S`."""
        # ‖sums‖ is off by (n/2 + 2)u of itself and by the slack of its numbers; the factor and the product round too.
        error = torch.linalg.vector_norm(slack, dim=1) / torch.linalg.vector_norm(sums, dim=1)
        share = error + (S.shape[1] / 2 + 6) * (self.u_here + self.u_merge)
        return slack * factor.abs().unsqueeze(1) + S.abs() * share.unsqueeze(1)


def _rows_on_disk(key: str, site: Site | None) -> tuple[int, int | None]:
    """Return (first row of the site's matrix, expert) that the tensor `key` holds; (0, None) for a whole site."""
    match = re.search(r"\.experts\.(\d+)\.(\w+)\.weight$", key)
    if match is None or site is None or not site.is_experts:
        return 0, None
    return (site.shape[0] // 2 if match[2] in ("up_proj", "w3") else 0), int(match[1])
