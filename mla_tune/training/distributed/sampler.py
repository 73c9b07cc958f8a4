"""The order of rows in a run of many processes: the same global batches as one process has.

accelerate deals out batches in turn: of 2 processes with 4 rows each, the first has rows 0 to 3 of a global batch of 8,
the second rows 4 to 7.  Where the last global batch of an epoch is smaller it would start again at the first row; here
the rest is filled with a row of one token of which nothing is trained, so that every row counts once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import TrainerCallback

from mla_tune.data.encode import IGNORED

#: A row without effect: one token has nothing before it that could predict it.
DUMMY_ROW = {"input_ids": [0], "labels": [IGNORED]}


def is_dummy_row(row: dict[str, Any]) -> bool:
    return len(row["input_ids"]) == 1


def with_dummy_row(rows: Sequence[dict[str, Any]]) -> Dataset:
    """The rows, and the filler after them."""
    filler = DUMMY_ROW | ({"position_ids": [0]} if "position_ids" in rows[0] else {})
    return Dataset.from_list([*rows, filler])


class PaddedDistributedSampler(Sampler[int]):
    """Indices of `rows` rows, shuffled by `seed` and epoch (None: as they lie), then of the filler (index `rows`) until
    the last global batch of `batch` rows is whole."""

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
        if self.order is not None:
            self.order.set_epoch(epoch)


class SetEpoch(TrainerCallback):
    """Tells the sampler which epoch begins: behind accelerate's wrappers for many processes and for skipped batches
    nobody else does, and a run resumed in its second epoch would have the first one's order."""

    def __init__(self, sampler: PaddedDistributedSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int((state.epoch or 0) + 1e-6))
