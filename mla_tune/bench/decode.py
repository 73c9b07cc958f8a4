"""Decoding measured: stock transformers, absorbed, and absorbed with an adapter of its own for each row of the batch.

The ways take turns, round after round, on caches of the same random latents (no prefill: what the numbers are does not
change how long they take).  Every step decodes one token a row, the last of exactly S tokens of context.

    ms a token     time of a step: each of the B rows gets one token       tokens a second     B / that time
    ratio          stock's time / this way's, one a round                  transient           peak above rest in a step
    bandwidth      (weights that a step must read, once + cache) / time / bandwidth of a copy: how much of the machine
                   is used, were nothing read twice (model bandwidth utilization)
    floor          bytes of the cache / bandwidth of a copy: no step that reads each cached token once is faster
    graph          on a GPU, a step as a CUDA graph: the GPU's own time, where Python would take longer to ask for it

A way that runs out of memory is told, and the others go on.
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
from mla_tune.bench.decode_cases import (
    ABSORBED,
    STOCK,
    BenchCase,
    bench_cases,
    cache_bytes,
    load,
    random_cache,
    room_bytes,
    shared_copy,
)
from mla_tune.bench.meter import captured, copy_bandwidth, synchronize, transient_bytes
from mla_tune.errors import InputError, WorkError
from mla_tune.inference.latent_cache import LatentCache
from mla_tune.model.load import DTYPES, Loaded, silence_libraries

#: Of one way in one round: the fewest and the most steps, and the seconds between them that are enough.
_LEAST, _MOST, _SECONDS = 3, 20, 0.5
CACHES: dict[str, type[DynamicCache]] = {"latent": LatentCache, "dynamic": DynamicCache}

Say = Callable[[str], None]


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


def decode(
    model: str,
    *,
    contexts: Sequence[int] = (512, 2048, 8192),
    batch: int = 1,
    adapters: int = 0,
    dtype: str = "auto",
    runs: int = 3,
    layers: int | None = None,
    cache: str = "latent",
    say: Say = lambda line: None,
) -> DecodeBench:
    """Measure `model`: a name in `contenders.REFERENCES` (of `layers` layers), or what `generate` takes, and presets.

    `adapters`: that many unmerged LoRAs of rank 16 on all attention matrices, random, a row of the batch each in turn;
    the batch is at least as large.  `dtype` of weights and cache; auto: bfloat16 on a GPU, float32 on a CPU.  `cache`
    of all ways but stock: latent (`LatentCache`) or dynamic (transformers' `DynamicCache`, as stock's).
    Raises `InputError` before weights are read for what does not fit together, `WorkError` when memory runs out.
    """
    _check(contexts, batch, adapters, dtype, runs, layers, cache)
    silence_libraries()
    try:
        loaded = load(model, contexts, dtype, layers)
        return measure(
            loaded, model, contexts=contexts, batch=batch, adapters=adapters, runs=runs, cache=cache, say=say
        )
    except RuntimeError as error:
        if _is_out_of_memory(error):
            raise WorkError("out of memory; lower --contexts, --batch, --adapters or --layers") from error
        raise


def measure(
    loaded: Loaded,
    name: str,
    *,
    contexts: Sequence[int],
    batch: int,
    adapters: int,
    runs: int,
    say: Say,
    cache: str = "latent",
) -> DecodeBench:
    """`decode` of a model in memory, which is in evaluation mode afterwards and else as it was."""
    model, arch, device = loaded.model.eval(), loaded.arch, loaded.device
    batch = max(batch, adapters)
    ways = bench_cases(model, arch, batch, adapters, DTYPE_BYTES[loaded.dtype], CACHES[cache])
    say("bandwidth of a copy")
    bandwidth = copy_bandwidth(device)
    with torch.inference_mode():
        prefill = _prefill(model, contexts[0], ways, device, runs, say)
        token = arch.kv_bytes(loaded.dtype)[0]
        found = [
            _at_context(
                model,
                S,
                batch,
                ways,
                device=device,
                bandwidth=bandwidth,
                floor=token * batch * S / bandwidth * 1e3,
                runs=runs,
                say=say,
            )
            for S in contexts
        ]
    return DecodeBench(
        model=name,
        model_type=arch.model_type,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        dtype=loaded.dtype,
        threads=torch.get_num_threads(),
        batch=batch,
        adapters=adapters,
        cache=CACHES[cache].__name__,
        runs=runs,
        params_total=arch.params_total,
        bandwidth_bytes_per_second=bandwidth,
        formula_cache_bytes_per_token=arch.kv_bytes(loaded.dtype)[0],
        contexts=found,
        prefill=prefill,
    )


def _at_context(
    model: Any,
    S: int,
    batch: int,
    ways: list[BenchCase],
    *,
    device: torch.device,
    bandwidth: float,
    floor: float,
    runs: int,
    say: Say,
) -> AtContext:
    ids = torch.ones(batch, 1, dtype=torch.long, device=device)

    def step(net: Any, cache: DynamicCache) -> torch.Tensor:
        cache.crop(-1)
        return net(input_ids=ids, past_key_values=cache, use_cache=True).logits

    say(f"context {S:,}: memory")
    fits: list[BenchCase] = []
    transients, caches, logits = {}, {}, {}
    for way in ways:
        try:
            with way.ready() as net:
                transients[way.name] = transient_bytes(
                    lambda cache, net=net: step(net, cache),
                    lambda way=way: _filled(model, batch, S, device, way),
                    device,
                )
                if way.cache not in caches:
                    caches[way.cache] = _filled(model, batch, S, device, way)
                logits[way.name] = step(net, caches[way.cache]).float()
            fits.append(way)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            say(f"context {S:,}: {way.name} runs out of memory")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if not fits:
        raise WorkError(f"out of memory at {S:,} tokens; lower --contexts, --batch, --adapters or --layers")
    ms: dict[str, list[float]] = {way.name: [] for way in fits}
    for i in range(runs):
        for way in fits:
            with way.ready() as net:
                ms[way.name].append(_median_ms(lambda net=net, way=way: step(net, caches[way.cache]), device))
            say(f"context {S:,}, round {i + 1} of {runs}: {way.name} {ms[way.name][-1]:.4g} ms a token")
    graphs = _graphs(fits, lambda net, way: step(net, shared_copy(caches[way.cache])), device)
    graph_ms = {way.name: [] for way in fits}
    for _ in range(runs):
        for name, replay in graphs.items():
            graph_ms[name].append(_median_ms(replay, device))
    del graphs
    timed = []
    for way in fits:
        ratios = _ratios(ms[STOCK], ms[way.name]) if STOCK in ms else []
        held, median = caches[way.cache], statistics.median(ms[way.name])
        size = way.weight_bytes + cache_bytes(held)
        timed.append(
            Timed(
                way=way.name,
                ms=ms[way.name],
                ms_median=median,
                tokens_per_second=batch / median * 1e3,
                ratios=ratios,
                ratio_median=statistics.median(ratios) if ratios else None,
                cache_bytes_per_token=cache_bytes(held) / (batch * S),
                room_bytes_per_token=room_bytes(held) / (batch * S),
                transient_bytes=transients[way.name],
                step_bytes=size,
                bandwidth_share=size / (median / 1e3) / bandwidth,
                times_floor=median / floor,
                graph_ms=graph_ms[way.name],
            )
        )
    both = ABSORBED in ms and len(ways) > 2 and ways[2].name in ms
    return AtContext(
        context=S,
        ways=timed,
        adapters_cost=_ratios(ms[ways[2].name], ms[ABSORBED]) if both else [],
        floor_ms=floor,
        logits_off=_off(logits[STOCK], logits[ABSORBED]) if {STOCK, ABSORBED} <= logits.keys() else None,
        out_of_memory=[way.name for way in ways if way not in fits],
    )


def _graphs(
    ways: list[BenchCase], step: Callable[[Any, BenchCase], object], device: torch.device
) -> dict[str, Callable[[], None]]:
    """A step of each way that can be captured, by name; what it reads and does not make must outlive it."""
    found = {}
    for way in ways:
        with way.ready() as net:
            replay = captured(lambda net=net, way=way: step(net, way), device)
        if replay is not None:
            found[way.name] = replay
    return found


def _filled(model: Any, batch: int, S: int, device: torch.device, way: BenchCase) -> DynamicCache:
    return random_cache(model, batch, S, device, way.cache)


def _off(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found - right).abs().max() / right.abs().max())


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _prefill(model: Any, S: int, ways: list[BenchCase], device: torch.device, runs: int, say: Say) -> Prefill:
    random_cache(model, 1, 1, device)  # refuses what can't be measured, before anything is
    numbers = torch.Generator(device).manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, S), generator=numbers, device=device)

    def prompt(net: Any, way: BenchCase) -> None:
        net(input_ids=ids, past_key_values=way.cache(config=model.config), use_cache=True, logits_to_keep=1)

    ms: dict[str, list[float]] = {STOCK: [], ABSORBED: []}
    for i in range(runs):
        for way in ways[:2]:
            with way.ready() as net:
                ms[way.name].append(_median_ms(lambda net=net, way=way: prompt(net, way), device))
            say(f"prefill {S:,}, round {i + 1} of {runs}: {way.name} {ms[way.name][-1]:.4g} ms")
    ratios = _ratios(ms[STOCK], ms[ABSORBED])
    return Prefill(S, ms[STOCK], ms[ABSORBED], ratios, statistics.median(ratios))


def _median_ms(call: Callable[[], object], device: torch.device) -> float:
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


def _check(
    contexts: Sequence[int], batch: int, adapters: int, dtype: str, runs: int, layers: int | None, cache: str
) -> None:
    if not contexts or min(contexts) < 2:
        raise InputError("--contexts: expected one or more counts of tokens, each 2 or more, as in 512,2048,8192")
    counts = (("--batch", batch, 1), ("--adapters", adapters, 0), ("--runs", runs, 1), ("--layers", layers, 1))
    for option, value, least in counts:
        if value is not None and value < least:
            raise InputError(f"{option} {value}: must be {least} or more")
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: allowed are {', '.join(DTYPES)}")
    if cache not in CACHES:
        raise InputError(f"--cache {cache}: allowed are {', '.join(CACHES)}")
