"""The figures of `bench decode`, as dataclasses; `--json` prints them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Timed:
    """One way at one context; lists have one number a round."""

    way: str
    ms: list[float]
    ms_median: float
    tokens_per_second: float
    #: Stock's time / this way's; empty and None where stock ran out of memory.
    ratios: list[float]
    ratio_median: float | None
    #: Of the tensors in the cache, a token of one row, over all layers.
    cache_bytes_per_token: float
    #: Room for tokens to come, in the same measure.
    room_bytes_per_token: float
    transient_bytes: int
    #: That a step must read at least: weights and cache of all rows.
    step_bytes: int
    bandwidth_share: float
    #: This way's time / that of reading the cache once.
    times_floor: float
    #: Of a step as a CUDA graph, what the GPU itself takes: one a round; empty where there is none.
    graph_ms: list[float]


@dataclass(frozen=True, slots=True)
class Prefill:
    """One prompt of `context` tokens in an empty cache, absorbed (mode auto) against stock; lists have one number a
    round."""

    context: int
    stock_ms: list[float]
    absorbed_ms: list[float]
    #: Stock's time / absorbed time.
    ratios: list[float]
    ratio_median: float


@dataclass(frozen=True, slots=True)
class AtContext:
    """All ways at one context.

    `adapters_cost`, one a round, is the time of unmerged adapters / that of the same batch on one merged model (empty
    without adapters).  `floor_ms`: the cache's bytes / bandwidth.  `logits_off`: largest difference between the logits
    of stock and absorbed, by the largest of stock's, for the same token and cache.  `out_of_memory`: ways that were.
    """

    context: int
    ways: list[Timed]
    adapters_cost: list[float]
    floor_ms: float
    logits_off: float | None
    out_of_memory: list[str]


@dataclass(frozen=True, slots=True)
class DecodeBench:
    """What `decode` measured."""

    model: str
    model_type: str
    device: str
    dtype: str
    threads: int
    batch: int
    adapters: int
    #: Kind of the cache of all ways but stock, whose is `DynamicCache`.
    cache: str
    runs: int
    params_total: int
    bandwidth_bytes_per_second: float
    #: (C + R) · attention modules · bytes of a number.
    formula_cache_bytes_per_token: int
    contexts: list[AtContext]
    prefill: Prefill

    @property
    def cache_agrees(self) -> bool:
        """Whether every cache had the formula's size, to the byte."""
        formula = self.formula_cache_bytes_per_token
        return all(t.cache_bytes_per_token == formula for at in self.contexts for t in at.ways)

    def to_json(self) -> dict[str, Any]:
        """The document that `mla-tune bench decode --json` prints."""
        return asdict(self) | {"cache_agrees": self.cache_agrees}
