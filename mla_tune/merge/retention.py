"""Delta retention: how much of the adapters' change survives when W + Δ is rounded to the dtype that is written.

W the base's weight   Δ the change that was asked for   Q rounding
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class DeltaRetention:
    """How much of a delta the rounding retained, as sums that add up over matrices."""

    #: ⟨Q(W+Δ)-W, Δ⟩
    inner: float = 0.0
    #: ‖Δ‖²
    delta2: float = 0.0
    #: ‖Q(W+Δ)-W‖²
    written2: float = 0.0
    #: ‖W‖²
    weight2: float = 0.0

    def add(self, other: DeltaRetention) -> None:
        """Add the sums of another matrix, in place."""
        self.inner += other.inner
        self.delta2 += other.delta2
        self.written2 += other.written2
        self.weight2 += other.weight2

    @property
    def relative(self) -> float | None:
        """‖Δ‖/‖W‖."""
        return (self.delta2 / self.weight2) ** 0.5 if self.weight2 else None

    @property
    def retained(self) -> float | None:
        """⟨Q(W+Δ)-W, Δ⟩/‖Δ‖²: 1 where nothing is lost; None where Δ is zero."""
        return self.inner / self.delta2 if self.delta2 else None

    @property
    def cosine(self) -> float | None:
        """Cosine between what was asked for and what was written; None where either is zero."""
        both = (self.delta2 * self.written2) ** 0.5
        return self.inner / both if both else None
