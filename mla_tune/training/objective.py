"""The socket for objectives: what a training step minimizes, and how held-out rows are scored.

An objective sums its loss over units that it counts itself (trained tokens, pairs, …).  The trainer does the rest: it
divides by the units of the whole step (all micro-batches of all processes), so the result does not depend on how a
global batch is cut, judges the step with the spike guard, and logs.  To add one, write a subclass in a file of
`mla_tune/training/objectives/`, and name it in `mla_tune/sockets.py: OBJECTIVES`; a recipe chooses it by
`train.objective`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from mla_tune.data.prepare import Prepared
from mla_tune.data.row_kinds import IGNORED, ROW_KINDS
from mla_tune.errors import InputError
from mla_tune.recipe.schema import Recipe

#: Rows → a batch: tensors by the name of the argument of the model's forward that they are for.
Collate = Callable[[Sequence[dict[str, Any]]], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class SummedLoss:
    """What an objective finds for a batch, summed over the batch's units."""

    #: A number (0-dimensional, float32) with a gradient.
    loss: torch.Tensor
    #: The figures that the objective names in `Objective.metrics`, each a 0-dimensional tensor.
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Objective(ABC):
    """What a training step minimizes.  One is made for each run, from the run's recipe."""

    #: Kinds of rows that it takes (`data.row_kinds.Kind`: prompt, chat, text, tokens).
    row_kinds: ClassVar[tuple[str, ...]] = tuple(ROW_KINDS)
    #: Names of further figures that its losses come with; they go into metrics.jsonl and to the trackers.
    metrics: ClassVar[tuple[str, ...]] = ()
    #: Columns that each row for the collator must have.
    columns: ClassVar[tuple[str, ...]] = ("input_ids", "labels")

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def check_data(self, data: Prepared) -> None:
        """Raise `InputError` if the rows are of a kind that the objective does not take, or lack a column."""
        name = self.recipe.train.objective
        for source in data.sources:
            if source.rows.kind not in self.row_kinds:
                raise InputError(
                    f"train.objective: {name} takes rows of the kind {' or '.join(self.row_kinds)}, and the rows of "
                    f"{source.rows.source} are of the kind {source.rows.kind}"
                )
        rows = [*([] if data.streamed else data.train_rows[:1]), *data.held_out_rows[:1]]
        missing = [column for column in self.columns if any(column not in row for row in rows)]
        if missing:
            raise InputError(f"train.objective: {name} needs the columns {', '.join(missing)}, which the rows lack")

    def prepare_model(self, model: Any) -> None:  # noqa: B027  (most objectives need nothing)
        """Change the loaded causal LM `model` (without PEFT's wrapper), before layers are compiled or wrapped."""

    def collator(self, collate: Collate) -> Collate:
        """Return the function that makes a batch of rows.

        `collate` handles input_ids, labels and position_ids as the run's attention wants them: padded to (B, L), or
        laid end to end to (1, N).  An objective with columns of its own adds them to its batches.
        """
        return collate

    def count(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return the number of units of a batch that the loss is a sum over, a 0-dimensional integer tensor.

        A row of one token that is not trained has to count 0: such rows fill up the last global batch of an epoch in a
        run of several processes.  The default counts trained tokens: labels that are not -100, but for the first of
        each row, which nothing predicts.
        """
        return (batch["labels"][:, 1:] != IGNORED).sum()

    @abstractmethod
    def loss(self, model: Any, batch: Mapping[str, Any]) -> SummedLoss:
        """Return loss and metrics of a training batch, summed over the `count` units of the batch.

        `model` is the model as it trains, with all wrappers (PEFT, DDP, FSDP): call it, and reach for no submodule.
        """

    def held_out_loss(self, model: Any, batch: Mapping[str, Any]) -> SummedLoss:
        """As `loss`, for a batch of held-out rows, without gradients and in eval mode.

        Override it where the figure to compare runs by is not the one that is minimized.
        """
        return self.loss(model, batch)
