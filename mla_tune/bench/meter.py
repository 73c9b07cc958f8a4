"""What a machine gives and what a call takes: memory bandwidth, and memory above the resting level."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "mla_tune: the call that is measured"
#: Of one way in one round: the fewest and the most steps, and the seconds between them that are enough.
_LEAST, _MOST, _SECONDS = 3, 20, 0.5


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], None] | None:
    """What `call` makes a GPU do, as one CUDA graph to be run again: without the time that Python takes to ask for it.
    None on a CPU, and where it can't be captured (the host waits for a result) or memory runs out."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()  # a graph has memory of its own
    beside, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    beside.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(beside):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(beside)
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        synchronize(device)
        return None
    return graph.replay


def copy_bandwidth(device: torch.device, size: int | None = None, runs: int = 5) -> float:
    """Bytes a second of a copy of `size` bytes (default: 256 MB on a CPU, 1 GB on a GPU: far more than a cache holds),
    read and written bytes both counted (as STREAM does), the best of `runs`."""
    if size is None:
        size = 1 << 30 if device.type == "cuda" else 1 << 28
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)  # written once already: the copies find its pages in place
    best = 0.0
    for _ in range(runs):
        synchronize(device)
        began = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - began))
    return best


def transient_bytes(call: Callable[[Any], object], setup: Callable[[], Any], device: torch.device) -> int:
    """Peak bytes of tensors during `call(setup())` above those before it.  Calls it twice and measures the second time.

    On a CPU torch's own allocator is watched, by its profiler, temporaries inside of operators included; what a library
    below torch (MKL) takes for itself is not seen.
    """
    if device.type == "cuda":
        state = setup()
        call(state)
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        resting = torch.cuda.memory_allocated(device)
        call(state)
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - resting
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells standard error when it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        state = setup()  # here: a block that was there before the profiler is not seen to be freed
        call(state)
        with record_function(_MARK):
            call(state)
    events: list[Any] = list(_kineto(recorded).events())
    began = next(event.start_ns() for event in events if event.name() == _MARK)
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]" and e.start_ns() >= began]
    level = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        level += change
        peak = max(peak, level)
    return peak


def _kineto(recorded: Any) -> Any:
    """The single events, frees among them: the profiler's public tables have sums over an operator only."""
    return recorded.profiler.kineto_results


def median_ms(call: Callable[[], object], device: torch.device) -> float:
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


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
