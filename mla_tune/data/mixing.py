"""Several data sets, mixed by weight.

An epoch has as many samples as all sources together, N; of source i it holds n_i = N · w_i / Σ w.  A source with fewer
samples is gone through again, one with more gives a part of its samples, chosen by the seed: in each epoch the same.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def samples_per_source(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many samples of each source an epoch holds: their sum is Σ sizes (largest remainders), each at least 1."""
    total, whole = sum(sizes), sum(weights)
    exact = [total * w / whole for w in weights]
    counts = [max(1, int(x)) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: int(exact[i]) - exact[i])
    for i in by_remainder[: max(0, total - sum(counts))]:
        counts[i] += 1
    return counts


def mix_samples(sources: Sequence[Sequence[T]], weights: Sequence[float], seed: int) -> tuple[list[T], list[int]]:
    """The samples of an epoch in an order drawn from `seed`, and how many come from each source."""
    chooser = random.Random(seed)
    counts = samples_per_source([len(s) for s in sources], weights)
    chosen: list[T] = []
    for source, count in zip(sources, counts, strict=True):
        passes, rest = divmod(count, len(source))
        chosen += list(source) * passes
        chosen += [source[i] for i in sorted(chooser.sample(range(len(source)), rest))]
    chooser.shuffle(chosen)
    return chosen, counts
