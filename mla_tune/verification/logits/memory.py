"""How much memory a comparison of logits needs, and how much is free."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch

from mla_tune.absorption.fold import absorbed_shapes
from mla_tune.adapter.deltas import Adapter
from mla_tune.arch.site import Architecture

#: Share of the free memory that a comparison may take.
SHARE = 0.8
#: Bytes needed beside weights, adapters and logits: attention, read buffers, memory that is not freed at once.
OVERHEAD = 100_000_000
#: Bytes of routed experts that are read and computed at a time: few enough for a processor's cache.
CHUNK = 8_000_000


def needed(
    arch: Architecture, adapters: Sequence[tuple[Adapter, float]], absorb: str, *, tokens: int, itemsize: int
) -> int:
    """Return the peak memory in bytes: the largest layer with its absorbed tensors, all adapters, and logits.

    `absorb` is the mode of the absorbed tensors, `tokens` the length of the input, `itemsize` the bytes of a number.
    """
    from mla_tune.verification.logits.peft_reference import needs_all_experts

    layers: dict[int | None, int] = {}
    for site in arch:
        numbers = site.params
        if site.is_experts and needs_all_experts(adapters):
            numbers *= 4  # W, two deltas, and their sum with W
        elif site.is_experts:
            numbers = (reader_threads() + 1) * max(CHUNK // itemsize, numbers // site.count)
        layers[site.layer] = layers.get(site.layer, 0) + numbers * itemsize
    dims = {a.dims for a in arch.attention} if absorb != "none" else set()
    sizes = [sum(prod(shape) for shape in absorbed_shapes(d, absorb).values()) for d in dims]
    module = max(sizes, default=0)
    adapter_bytes = sum(ref.nbytes for adapter, _ in adapters for ref in adapter.refs())
    logits = tokens * arch.vocab_size * 4
    return max(layers.values()) + module * 2 * itemsize + adapter_bytes + 8 * logits + OVERHEAD


def reader_threads() -> int:
    """Return how many threads read weights while the others compute."""
    return max(1, min(8, torch.get_num_threads() // 2))


def free_memory() -> int:
    """Return the bytes that can be used without swapping: of the machine, or of the container if it has fewer."""
    import psutil

    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # there is no limit, or it can't be read
        return free
    return min(free, limit - used)
