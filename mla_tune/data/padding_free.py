"""Lay the samples of a batch end to end in one row without padding, and say where each begins.

Attention that takes the borders (`training.kernels.packed_attention`, flash attention) then runs on each sample by
itself. Rows may hold one sample each or be packed.

    N  tokens of the batch      S  samples in it
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mla_tune.data.row_kinds import IGNORED


class PaddingFreeCollator:
    """Makes padding-free batches of trainer rows.

    Rows have `input_ids`, `labels`, and if packed `position_ids` that start again at 0 with each sample.
    """

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch.

        It has input_ids, labels and position_ids (1, N); cu_seq_lens_q and cu_seq_lens_k (S + 1, int32), the index of
        each sample's first token, and N; max_length_q and max_length_k, the tokens of the longest sample; and
        `use_cache: False`.
        """
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        for f in features:
            ids += f["input_ids"]
            labels += [IGNORED, *f["labels"][1:]]  # the row before must not be trained to predict this token
            positions += f["position_ids"] if "position_ids" in f else range(len(f["input_ids"]))
        position_ids = torch.tensor(positions)
        borders = [*(position_ids == 0).nonzero().flatten().tolist(), len(positions)]
        cu_seq_lens = torch.tensor(borders, dtype=torch.int32)
        longest = int(cu_seq_lens.diff().max())
        return {
            "input_ids": torch.tensor([ids]),
            "labels": torch.tensor([labels]),
            "position_ids": position_ids[None],
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": longest,
            "max_length_k": longest,
            "use_cache": False,
        }
