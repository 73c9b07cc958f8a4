"""Make trainer rows of samples, packed or not, and padded batches of trainer rows.

Packed rows carry `position_ids` that start again at 0 with each sample. transformers' mask code finds the borders of
samples in them (`masking_utils.find_packed_sequence_indices`) and keeps attention within each sample, with eager and
sdpa at any batch size, under two conditions: there is no attention mask, and there is no cache. By default a model
makes a cache even in training, and then every sample silently sees its neighbors, so a packed batch sets
`use_cache: False`. A ready-made 4-D mask would work with a cache too, but its form differs between eager and sdpa.

`padding_free` makes the batches for attention that takes the borders of samples directly.

    B  rows of a batch      L  tokens of the longest row, rounded up
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mla_tune.data.encode import Sample
from mla_tune.data.packing import pack
from mla_tune.data.row_kinds import IGNORED
from mla_tune.errors import InputError

_PAD_MULTIPLE = 8
"""Rows are padded to a multiple of this many tokens, at which GPU matrix units are fastest."""


def trainer_rows(samples: Sequence[Sample], max_length: int, *, packing: bool) -> list[dict[str, list[int]]]:
    """Return a row for each sample, or with `packing` rows of several samples, with `position_ids`.

    transformers' Trainer drops columns that it doesn't know: train on packed rows with `remove_unused_columns=False`.

    Raises:
        InputError: a sample is longer than `max_length`, with `packing`.
    """
    if not packing:
        return [{"input_ids": s.input_ids, "labels": s.labels} for s in samples]
    rows: list[dict[str, list[int]]] = []
    for indices in pack([len(s.input_ids) for s in samples], max_length):
        row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
        for sample in (samples[i] for i in indices):
            row["input_ids"] += sample.input_ids
            # The last token of the sample before must not be trained to predict the first token of this one.
            row["labels"] += [IGNORED, *sample.labels[1:]]
            row["position_ids"] += range(len(sample.input_ids))
        rows.append(row)
    return rows


@dataclass(frozen=True)
class Collator:
    """Makes one batch of rows, padded on the right."""

    pad_token_id: int
    """Token id of the padding."""
    max_length: int | None = None
    """Rows aren't padded beyond this many tokens; None: no limit."""
    packed: bool = False
    """Whether rows are packed; their batches have position_ids and no attention mask."""

    def __call__(self, features: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
        """Return a batch.

        Unpacked: input_ids, labels and attention_mask, each (B, L).
        Packed: input_ids, labels and position_ids, each (B, L), and `use_cache: False`. The padding of a row is a
        sample of its own, with labels -100.

        Raises:
            InputError: packed rows have no position_ids.
        """
        if self.packed and any("position_ids" not in f for f in features):
            raise InputError(
                "packed rows have no position_ids, so their samples would see each other; "
                "does the trainer drop unknown columns? Set remove_unused_columns=False"
            )
        longest = max(len(f["input_ids"]) for f in features)
        width = -(-longest // _PAD_MULTIPLE) * _PAD_MULTIPLE
        if self.max_length is not None:
            width = max(longest, min(width, self.max_length))
        gaps = [width - len(f["input_ids"]) for f in features]

        def padded(key: str, fill: int) -> torch.Tensor:
            return torch.tensor([[*f[key], *[fill] * gap] for f, gap in zip(features, gaps, strict=True)])

        batch: dict[str, Any] = {
            "input_ids": padded("input_ids", self.pad_token_id),
            "labels": padded("labels", IGNORED),
        }
        if not self.packed:
            batch["attention_mask"] = torch.tensor([[1] * (width - gap) + [0] * gap for gap in gaps])
            return batch
        positions = [[*f["position_ids"], *range(gap)] for f, gap in zip(features, gaps, strict=True)]
        batch["position_ids"] = torch.tensor(positions)
        return batch | {"use_cache": False}
