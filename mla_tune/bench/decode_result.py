"""The figures of `bench decode` as dataclasses; `DecodeBench.to_json` is the document of `--json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class CaseResult:
    """The figures of one case at one context.  A list has one number for each round."""

    way: str
    """Name of the case: `stock`, `absorbed`, or `N adapters`."""
    ms: list[float]
    """Milliseconds of a decoding step, which gives each row of the batch one token."""
    ms_median: float
    """Median of `ms`."""
    tokens_per_second: float
    """Rows of the batch / `ms_median`."""
    ratios: list[float]
    """Stock's time / this case's; empty where stock ran out of memory."""
    ratio_median: float | None
    """Median of `ratios`; None where there are none."""
    cache_bytes_per_token: float
    """Bytes of cached keys and values for one token of one row, over all layers."""
    room_bytes_per_token: float
    """Bytes that the cache has allocated ahead, divided by the number of cached tokens of all rows."""
    transient_bytes: int
    """Peak bytes during a step above those before it."""
    step_bytes: int
    """Bytes that a step must read at least: weights, and the cache of all rows."""
    bandwidth_share: float
    """`step_bytes` / time / copy bandwidth: model bandwidth utilization (MBU)."""
    times_floor: float
    """This case's time / that of reading the cache once."""
    graph_ms: list[float]
    """Milliseconds of a step replayed as a CUDA graph; empty where the step was not captured."""


@dataclass(frozen=True, slots=True)
class PrefillResult:
    """Times of one prompt into an empty cache.  A list has one number for each round."""

    context: int
    """Tokens of the prompt."""
    stock_ms: list[float]
    """Milliseconds in stock transformers."""
    absorbed_ms: list[float]
    """Milliseconds of the absorbed model, in mode `auto`."""
    ratios: list[float]
    """Stock's time / absorbed time."""
    ratio_median: float
    """Median of `ratios`."""


@dataclass(frozen=True, slots=True)
class ContextResult:
    """The figures of all cases at one context."""

    context: int
    """Tokens in the cache of each row."""
    ways: list[CaseResult]
    """The cases that did not run out of memory."""
    adapters_cost: list[float]
    """For each round, the step time with unmerged adapters / that of the same batch on one merged model.  Empty without
    adapters."""
    floor_ms: float
    """Bytes of the cache / copy bandwidth: no step that reads each cached token once is faster."""
    logits_off: float | None
    """Largest difference between the logits of stock and absorbed / the largest of stock's, for the same token and
    cache; None where one of the two ran out of memory."""
    out_of_memory: list[str]
    """Names of the cases that ran out of memory."""


@dataclass(frozen=True, slots=True)
class DecodeBench:
    """The result of `bench decode`."""

    model: str
    """The model as the user named it."""
    model_type: str
    """`model_type` of its config.json."""
    device: str
    """Name of the GPU, or `cpu`."""
    dtype: str
    """Dtype of weights and cache."""
    threads: int
    """Threads of torch on the CPU."""
    batch: int
    """Rows of the batch."""
    adapters: int
    """Number of unmerged adapters."""
    cache: str
    """Class of the cache of all cases but stock, which has a `DynamicCache`."""
    runs: int
    """Number of rounds."""
    params_total: int
    """Parameters of the model."""
    bandwidth_bytes_per_second: float
    """Copy bandwidth of the device, read and written bytes both counted."""
    formula_cache_bytes_per_token: int
    """(C + R) · attention modules · bytes of a number."""
    contexts: list[ContextResult]
    """One entry for each context, in the order asked for."""
    prefill: PrefillResult
    """A prompt as long as the first context."""

    @property
    def cache_agrees(self) -> bool:
        """Whether every cache had the formula's size, to the byte."""
        formula = self.formula_cache_bytes_per_token
        return all(case.cache_bytes_per_token == formula for at in self.contexts for case in at.ways)

    def to_json(self) -> dict[str, Any]:
        """Return the document that `mla-tune bench decode --json` prints."""
        return asdict(self) | {"cache_agrees": self.cache_agrees}
