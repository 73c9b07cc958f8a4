"""The figures of the held-out rows: means over all units of the objective, whatever the batches are.

The Trainer's own loop averages means of batches, so its figure moves with batch size and packing; this one does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch


def held_out_figures(trainer: Any, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Score `batches` with the objective of `trainer` and return `loss` and each of the objective's metrics.

    All processes of a run call it, each with its share of the batches.  NaN where no batch has a unit.
    """
    objective = trainer.objective
    names = ("loss", *objective.metrics)
    total = torch.zeros(len(names) + 1, dtype=torch.float64)
    with torch.no_grad():
        for batch in batches:
            inputs = trainer._prepare_inputs(batch)
            inputs.pop("real_tokens", None)
            count = objective.count(inputs)
            if not count and not trainer.team.sharded:  # where the model is sharded, the others wait for this forward
                continue
            with trainer.compute_loss_context_manager():
                found = objective.held_out_loss(trainer.model, inputs)
            mean = found.loss / count.clamp(min=1)
            sums = [float(mean) * int(count), *(float(found.metrics[name]) for name in objective.metrics)]
            total += torch.tensor([int(count), *sums], dtype=torch.float64)
    total = trainer.accelerator.reduce(total.to(trainer.args.device), reduction="sum")
    count, *sums = total.tolist()
    return {name: value / count if count else math.nan for name, value in zip(names, sums, strict=True)}
