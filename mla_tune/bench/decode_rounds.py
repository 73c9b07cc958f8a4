"""The measurements of `bench decode`: one prompt, and steps at one context, case by case in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from mla_tune.bench.decode_cases import ABSORBED, STOCK, BenchCase, cache_bytes, random_cache, room_bytes, shared_copy
from mla_tune.bench.decode_result import AtContext, Prefill, Timed
from mla_tune.bench.meter import captured, is_out_of_memory, median_ms, transient_bytes
from mla_tune.errors import WorkError

Say = Callable[[str], None]


def measure_prefill(model: Any, S: int, ways: list[BenchCase], device: torch.device, runs: int, say: Say) -> Prefill:
    random_cache(model, 1, 1, device)  # refuses what can't be measured, before anything is
    numbers = torch.Generator(device).manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, S), generator=numbers, device=device)

    def prompt(net: Any, way: BenchCase) -> None:
        net(input_ids=ids, past_key_values=way.cache(config=model.config), use_cache=True, logits_to_keep=1)

    ms: dict[str, list[float]] = {STOCK: [], ABSORBED: []}
    for i in range(runs):
        for way in ways[:2]:
            with way.ready() as net:
                ms[way.name].append(median_ms(lambda net=net, way=way: prompt(net, way), device))
            say(f"prefill {S:,}, round {i + 1} of {runs}: {way.name} {ms[way.name][-1]:.4g} ms")
    ratios = _ratios(ms[STOCK], ms[ABSORBED])
    return Prefill(S, ms[STOCK], ms[ABSORBED], ratios, statistics.median(ratios))


def measure_context(
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
            if not is_out_of_memory(error):
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
                ms[way.name].append(median_ms(lambda net=net, way=way: step(net, caches[way.cache]), device))
            say(f"context {S:,}, round {i + 1} of {runs}: {way.name} {ms[way.name][-1]:.4g} ms a token")
    graphs = _graphs(fits, lambda net, way: step(net, shared_copy(caches[way.cache])), device)
    graph_ms = {way.name: [] for way in fits}
    for _ in range(runs):
        for name, replay in graphs.items():
            graph_ms[name].append(median_ms(replay, device))
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


def _ratios(above: list[float], below: list[float]) -> list[float]:
    """One a round."""
    return [a / b for a, b in zip(above, below, strict=True)]
