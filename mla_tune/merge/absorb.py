"""`absorbed.safetensors`: the KV up-projection of every attention module, split per head for absorbed decoding.

    H heads   P qk_nope_head_dim   V v_head_dim   C kv_lora_rank

    <attention path>.W_UK (H, C, P)      <attention path>.W_UV (H, V, C)      see `mla_tune.mla.heads`

It is a by-product: inference engines load the standard `kv_b_proj` and split it themselves.  Its metadata names the
layout and the sha256 of each `kv_b_proj` that it was split from, so that a reader can tell when it is out of date.
"""

from __future__ import annotations

import hashlib
import json

from mla_tune.checkpoint.index import Checkpoint, TensorRef
from mla_tune.checkpoint.shards import read_raw, read_tensor, write_shard
from mla_tune.merge.plan import MergePlan
from mla_tune.mla.heads import split_kv_b

ABSORBED_FILE = "absorbed.safetensors"
LAYOUT = "W_UK (H, C, P), W_UV (H, V, C)"


def write_absorbed(plan: MergePlan, merged: Checkpoint) -> None:
    """Split the kv_b_proj tensors as they lie in the `merged` checkpoint, rounded, and write them beside it."""
    halves = (half for _, key in plan.kv_b for half in split_kv_b(read_tensor(merged[key]), plan.architecture.dims))
    digests = {key: sha256(merged[key]) for _, key in plan.kv_b}
    metadata = {"format": "pt", "layout": LAYOUT, "source_sha256": json.dumps(digests)}
    write_shard(merged.folder / ABSORBED_FILE, plan.absorbed_layout(), halves, metadata)


def sha256(ref: TensorRef) -> str:
    """Digest of a tensor's bytes as stored."""
    digest = hashlib.sha256()
    for chunk in read_raw(ref):
        digest.update(chunk)
    return digest.hexdigest()
