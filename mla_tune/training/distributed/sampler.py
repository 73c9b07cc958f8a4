"""Order rows so that several processes have the same global batches as one.

accelerate hands out batches in turn: with 2 processes and 4 rows each, the first process has rows 0 to 3 of a global
batch of 8, the second rows 4 to 7.  It would fill the last, smaller global batch of an epoch with rows from the start
of the epoch.  Here it is filled with dummy rows of one untrained token, so that every row counts once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import TrainerCallback

from mla_tune.data.row_kinds import IGNORED

#: A row without effect: its one token is not predicted, because there is no token before it.
DUMMY_ROW = {"input_ids": [0], "labels": [IGNORED]}


def is_dummy_row(row: dict[str, Any]) -> bool:
    """Return whether a row is a dummy row, which means that it has one token."""
    return len(row["input_ids"]) == 1


def with_dummy_row(rows: Sequence[dict[str, Any]]) -> Dataset:
    """Return a data set of the rows, followed by one dummy row."""
    dummy = DUMMY_ROW | ({"position_ids": [0]} if "position_ids" in rows[0] else {})
    return Dataset.from_list([*rows, dummy])


class PaddedDistributedSampler(Sampler[int]):
    """Yields the indices of all rows, then the dummy row's index until the last global batch is complete."""

    def __init__(self, rows: int, batch: int, seed: int | None) -> None:
        """`rows`: number of rows, which is also the dummy row's index.  `batch`: number of rows of a global batch.

        `seed`: the order is shuffled with it and the epoch; None keeps the order of the rows.
        """
        self.rows, self.batch = rows, batch
        # accelerate replaces a random sampler by this one, so one process has the same order.
        self.order = None if seed is None else SeedableRandomSampler(range(rows), data_seed=seed)

    def __iter__(self) -> Iterator[int]:
        yield from range(self.rows) if self.order is None else self.order
        yield from [self.rows] * (-self.rows % self.batch)

    def __len__(self) -> int:
        return self.rows + -self.rows % self.batch

    def set_epoch(self, epoch: int) -> None:
        """Shuffle for this epoch from now on."""
        if self.order is not None:
            self.order.set_epoch(epoch)


class SetEpoch(TrainerCallback):
    """Tells the sampler which epoch begins.

    accelerate does not where it wraps the sampler (for several processes, and to skip batches): without this, a run
    that is resumed in its second epoch would have the order of the first.
    """

    def __init__(self, sampler: PaddedDistributedSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the sampler the epoch; 1e-6 makes up for rounding in `state.epoch`, which counts parts of epochs."""
        self.sampler.set_epoch(int((state.epoch or 0) + 1e-6))
