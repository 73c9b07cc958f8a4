"""Measure a call: its time, its transient memory, a CUDA graph of it; and the copy bandwidth of a device."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

#: Label of the measured call in the profile.
_LABEL = "mla_tune: measured call"
#: Calls that `median_ms` times: at least, at most, and the seconds after which it has enough.
_MIN_CALLS, _MAX_CALLS, _SECONDS = 3, 20, 0.5


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished all work queued on it; a CPU has nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def median_ms(call: Callable[[], object], device: torch.device) -> float:
    """Return the median milliseconds of `call`, after one or two calls to warm up.

    It takes at least three calls, so that one that the machine interrupted does not count.
    """

    def seconds() -> float:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        return time.perf_counter() - start

    if seconds() < _SECONDS:  # a second call to warm up, where it is cheap
        call()
    times: list[float] = []
    while len(times) < _MIN_CALLS or (len(times) < _MAX_CALLS and sum(times) < _SECONDS):
        times.append(seconds())
    return statistics.median(times) * 1e3


def capture_graph(call: Callable[[], object], device: torch.device) -> Callable[[], None] | None:
    """Capture the GPU work of `call` as a CUDA graph; return a function that replays it without Python's launch time.

    The tensors that `call` reads and does not make must live as long as the graph.  Returns None on a CPU, where `call`
    can't be captured (because the host waits for a result), and where memory runs out.
    """
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()  # a graph has its own pool of memory
    warm_up, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    warm_up.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(warm_up):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(warm_up)
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        synchronize(device)
        return None
    return graph.replay


def copy_bandwidth(device: torch.device, size: int | None = None, runs: int = 5) -> float:
    """Return the bytes a second of a copy of `size` bytes, read and written bytes both counted, as STREAM does.

    It is the best of `runs`.  The default of `size` is 256 MB on a CPU and 1 GB on a GPU: far more than the caches of
    a processor hold.
    """
    if size is None:
        size = 1 << 30 if device.type == "cuda" else 1 << 28
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)  # written here, so that the copies need no new memory pages
    best = 0.0
    for _ in range(runs):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - start))
    return best


def transient_bytes(call: Callable[[Any], object], setup: Callable[[], Any], device: torch.device) -> int:
    """Return the peak bytes of tensors during `call(setup())` above those before it.

    `setup` is called once and `call` twice; the second call is measured.  On a CPU torch's profiler records each
    allocation by torch's allocator, those inside operators included, but not what a library below torch (MKL)
    allocates itself.
    """
    if device.type == "cuda":
        state = setup()
        call(state)
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call(state)
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it writes to standard error when it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        state = setup()  # inside: the profiler does not see the release of memory that was allocated before it started
        call(state)
        with record_function(_LABEL):
            call(state)
    events: list[Any] = list(_kineto_results(recorded).events())
    start = next(event.start_ns() for event in events if event.name() == _LABEL)
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]" and e.start_ns() >= start]
    level = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        level += change
        peak = max(peak, level)
    return peak


def _kineto_results(recorded: Any) -> Any:
    """Return the single events, releases of memory included; the profiler's public tables only have sums."""
    return recorded.profiler.kineto_results
