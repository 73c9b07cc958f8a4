"""metrics.jsonl → the curves that plot, report and `mla-tune runs` show."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Points = list[tuple[int, float]]


@dataclass
class Curves:
    """The figures of a run as points (step, value), in the order of the steps."""

    #: Loss of each logged step that was not skipped.
    train: Points = field(default_factory=list)
    #: Loss on the held-out rows.
    held_out: Points = field(default_factory=list)
    #: Learning rate by role; with LoRA+ a role has two, `W_O.A` and `W_O.B`.
    rates: dict[str, Points] = field(default_factory=dict)
    #: Gradient norm by role.
    norms: dict[str, Points] = field(default_factory=dict)
    #: Norm of all gradients together.
    norm: Points = field(default_factory=list)
    #: Skipped steps (step, loss, gradient norm); None for what was no finite number.  A line that covers several steps
    #: shows the last one that was skipped.
    spikes: list[tuple[int, float | None, float | None]] = field(default_factory=list)
    #: Cuts: (step, factor on every learning rate).
    cuts: Points = field(default_factory=list)
    #: The last logged step.
    steps: int = 0
    #: Steps skipped so far.
    skipped: int = 0
    #: Real tokens a second, from the last line.
    tokens_per_s: float | None = None
    #: Lines that can't be read, such as one that was cut off when the process was killed.
    broken: int = 0

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the lowest held-out loss; None without one."""
        return min(self.held_out, key=lambda point: (point[1], point[0]), default=None)


def read_curves(file: Path) -> Curves:
    """Read metrics.jsonl; the curves are empty where there is no file yet."""
    curves = Curves()
    if not file.exists():
        return curves
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            _add(curves, int(line["step"]), line)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
            curves.broken += 1
    return curves


def _add(curves: Curves, step: int, line: dict[str, Any]) -> None:
    curves.steps = max(curves.steps, step)
    if (held_out := _finite(line.get("eval_loss"))) is not None:
        curves.held_out.append((step, held_out))
    if "loss" not in line:
        return
    loss, norm = _finite(line["loss"]), _finite(line.get("grad_norm"))
    if line.get("spike"):
        curves.spikes.append((step, loss, norm))
    else:
        if loss is not None:
            curves.train.append((step, loss))
        if norm is not None:
            curves.norm.append((step, norm))
    if (cut := _finite(line.get("cut"))) is not None:
        curves.cuts.append((step, cut))
    for found, into in ((line.get("learning_rate"), curves.rates), (line.get("grad_norms"), curves.norms)):
        for role, value in (found or {}).items():
            if (number := _finite(value)) is not None:
                into.setdefault(role, []).append((step, number))
    curves.skipped = int(line.get("skipped") or 0)
    curves.tokens_per_s = _finite(line.get("tokens_per_s"))


def _finite(x: Any) -> float | None:
    return float(x) if isinstance(x, (int, float)) and math.isfinite(x) else None


def grouped(curves: dict[str, Points]) -> dict[str, list[str]]:
    """Group names whose curves are equal, by a label: `all roles`, `all roles, A` (LoRA+), or the names."""
    same: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for name, points in curves.items():
        same.setdefault(tuple(points), []).append(name)
    parts = Counter(name.rpartition(".")[2] for name in curves if "." in name)
    found: dict[str, list[str]] = {}
    for names in same.values():
        part = names[0].rpartition(".")[2]
        if len(names) == len(curves) > 1:
            label = "all roles"
        elif len(names) > 1 and len(names) == parts[part] and all(n.endswith(f".{part}") for n in names):
            label = f"all roles, {part}"
        else:
            label = ", ".join(names)
        found[label] = names
    return found


def thinned(points: Points, most: int = 1500) -> Points:
    """Return about `most` points at most: the lowest and the highest of each stretch, so that no peak is lost."""
    if len(points) <= most:
        return points
    width = math.ceil(2 * len(points) / most)
    kept: Points = []
    for start in range(0, len(points), width):
        part = points[start : start + width]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]
