"""Decoding measured: stock transformers, absorbed, and absorbed with an adapter of its own for each row of the batch.

The ways take turns, round after round, on one cache of random latents (no prefill: what the numbers are does not change
how long they take).  Every step decodes one token a row, the last of exactly S tokens of context.

    ms a token     time of a step: each of the B rows gets one token       tokens a second     B / that time
    ratio          stock's time / this way's, one a round                  transient           peak above rest in a step
    bandwidth      (weights that a step must read, once + cache) / time / bandwidth of a copy: how much of the machine
                   is used, were nothing read twice (model bandwidth utilisation)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import DynamicCache

from mla_tune.arch.dims import DTYPE_BYTES
from mla_tune.errors import InputError, WorkError
from mla_tune.model.load import DTYPES, Loaded, quiet
from mla_tune.runtime.contenders import ABSORBED, STOCK, Way, cache_bytes, load, random_cache, ways_of
from mla_tune.runtime.meter import copy_bandwidth, synchronize, transient_bytes

#: Of one way in one round: the fewest and the most steps, and the seconds between them that are enough.
_LEAST, _MOST, _SECONDS = 3, 20, 0.5

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Timed:
    """One way at one context; lists have one number a round."""

    way: str
    ms: list[float]
    ms_median: float
    tokens_per_second: float
    #: Stock's time / this way's.
    ratios: list[float]
    ratio_median: float
    #: Of the tensors in the cache, a token of one row, over all layers.
    cache_bytes_per_token: float
    transient_bytes: int
    #: That a step must read at least: weights and cache of all rows.
    step_bytes: int
    bandwidth_share: float


@dataclass(frozen=True, slots=True)
class Prefill:
    """One prompt of `context` tokens, absorbed (mode auto) against stock; lists have one number a round."""

    context: int
    stock_ms: list[float]
    absorbed_ms: list[float]
    #: Stock's time / absorbed time.
    ratios: list[float]
    ratio_median: float


@dataclass(frozen=True, slots=True)
class AtContext:
    """All ways at one context; `adapters_cost`, one a round, is the time of unmerged adapters / that of the same batch
    on one merged model (empty without adapters)."""

    context: int
    ways: list[Timed]
    adapters_cost: list[float]


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
        return asdict(self) | {"cache_agrees": self.cache_agrees}


def decode(
    model: str,
    *,
    contexts: Sequence[int] = (512, 2048, 8192),
    batch: int = 1,
    adapters: int = 0,
    dtype: str = "auto",
    runs: int = 3,
    say: Say = lambda line: None,
) -> DecodeBench:
    """Measure `model`: 'bench', or what `generate` takes, and the presets.

    `adapters`: that many unmerged LoRAs of rank 16 on all attention matrices, random, a row of the batch each in turn;
    the batch is at least as large.  `dtype` of weights and cache; auto: bfloat16 on a GPU, float32 on a CPU.
    Raises `InputError` before weights are read for what does not fit together, `WorkError` when memory runs out.
    """
    _check(contexts, batch, adapters, dtype, runs)
    quiet()
    loaded = load(model, contexts, dtype)
    try:
        return measure(loaded, model, contexts=contexts, batch=batch, adapters=adapters, runs=runs, say=say)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise WorkError("out of memory; lower --contexts, --batch or --adapters") from error
        raise


def measure(
    loaded: Loaded, name: str, *, contexts: Sequence[int], batch: int, adapters: int, runs: int, say: Say
) -> DecodeBench:
    """`decode` of a model in memory, which is in evaluation mode afterwards and else as it was."""
    model, arch, device = loaded.model.eval(), loaded.arch, loaded.device
    batch = max(batch, adapters)
    ways = ways_of(model, arch, batch, adapters, DTYPE_BYTES[loaded.dtype])
    say("bandwidth of a copy")
    bandwidth = copy_bandwidth(device)
    with torch.no_grad():
        prefill = _prefill(model, contexts[0], ways, device, runs, say)
        found = [_at_context(model, S, batch, ways, device, bandwidth, runs, say) for S in contexts]
    return DecodeBench(
        model=name,
        model_type=arch.model_type,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        dtype=loaded.dtype,
        threads=torch.get_num_threads(),
        batch=batch,
        adapters=adapters,
        runs=runs,
        params_total=arch.params_total,
        bandwidth_bytes_per_second=bandwidth,
        formula_cache_bytes_per_token=arch.kv_bytes(loaded.dtype)[0],
        contexts=found,
        prefill=prefill,
    )


def _at_context(
    model: Any, S: int, batch: int, ways: list[Way], device: torch.device, bandwidth: float, runs: int, say: Say
) -> AtContext:
    ids = torch.ones(batch, 1, dtype=torch.long, device=device)

    def filled() -> DynamicCache:
        return random_cache(model, batch, S, device)

    def step(net: Any, cache: DynamicCache) -> None:
        cache.crop(-1)
        net(input_ids=ids, past_key_values=cache, use_cache=True)

    say(f"context {S:,}: memory")
    transients = {}
    for way in ways:
        with way.ready() as net:
            transients[way.name] = transient_bytes(lambda cache, net=net: step(net, cache), filled, device)
    cache = filled()
    ms: dict[str, list[float]] = {way.name: [] for way in ways}
    sizes = {}
    for i in range(runs):
        for way in ways:
            with way.ready() as net:
                ms[way.name].append(_median_ms(lambda net=net: step(net, cache), device))
            sizes[way.name] = cache_bytes(cache)
            say(f"context {S:,}, round {i + 1} of {runs}: {way.name} {ms[way.name][-1]:.4g} ms a token")
    timed = []
    for way in ways:
        ratios = _ratios(ms[STOCK], ms[way.name])
        median, size = statistics.median(ms[way.name]), way.weight_bytes + sizes[way.name]
        timed.append(
            Timed(
                way=way.name,
                ms=ms[way.name],
                ms_median=median,
                tokens_per_second=batch / median * 1e3,
                ratios=ratios,
                ratio_median=statistics.median(ratios),
                cache_bytes_per_token=sizes[way.name] / (batch * S),
                transient_bytes=transients[way.name],
                step_bytes=size,
                bandwidth_share=size / (median / 1e3) / bandwidth,
            )
        )
    cost = _ratios(ms[ways[2].name], ms[ABSORBED]) if len(ways) > 2 else []
    return AtContext(S, timed, cost)


def _prefill(model: Any, S: int, ways: list[Way], device: torch.device, runs: int, say: Say) -> Prefill:
    random_cache(model, 1, 1, device)  # refuses what can't be measured, before anything is
    numbers = torch.Generator(device).manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, S), generator=numbers, device=device)

    def prompt(net: Any) -> None:
        net(input_ids=ids, past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1)

    ms: dict[str, list[float]] = {STOCK: [], ABSORBED: []}
    for i in range(runs):
        for way in ways[:2]:
            with way.ready() as net:
                ms[way.name].append(_median_ms(lambda net=net: prompt(net), device))
            say(f"prefill {S:,}, round {i + 1} of {runs}: {way.name} {ms[way.name][-1]:.4g} ms")
    ratios = _ratios(ms[STOCK], ms[ABSORBED])
    return Prefill(S, ms[STOCK], ms[ABSORBED], ratios, statistics.median(ratios))


def _median_ms(call: Callable[[], None], device: torch.device) -> float:
    """Of a few calls: at least three, so that one that was interrupted does not count."""

    def timed() -> float:
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        return time.perf_counter() - began

    if timed() < _SECONDS:  # the first warms up; a second one where it is cheap
        call()
    times: list[float] = []
    while len(times) < _LEAST or (len(times) < _MOST and sum(times) < _SECONDS):
        times.append(timed())
    return statistics.median(times) * 1e3


def _ratios(above: list[float], below: list[float]) -> list[float]:
    """One a round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def _check(contexts: Sequence[int], batch: int, adapters: int, dtype: str, runs: int) -> None:
    if not contexts or min(contexts) < 2:
        raise InputError("--contexts: expected one or more counts of tokens, each 2 or more, as in 512,2048,8192")
    for option, value, least in (("--batch", batch, 1), ("--adapters", adapters, 0), ("--runs", runs, 1)):
        if value < least:
            raise InputError(f"{option} {value}: must be {least} or more")
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: allowed are {', '.join(DTYPES)}")
