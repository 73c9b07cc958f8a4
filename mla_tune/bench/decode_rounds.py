"""The measurements of `bench decode`: one prompt into an empty cache, and decoding steps at one context."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from mla_tune.bench.decode_cases import ABSORBED, STOCK, BenchCase, cache_bytes, random_cache, room_bytes, shared_copy
from mla_tune.bench.decode_result import CaseResult, ContextResult, PrefillResult
from mla_tune.bench.meter import capture_graph, is_out_of_memory, median_ms, transient_bytes
from mla_tune.errors import WorkError

#: A function that is called with each line of progress.
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """What is the same at all contexts of one `bench decode`."""

    model: Any
    """The model without adapters, in evaluation mode."""
    cases: list[BenchCase]
    """What is compared: stock, absorbed and, where asked for, absorbed with unmerged adapters, in this order."""
    batch: int
    """Rows of the batch."""
    device: torch.device
    """Where model and caches are."""
    bandwidth: float
    """Copy bandwidth, bytes a second."""
    token_bytes: int
    """Bytes that the cache needs for one token of one row, by the formula."""
    runs: int
    """Number of rounds."""
    progress: Progress
    """Called with each line of progress."""


@dataclass(frozen=True, slots=True)
class _FirstStep:
    """What was found out about one case at one context before times are measured."""

    transient_bytes: int
    logits: torch.Tensor


def measure_prefill(run: DecodeRun, tokens: int) -> PrefillResult:
    """Time stock and absorbed with one random prompt of `tokens` tokens, into an empty cache.

    Raises `InputError` for a model that caches something else than latents, before anything is measured.
    """
    random_cache(run.model, 1, 1, run.device)
    generator = torch.Generator(run.device).manual_seed(0)
    ids = torch.randint(run.model.config.vocab_size, (1, tokens), generator=generator, device=run.device)

    def prefill(model: Any, case: BenchCase) -> None:
        cache = case.cache(config=run.model.config)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    ms: dict[str, list[float]] = {STOCK: [], ABSORBED: []}
    for i in range(run.runs):
        for case in run.cases[:2]:
            with case.prepared() as model:
                ms[case.name].append(median_ms(lambda model=model, case=case: prefill(model, case), run.device))
            run.progress(f"prefill {tokens:,}, round {i + 1} of {run.runs}: {case.name} {ms[case.name][-1]:.4g} ms")
    ratios = _ratios(ms[STOCK], ms[ABSORBED])
    return PrefillResult(tokens, ms[STOCK], ms[ABSORBED], ratios, statistics.median(ratios))


def measure_context(run: DecodeRun, S: int) -> ContextResult:
    """Measure all cases with `S` tokens in the cache.

    Raises `WorkError` where every case runs out of memory.
    """
    run.progress(f"context {S:,}: memory")
    caches: dict[type[DynamicCache], DynamicCache] = {}
    first = _first_steps(run, S, caches)
    cases = [case for case in run.cases if case.name in first]
    if not cases:
        raise WorkError(f"out of memory at {S:,} tokens; lower --contexts, --batch, --adapters or --layers")
    ms = _time_steps(run, S, cases, caches)
    graph_ms = _time_graphs(run, cases, caches)
    floor = run.token_bytes * run.batch * S / run.bandwidth * 1e3
    results = []
    for case in cases:
        ratios = _ratios(ms[STOCK], ms[case.name]) if STOCK in ms else []
        cache, median = caches[case.cache], statistics.median(ms[case.name])
        step_bytes = case.weight_bytes + cache_bytes(cache)
        results.append(
            CaseResult(
                way=case.name,
                ms=ms[case.name],
                ms_median=median,
                tokens_per_second=run.batch / median * 1e3,
                ratios=ratios,
                ratio_median=statistics.median(ratios) if ratios else None,
                cache_bytes_per_token=cache_bytes(cache) / (run.batch * S),
                room_bytes_per_token=room_bytes(cache) / (run.batch * S),
                transient_bytes=first[case.name].transient_bytes,
                step_bytes=step_bytes,
                bandwidth_share=step_bytes / (median / 1e3) / run.bandwidth,
                times_floor=median / floor,
                graph_ms=graph_ms[case.name],
            )
        )
    # A merged model has the shapes of its base, so `absorbed` is also the time of the batch on one merged model.
    adapted = run.cases[2].name if len(run.cases) > 2 else None
    return ContextResult(
        context=S,
        ways=results,
        adapters_cost=_ratios(ms[adapted], ms[ABSORBED]) if adapted in ms and ABSORBED in ms else [],
        floor_ms=floor,
        logits_off=_logits_difference(first),
        out_of_memory=[case.name for case in run.cases if case.name not in first],
    )


def _first_steps(run: DecodeRun, S: int, caches: dict[type[DynamicCache], DynamicCache]) -> dict[str, _FirstStep]:
    """Run each case for its transient memory and its logits; return those that did not run out of memory, by name.

    Fills `caches` with one cache of `S` tokens for each class of cache; later measurements use it.
    """
    done = {}
    for case in run.cases:

        def new_cache(case: BenchCase = case) -> DynamicCache:
            return random_cache(run.model, run.batch, S, run.device, case.cache)

        try:
            with case.prepared() as model:
                peak = transient_bytes(lambda cache, model=model: _step(run, model, cache), new_cache, run.device)
                if case.cache not in caches:
                    caches[case.cache] = new_cache()
                done[case.name] = _FirstStep(peak, _step(run, model, caches[case.cache]).float())
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            run.progress(f"context {S:,}: {case.name} runs out of memory")
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
    return done


def _time_steps(
    run: DecodeRun, S: int, cases: list[BenchCase], caches: dict[type[DynamicCache], DynamicCache]
) -> dict[str, list[float]]:
    """Return the milliseconds of a step, one number a round, by the name of the case; cases alternate."""
    ms: dict[str, list[float]] = {case.name: [] for case in cases}
    for i in range(run.runs):
        for case in cases:
            with case.prepared() as model:
                cache = caches[case.cache]
                ms[case.name].append(median_ms(lambda model=model, cache=cache: _step(run, model, cache), run.device))
            run.progress(f"context {S:,}, round {i + 1} of {run.runs}: {case.name} {ms[case.name][-1]:.4g} ms a token")
    return ms


def _time_graphs(
    run: DecodeRun, cases: list[BenchCase], caches: dict[type[DynamicCache], DynamicCache]
) -> dict[str, list[float]]:
    """Return the milliseconds of a step as a CUDA graph, one number a round; empty lists where it can't be captured.

    Each graph reads the tensors in `caches` (it captures a step on a copy that shares them).
    """
    ms: dict[str, list[float]] = {case.name: [] for case in cases}
    graphs = {}
    for case in cases:
        with case.prepared() as model:
            cache = caches[case.cache]
            replay = capture_graph(lambda model=model, cache=cache: _step(run, model, shared_copy(cache)), run.device)
        if replay is not None:
            graphs[case.name] = replay
    for _ in range(run.runs):
        for name, replay in graphs.items():
            ms[name].append(median_ms(replay, run.device))
    return ms


def _step(run: DecodeRun, model: Any, cache: DynamicCache) -> torch.Tensor:
    """Decode one token for each row in place of the last one in `cache`; return the logits."""
    cache.crop(-1)
    ids = torch.ones(run.batch, 1, dtype=torch.long, device=run.device)
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits


def _logits_difference(first: dict[str, _FirstStep]) -> float | None:
    """Return the largest difference of absorbed's logits from stock's / the largest of stock's."""
    if STOCK not in first or ABSORBED not in first:
        return None
    stock, absorbed = first[STOCK].logits, first[ABSORBED].logits
    return float((absorbed - stock).abs().max() / stock.abs().max())


def _ratios(numerators: list[float], denominators: list[float]) -> list[float]:
    """Return one ratio for each round."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]
