"""Packed rows for the tests of packed attention and of recomputation."""

from __future__ import annotations

from typing import Any

import torch

from mla_tune.arch.build import architecture
from mla_tune.data.collate import Collator
from mla_tune.data.padding_free import PaddingFreeCollator
from mla_tune.training.kernels import packed_attention as packed
from tests.helpers.tiny_families import FAMILIES, vocabulary

LENGTHS = [[5, 1, 9], [7, 3]]


def attentions(name: str) -> list[str]:
    """What the family can have on packed rows; the rest is refused or switched off (training.test_families)."""
    family = architecture(FAMILIES[name]).family
    if family.carries_state:
        return []
    if family.eager_only:
        return ["eager"]
    return ["sdpa", "eager"] if family.needs_mask else [packed.NAME, "sdpa", "eager"]


PAIRS = [(name, attention) for name in FAMILIES for attention in attentions(name)]


def rows_of(name: str) -> list[dict[str, list[int]]]:
    """Two packed rows, of three and two samples; the first token of a sample is never trained."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for lengths in LENGTHS:
        row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
        for n in lengths:
            ids = torch.randint(3, vocabulary(name), (n,), generator=generator).tolist()
            row["input_ids"] += ids
            row["labels"] += [-100, *ids[1:]]
            row["position_ids"] += range(n)
        rows.append(row)
    return rows


def batch_for(attention: str, rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    """The batch of these rows as this attention takes it: one flat row for packed attention, else padded rows."""
    return PaddingFreeCollator()(rows) if attention == packed.NAME else Collator(0, None, packed=True)(rows)
