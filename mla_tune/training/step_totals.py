"""What the micro-batches of an optimizer step add up to, and how all processes of a run come to the same sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from mla_tune.training.distributed.team import Team


@dataclass
class StepTotals:
    """Sums over the micro-batches of the step under way, in this process."""

    #: The loss that each micro-batch added to the step's mean, as the backward pass had it.
    losses: list[torch.Tensor] = field(default_factory=list)
    #: The objective's metrics (M,), summed over each micro-batch's units.
    metrics: list[torch.Tensor] = field(default_factory=list)
    #: Units of the objective in the whole step, of all processes.
    count: torch.Tensor | float = 1.0
    #: Real tokens, padding left out.
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class AgreedStep:
    """The figures of a step, the same to the last bit in all processes."""

    #: Mean loss over the step's units.
    loss: float
    #: Means of the objective's metrics over the step's units.
    metrics: list[float]
    #: Real tokens of all processes.
    tokens: int
    #: Whether a process was asked to stop.
    stop: bool
    #: Squared gradient norms, one a role.
    squares: list[float]


def agree(
    team: Team, totals: StepTotals, *, stop: bool, squares: Sequence[float], squares_of_shards: bool
) -> AgreedStep:
    """Combine the totals of all processes.  All of them call it, once a step.

    `squares`: squared gradient norms by role, in an order that all processes share.  `squares_of_shards`: each process
    has those of its shards, so they are added up; otherwise all have the same, but for rounding, and the main process's
    count.
    """
    loss = float(torch.stack(totals.losses).sum())
    metrics = torch.stack(totals.metrics).sum(0).tolist() if totals.metrics else []
    tokens, squares = totals.tokens, list(squares)
    if team.is_distributed:
        # On the CPU, whose group is always there.
        sums = torch.tensor([loss, tokens, stop, *metrics], dtype=torch.float64)
        norms = torch.tensor(squares, dtype=torch.float64)
        dist.all_reduce(sums)
        if squares_of_shards:
            dist.all_reduce(norms)
        shared = torch.cat([sums, norms])
        dist.broadcast(shared, src=0)
        loss, tokens, stop, *rest = shared.tolist()
        metrics, squares = rest[: len(metrics)], rest[len(metrics) :]
        loss /= team.here.world_size
    count = max(float(totals.count), 1.0)
    return AgreedStep(loss, [value / count for value in metrics], int(tokens), bool(stop), squares)
