"""The spike guard: a step whose loss or gradient norm leaves its running band is skipped.

The upper end of a band is the median of the last `window` accepted steps plus `width` robust standard deviations
(1.4826 times the median absolute deviation, which is σ for a normal distribution).  A spike lies above it, or is no
finite number.  A skipped step changes neither weights nor the optimizer's moments, and its figures stay out of the
band.  After `patience` skipped steps in a row every learning rate is multiplied by `cut` for the rest of the run, and
the band begins anew: a loss that stays on another level is a new level, not a spike.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any

from mla_tune.errors import WorkError
from mla_tune.recipe.schema import SpikeSection

#: σ of a normal distribution, over its median absolute deviation.
SIGMA = 1.4826
#: The band's σ is at least this share of the median: a loss that hardly moves is no reason to skip.
LEAST = 0.02
#: Steps that a band needs at least: the deviation of fewer says little, and gradients grow while B leaves 0.
FEWEST = 8


@dataclass(frozen=True, slots=True)
class Spike:
    """A step that is skipped."""

    #: The figure that left its band: `loss` or `grad_norm`.
    what: str
    #: Its value.
    value: float
    #: The upper end of its band.
    limit: float
    #: Factor on every learning rate from here on, where it was one skipped step too many in a row.
    cut: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what metrics.jsonl says of it; `cut` stands beside it there."""
        found: dict[str, Any] = {"what": self.what, "value": self.value, "limit": self.limit}
        return found


class SpikeGuard:
    """Keeps the bands of loss and gradient norm, and the counts.

    `state` and `load_state` carry it over a resume, so that a resumed run skips the same steps.
    """

    def __init__(self, section: SpikeSection) -> None:
        self.section = section
        self.values: dict[str, deque[float]] = {
            "loss": deque(maxlen=section.window),
            "grad_norm": deque(maxlen=section.window),
        }
        self.in_a_row = 0
        self.skipped = 0
        self.cuts = 0

    def limit(self, what: str) -> float:
        """Return the upper end of the band of `loss` or `grad_norm`; infinity while there are too few values."""
        values = self.values[what]
        if len(values) < max(FEWEST, self.section.window // 4):
            return math.inf
        middle = median(values)
        sigma = max(SIGMA * median(abs(v - middle) for v in values), LEAST * abs(middle))
        return middle + self.section.width * sigma

    def judge(self, step: int, loss: float, grad_norm: float) -> Spike | None:
        """Return why optimizer step `step` is to be skipped, from its loss and gradient norm; None: it is done.

        Raises `WorkError` where loss or norm is no finite number for `patience` steps in a row; without the guard, for
        one.
        """
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        patience = self.section.patience if self.section.guard else 1
        if not finite and self.in_a_row + 1 >= patience:
            what, value = ("loss", loss) if not math.isfinite(loss) else ("gradient norm", grad_norm)
            times = f", for {patience} steps in a row" if patience > 1 else ""
            raise WorkError(
                f"step {step}: the {what} is {value}{times}; lower optimizer.learning_rate "
                f"(--set optimizer.learning_rate=…) or use model.dtype float32"
            )
        if not self.section.guard:
            return None
        for what, value in (("loss", loss), ("grad_norm", grad_norm)):
            limit = self.limit(what)
            if not value <= limit or not math.isfinite(value):
                return self._skip(what, value, limit)
        self.in_a_row = 0
        self.values["loss"].append(loss)
        self.values["grad_norm"].append(grad_norm)
        return None

    def _skip(self, what: str, value: float, limit: float) -> Spike:
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row < self.section.patience:
            return Spike(what, value, limit)
        self.in_a_row = 0
        self.cuts += 1
        for values in self.values.values():
            values.clear()
        return Spike(what, value, limit, self.section.cut)

    def state(self) -> dict[str, Any]:
        """Return the guard's state as a JSON object."""
        return {
            "values": {name: list(values) for name, values in self.values.items()},
            "in_a_row": self.in_a_row,
            "skipped": self.skipped,
            "cuts": self.cuts,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        for name, values in self.values.items():
            values.clear()
            values.extend(state["values"][name])
        self.in_a_row, self.skipped, self.cuts = state["in_a_row"], state["skipped"], state["cuts"]
