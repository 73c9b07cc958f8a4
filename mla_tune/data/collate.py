"""Samples → trainer rows → batches.

Packed rows carry `position_ids` that start again at 0 with each sample.  transformers' mask code reads the samples'
borders from them (`masking_utils.find_packed_sequence_indices`) and keeps attention within each sample, with eager and
sdpa at any batch size, on two conditions: there is no attention mask, and no cache.  Unless told otherwise a model
makes a cache, in training too, and every sample then sees its neighbors without a word of warning; so a packed batch
says `use_cache: False` itself.  A ready-made 4-D mask would hold with a cache too, but its form differs between eager
and sdpa, and flash attention takes none.

flash attention reads the borders only in a batch of one row (`modeling_flash_attention_utils._is_packed_sequence`):
`flat` lays a batch's rows end to end.

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

_MULTIPLE = 8
"""Rows are padded to a multiple of this, which matrix units want."""


def rows_for(samples: Sequence[Sample], max_length: int, packing: bool) -> list[dict[str, list[int]]]:
    """One row a sample, or (packing) rows of several samples with `position_ids`.

    The Trainer drops columns that it doesn't know: train on packed rows with `remove_unused_columns=False`.

    Raises:
        InputError: a sample longer than max_length, when packing.
    """
    if not packing:
        return [{"input_ids": s.input_ids, "labels": s.labels} for s in samples]
    rows: list[dict[str, list[int]]] = []
    for indices in pack([len(s.input_ids) for s in samples], max_length):
        row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
        for sample in (samples[i] for i in indices):
            row["input_ids"] += sample.input_ids
            # The sample before must not be trained to predict this one's first token.
            row["labels"] += [IGNORED, *sample.labels[1:]]
            row["position_ids"] += range(len(sample.input_ids))
        rows.append(row)
    return rows


@dataclass(frozen=True)
class Collator:
    """Rows → one batch, padded on the right."""

    pad_token_id: int
    max_length: int | None = None
    """Rows aren't padded beyond this; None: no bound."""
    packed: bool = False
    """Rows are packed: give position_ids and no attention mask."""
    flat: bool = False
    """Packed rows end to end in one row (1, B·L), as flash attention needs."""

    def __call__(self, features: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
        """A batch.

        Unpacked: input_ids, labels, attention_mask, each (B, L).
        Packed: input_ids, labels, position_ids, each (B, L) or, if flat, (1, B·L), and `use_cache` False.  The padding
        is a sample of its own, with label -100.

        Raises:
            InputError: packed rows without position_ids.
        """
        if self.packed and any("position_ids" not in f for f in features):
            raise InputError(
                "packed rows came without position_ids, so their samples would see each other; "
                "does the trainer drop unknown columns? Set remove_unused_columns=False"
            )
        longest = max(len(f["input_ids"]) for f in features)
        width = -(-longest // _MULTIPLE) * _MULTIPLE
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
        if self.flat:
            batch = {key: rows.view(1, -1) for key, rows in batch.items()}
        return batch | {"use_cache": False}
