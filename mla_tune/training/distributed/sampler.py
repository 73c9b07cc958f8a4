"""The order of rows in a run of several processes: the same global batches as one process has.

accelerate deals out batches in turn: of 2 processes with 4 rows each, the first has rows 0 to 3 of a global batch of 8,
the second rows 4 to 7.  Where the last global batch of an epoch is smaller, accelerate would fill it with rows from the
start of the epoch; here it is filled with dummy rows of one token that is not trained, so every row counts once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import TrainerCallback

from mla_tune.data.row_kinds import IGNORED

#: A row without effect: one token has nothing before it that could predict it.
DUMMY_ROW = {"input_ids": [0], "labels": [IGNORED]}


def is_dummy_row(row: dict[str, Any]) -> bool:
    """Return whether a row is a dummy: it has one token."""
    return len(row["input_ids"]) == 1


def with_dummy_row(rows: Sequence[dict[str, Any]]) -> Dataset:
    """Return a data set of the rows and, after them, one dummy row."""
    dummy = DUMMY_ROW | ({"position_ids": [0]} if "position_ids" in rows[0] else {})
    return Dataset.from_list([*rows, dummy])


class PaddedDistributedSampler(Sampler[int]):
    """Yields the indices of `rows` rows, then the dummy row's index (`rows`) until the last global batch is whole.

    `batch`: rows of a global batch.  `seed`: the order is shuffled by it and the epoch; None: the rows' own order.
    """

    def __init__(self, rows: int, batch: int, seed: int | None) -> None:
        self.rows, self.batch = rows, batch
        # What accelerate puts in the place of a random sampler: one process has the same order.
        self.order = None if seed is None else SeedableRandomSampler(range(rows), data_seed=seed)

    def __iter__(self) -> Iterator[int]:
        yield from range(self.rows) if self.order is None else self.order
        yield from [self.rows] * (-self.rows % self.batch)

    def __len__(self) -> int:
        return self.rows + -self.rows % self.batch

    def set_epoch(self, epoch: int) -> None:
        """Shuffle by another epoch from now on."""
        if self.order is not None:
            self.order.set_epoch(epoch)


class SetEpoch(TrainerCallback):
    """Tells the sampler which epoch begins.

    Nothing else does where accelerate wraps the sampler, for several processes and for skipped batches: a run resumed
    in its second epoch would have the order of the first.
    """

    def __init__(self, sampler: PaddedDistributedSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell it."""
        self.sampler.set_epoch(int((state.epoch or 0) + 1e-6))
