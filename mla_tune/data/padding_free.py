"""Trainer rows → one row of samples end to end, without a token of padding, with the borders beside it.

Attention that knows borders (`kernels.packed_attention` of training, flash attention) then works on each sample alone.
Rows of one sample and packed rows are the same to it.

    N  tokens of the batch      S  samples in it
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mla_tune.data.row_kinds import IGNORED


class PaddingFreeCollator:
    """Rows with `input_ids`, `labels` and perhaps `position_ids` (which start again at 0 with each sample) → a batch:
    input_ids, labels, position_ids (1, N); cu_seq_lens_q, cu_seq_lens_k (S + 1), int32; max_length_q, max_length_k.
    """

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        for f in features:
            ids += f["input_ids"]
            labels += [IGNORED, *f["labels"][1:]]  # or the row before would be trained to predict it
            positions += f["position_ids"] if "position_ids" in f else range(len(f["input_ids"]))
        place = torch.tensor(positions)
        borders = [*(place == 0).nonzero().flatten().tolist(), len(positions)]
        ends = torch.tensor(borders, dtype=torch.int32)
        longest = int(ends.diff().max())
        return {
            "input_ids": torch.tensor([ids]),
            "labels": torch.tensor([labels]),
            "position_ids": place[None],
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
            "use_cache": False,
        }
