"""The memory that a comparison of logits needs, and the memory that is free."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch

from mla_tune.absorption.fold import absorbed_shapes
from mla_tune.adapter.files import Adapter
from mla_tune.arch.site import Architecture

#: Share of the free memory that a comparison may take.
SHARE = 0.8
#: Memory beside weights, adapters and logits: attention, buffers of the reader, what is not given back at once.
BESIDE = 100_000_000
#: Bytes of experts in memory at a time: few enough for a processor's cache.
CHUNK = 8_000_000


def needed(
    arch: Architecture, adapters: Sequence[tuple[Adapter, float]], absorb: str, *, tokens: int, itemsize: int
) -> int:
    """Bytes at the peak: the largest piece with its absorbed tensors, all adapters, and logits."""
    from mla_tune.verification.logits.peft_reference import needs_whole_stacks

    layers: dict[int | None, int] = {}
    for site in arch:
        numbers = site.params
        if site.is_experts and needs_whole_stacks(adapters):
            numbers *= 4  # W, two deltas, and their sum with W
        elif site.is_experts:
            numbers = (reader_threads() + 1) * max(CHUNK // itemsize, numbers // site.count)
        layers[site.layer] = layers.get(site.layer, 0) + numbers * itemsize
    kinds = {a.dims for a in arch.attention} if absorb != "none" else set()
    sizes = [sum(prod(shape) for shape in absorbed_shapes(d, absorb).values()) for d in kinds]
    module = max(sizes, default=0)
    held = sum(ref.nbytes for adapter, _ in adapters for ref in adapter.refs())
    logits = tokens * arch.vocab_size * 4
    return max(layers.values()) + module * 2 * itemsize + held + 8 * logits + BESIDE


def reader_threads() -> int:
    return max(1, min(8, torch.get_num_threads() // 2))


def free_memory() -> int:
    """Bytes that can be had without swapping: those of the machine, or of the container where it has fewer."""
    import psutil

    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no limit, or none that can be read
        return free
    return min(free, limit - used)
