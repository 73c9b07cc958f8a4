"""The result of a benchmark part: costs, figures with their targets, as a text table and as JSON."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from process_cost import Cost


class Check(NamedTuple):
    """A figure, one value a round, and the target for its median; `most` says that the target is an upper one."""

    name: str
    values: list[float]
    target: float
    most: bool

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def held(self) -> bool:
        return self.median <= self.target if self.most else self.median >= self.target


class Part(NamedTuple):
    """`costs` of each command, one a round; `bytes` of what they worked on; `figures` without a target."""

    costs: dict[str, list[Cost]]
    checks: list[Check]
    bytes: dict[str, int]
    figures: dict[str, float]

    def document(self) -> dict[str, Any]:
        return {
            "bytes": self.bytes,
            "runs": {name: [c._asdict() for c in costs] for name, costs in self.costs.items()},
            "figures": self.figures,
            "checks": [c._asdict() | {"median": c.median, "held": c.held} for c in self.checks],
        }

    def table(self, title: str) -> str:
        sizes = ", ".join(f"{what} {size / 1e9:.3f} GB" for what, size in self.bytes.items())
        lines = [f"{title}   {sizes}".rstrip()]
        lines.append(f"  {'':46}{'seconds':>8}{'range':>18}{'peak MB':>9}{'anonymous':>11}")
        for name, costs in self.costs.items():
            seconds = [c.seconds for c in costs]
            peak, anonymous = (statistics.median(numbers) / 1e6 for numbers in list(zip(*costs, strict=True))[1:])
            lines.append(
                f"  {name:46}{statistics.median(seconds):8.2f}{_span(seconds):>18}{peak:9.0f}{anonymous:11.0f}"
            )
        lines += [f"  {name:46}{value:8.2f}" for name, value in self.figures.items()]
        for c in self.checks:
            words = f"{'at most' if c.most else 'at least'} {c.target:g}: {'held' if c.held else 'MISSED'}"
            lines.append(f"  {c.name:46}{c.median:8.2f}{_span(c.values):>18}  {words}")
        return "\n".join(lines)


def _span(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def ratios(above: list[Cost], below: list[Cost], field: str) -> list[float]:
    """One ratio a round."""
    return [getattr(a, field) / getattr(b, field) for a, b in zip(above, below, strict=True)]
