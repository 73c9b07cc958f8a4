"""Mix the samples of several data sets by weight (`data.sources`).

An epoch has N samples, as many as all sources together, and n_i = N · w_i / Σ w of them are from source i. A source
with fewer than n_i samples is repeated. Of one with more, n_i samples are chosen by the seed, the same in each epoch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def samples_per_source(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Return how many samples of each source are in an epoch, each at least 1.

    They are rounded by largest remainders, so that they add up to Σ sizes.
    """
    total, total_weight = sum(sizes), sum(weights)
    exact = [total * w / total_weight for w in weights]
    counts = [max(1, int(x)) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: int(exact[i]) - exact[i])
    for i in by_remainder[: max(0, total - sum(counts))]:
        counts[i] += 1
    return counts


def mix_samples(sources: Sequence[Sequence[T]], weights: Sequence[float], seed: int) -> tuple[list[T], list[int]]:
    """Return the samples of an epoch in an order drawn from `seed`, and how many are from each source."""
    chooser = random.Random(seed)
    counts = samples_per_source([len(s) for s in sources], weights)
    chosen: list[T] = []
    for source, count in zip(sources, counts, strict=True):
        passes, rest = divmod(count, len(source))
        chosen += list(source) * passes
        chosen += [source[i] for i in sorted(chooser.sample(range(len(source)), rest))]
    chooser.shuffle(chosen)
    return chosen, counts
