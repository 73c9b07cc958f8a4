"""The check after writing: the output is opened again and every byte of it is accounted for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from mla_tune.checkpoint.index import Checkpoint, TensorRef, read_shard
from mla_tune.checkpoint.shards import read_raw, read_tensor, same_bits
from mla_tune.errors import CheckError
from mla_tune.merge.absorb import ABSORBED_FILE
from mla_tune.merge.apply import Merger
from mla_tune.merge.plan import MergePlan
from mla_tune.merge.report import CheckReport
from mla_tune.mla.heads import split_kv_b


def verify(plan: MergePlan, folder: Path, done: Callable[[int], None] | None = None) -> CheckReport:
    """Compare the checkpoint in `folder` with the plan.

    The files, keys, dtypes and shapes are those planned; every tensor that is merged or cast, computed again, equals
    what is on the disk bit for bit; every other tensor equals the base's byte for byte; the absorbed tensors are the
    split of the kv_b_proj that was written.  Raises `CheckError` naming the first tensor that differs.
    """
    merged = Checkpoint.open(folder)
    merger = Merger(plan)
    recomputed = unchanged = 0
    if merged.tensors.keys() != plan.checkpoint.tensors.keys():
        raise CheckError(f"{folder}: the merged checkpoint has other keys than the base")
    for base_shard, shard in zip(plan.checkpoint.shards, merged.shards, strict=True):
        found = {key: (ref.dtype, ref.shape) for key, ref in shard.tensors.items()}
        if list(found.items()) != list(plan.layout(base_shard).items()) or shard.metadata != base_shard.metadata:
            raise CheckError(f"{shard.file}: its header is not the one planned")
        for key, ref in shard.tensors.items():
            expected = merger.tensor(base_shard.tensors[key])
            if isinstance(expected, TensorRef):
                unchanged += 1
                equal = all(a == b for a, b in zip(read_raw(expected), read_raw(ref), strict=True))
            else:
                recomputed += 1
                equal = same_bits(expected, read_tensor(ref))
            if not equal:
                raise CheckError(f"{shard.file}: '{key}' on the disk is not what the merge computed")
            if done:
                done(ref.nbytes)
    return CheckReport(recomputed, unchanged, _verify_absorbed(plan, merged))


def _verify_absorbed(plan: MergePlan, merged: Checkpoint) -> int:
    if not plan.kv_b:
        return 0
    tensors = read_shard(merged.folder / ABSORBED_FILE).tensors
    if tensors.keys() != plan.absorbed_layout().keys():
        raise CheckError(f"{merged.folder / ABSORBED_FILE}: has other keys than planned")
    for path, key in plan.kv_b:
        halves = split_kv_b(read_tensor(merged[key]), plan.architecture.dims)
        written: tuple[torch.Tensor, ...] = (read_tensor(tensors[f"{path}.W_UK"]), read_tensor(tensors[f"{path}.W_UV"]))
        if not all(same_bits(a, b) for a, b in zip(halves, written, strict=True)):
            raise CheckError(f"{merged.folder / ABSORBED_FILE}: {path} is not the split of '{key}'")
    return len(plan.kv_b)
