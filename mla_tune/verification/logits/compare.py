"""The comparison of logits: does the merged model say what base + adapters say?

Three ways to the same logits, on some random tokens, layer by layer: (1) base and adapters unmerged, by PEFT; (2) the
merged checkpoint, by stock transformers; (3) the merged checkpoint with absorbed attention.  The base alone is computed
beside (1), to tell whether the adapters do anything at all.  Float32 where a layer fits into memory, so that what
differs is the weights; bfloat16 otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from threading import Event, RLock
from typing import Any

import torch
import transformers

from mla_tune.absorption.fold import absorbed_shapes
from mla_tune.adapter.deltas import Adapter
from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.index import Checkpoint, TensorRef
from mla_tune.errors import WorkError
from mla_tune.verification.logits.streamed_model import NotComputed, StreamedModel, build
from mla_tune.verification.logits.streamed_weights import Weights

#: Share of the free memory that a comparison may take.
_SHARE = 0.8
#: Memory beside weights, adapters and logits: attention, buffers of the reader, what is not given back at once.
_BESIDE = 100_000_000
#: Bytes of experts in memory at a time: few enough for a processor's cache.
_CHUNK = 8_000_000
#: Relative to the largest logit: rows of a batch differ by as much when they are the same.
_NOISE = 1e-5
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class LogitsDifference:
    """Logits of one way (`reference`) and another (`other`), over all tokens.

    `max_error` is the largest difference of two logits, `largest` the largest logit of the reference (without sign),
    `kl` the mean over tokens of KL(reference ‖ other) in nats, `top1` the share of tokens with the same best next one.
    """

    reference: str
    other: str
    max_error: float
    largest: float
    kl: float
    top1: float


@dataclass(frozen=True, slots=True)
class LogitsReport:
    """What the logits said.

    `ran` tells whether anything was compared; `reason` why not, or why not everything (empty: everything was).
    `effect` compares the base with base + adapters, `merged` base + adapters with the merged model, `absorbed` the
    merged model with its absorbed form; None where it was not compared.  `idle`: the adapters change no logit by
    more than float32's rounding does, so that a merge can't be told from none.  `memory` is the estimate in bytes
    that `dtype` was chosen by.
    """

    ran: bool
    reason: str
    tokens: int
    seed: int
    dtype: str | None
    effect: LogitsDifference | None
    merged: LogitsDifference | None
    absorbed: LogitsDifference | None
    idle: bool
    memory: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The document under `logits` in the results of `verify` and `merge-absorb`."""
        return asdict(self)


class LogitsComparison:
    """The logits of one merge: `reference` needs base and adapters only, `compare` the merged model as well.

    `adapters` stand with the weights of their deltas.  `absorb` says which tensors the absorbed files hold (split or
    fold; none: no comparison).  `tokens` random ones, drawn from `seed`, make one sequence.  `progress` is told bytes
    of weights as they are passed by, of the base and then of the merged model.  Threads may call what they like: one
    waits for the other.
    """

    def __init__(
        self,
        base: Checkpoint,
        arch: Architecture,
        adapters: Sequence[tuple[Adapter, float]],
        absorb: str,
        *,
        tokens: int = 16,
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.base, self.arch, self.adapters, self.absorb = base, arch, adapters, absorb
        self.tokens, self.seed, self.progress = tokens, seed, progress
        self.seconds = 0.0
        self._lock, self._stop = RLock(), Event()
        self._stock = "eager" if arch.family.eager_only else "sdpa"
        self.ids = torch.randint(0, arch.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))
        self.plain = self.tuned = None
        self.reason, self.done = "", False
        needs = {name: self._need(d.itemsize) for name, d in _DTYPES.items()}
        free = _free_memory()
        self.dtype = next((name for name, need in needs.items() if need <= free * _SHARE), None)
        self.memory = needs[self.dtype or "bfloat16"]
        if self.dtype is None:
            self.reason = f"a layer needs {self.memory / 1e9:.1f} GB in bfloat16, {free / 1e9:.1f} GB are free"

    def reference(self) -> None:
        """Compute the logits of the base and of base + adapters."""
        with self._lock:
            if not self.done and self.dtype is not None:
                try:
                    with self._computing() as readers:
                        self.plain, self.tuned, self.reason = self._unmerged(readers)
                except NotComputed as error:
                    self.dtype, self.reason = None, str(error)
            self.done = True

    def stop(self) -> None:
        """Let what another thread computes end soon, with an error."""
        self._stop.set()

    def compare(self, merged: Checkpoint, absorbed: Mapping[str, TensorRef]) -> LogitsReport:
        """The report for `merged` and the tensors of its absorbed files, by key.

        Raises `CheckError` where a checkpoint or the absorbed files lack a tensor, or one has another shape than the
        model's.
        """
        self.reference()
        wanted = absorbed if self.absorb != "none" else {}
        if self.dtype is None or (self.tuned is None and not wanted):
            return self._report(False)
        with self._computing() as readers:
            ours, other = self._merged(merged, wanted, readers)
        ways = {
            "the base": self.plain, "base + adapters": self.tuned, "the merged model": ours, "absorbed attention": other
        }  # fmt: skip
        for name, logits in ways.items():
            if logits is not None and not logits.isfinite().all():
                self.reason = f"logits of {name} are not finite numbers"
                return self._report(False)
        found: dict[str, Any] = {}
        if self.plain is not None and self.tuned is not None:
            found["effect"] = _compare("base", self.plain, "base + adapters", self.tuned)
            found["merged"] = _compare("base + adapters", self.tuned, "merged", ours)
            found["idle"] = found["effect"].max_error <= _NOISE * found["effect"].largest
        if other is not None:
            found["absorbed"] = _compare("merged", ours, "merged, absorbed", other)
        return self._report(True, **found)

    def _passed(self, nbytes: int) -> None:
        if self._stop.is_set():
            raise WorkError("the comparison of logits was stopped")
        if self.progress:
            self.progress(nbytes)

    def _report(self, ran: bool, **found: Any) -> LogitsReport:
        compared: dict[str, Any] = {"effect": None, "merged": None, "absorbed": None, "idle": False} | found
        about: dict[str, Any] = {"tokens": self.tokens, "seed": self.seed, "dtype": self.dtype, "memory": self.memory}
        return LogitsReport(ran=ran, reason=self.reason, seconds=self.seconds, **about, **compared)

    @contextmanager
    def _computing(self) -> Iterator[tuple[Executor, int]]:
        """Without gradients, and without transformers' remarks on the model; gives the threads that read."""
        started, verbosity = time.perf_counter(), transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        try:
            with torch.no_grad(), _threads() as readers:
                yield readers
        finally:
            transformers.logging.set_verbosity(verbosity)
            self.seconds += time.perf_counter() - started

    def _streamed(
        self, checkpoint: Checkpoint, attention: str, readers: tuple[Executor, int], chunk: int | None
    ) -> StreamedModel:
        assert self.dtype is not None
        # Of this checkpoint: experts may lie otherwise in another program's output.
        arch = self.arch.located(checkpoint.tensors)
        weights = Weights(checkpoint, arch)
        model = build(checkpoint, arch, attention)
        reader, ahead = readers
        dtype = _DTYPES[self.dtype]
        return StreamedModel(
            model, arch, weights, dtype, reader=reader, ahead=ahead, chunk=chunk, progress=self._passed
        )

    def _unmerged(self, readers: tuple[Executor, int]) -> tuple[torch.Tensor | None, torch.Tensor | None, str]:
        """(logits of the base, logits with the adapters, why there are none), logits (T, vocabulary) in float32."""
        from mla_tune.verification.logits.peft_reference import (
            PairedForward,
            PeftUnsupported,
            attach,
            needs_whole_stacks,
            summed_where_used,
        )

        streamed = self._streamed(
            self.base, self._stock, readers, None if needs_whole_stacks(self.adapters) else _CHUNK
        )
        try:
            model: Any = attach(streamed, self.adapters)
        except PeftUnsupported as error:
            why = f"merged was not compared with base + adapters, since PEFT does not compute them: {error}"
            return None, None, why
        streamed.stream(self.ids, PairedForward(streamed, model))
        with summed_where_used(streamed):
            logits = model(input_ids=self.ids.expand(2, -1), use_cache=False).logits.float()
        streamed.release()
        return logits[0], logits[1], ""

    def _merged(
        self, merged: Checkpoint, absorbed: Mapping[str, TensorRef], readers: tuple[Executor, int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits (T, vocabulary) in float32 of the merged model, and with absorbed attention."""
        ids = self.ids
        if absorbed:
            from mla_tune.verification.logits.absorbed_reference import ATTENTION, absorb_attention

            ids = ids.expand(2, -1)
            streamed = self._streamed(merged, ATTENTION, readers, _CHUNK)
            absorb_attention(streamed.model, self.arch, absorbed, streamed.weights, streamed.dtype)
        else:
            streamed = self._streamed(merged, self._stock, readers, _CHUNK)
        streamed.stream(ids)
        model: Any = streamed.model
        logits = model(input_ids=ids, use_cache=False).logits.float()
        streamed.release()
        return logits[0], logits[1] if absorbed else None

    def _need(self, itemsize: int) -> int:
        """Bytes at the peak: the largest piece with its absorbed tensors, all adapters, and logits."""
        from mla_tune.verification.logits.peft_reference import needs_whole_stacks

        layers: dict[int | None, int] = {}
        for site in self.arch:
            numbers = site.params
            if site.is_experts and needs_whole_stacks(self.adapters):
                numbers *= 4  # W, two deltas, and their sum with W
            elif site.is_experts:
                numbers = (_readers() + 1) * max(_CHUNK // itemsize, numbers // site.count)
            layers[site.layer] = layers.get(site.layer, 0) + numbers * itemsize
        kinds = {a.dims for a in self.arch.attention} if self.absorb != "none" else set()
        sizes = [sum(prod(shape) for shape in absorbed_shapes(d, self.absorb).values()) for d in kinds]
        module = max(sizes, default=0)
        held = sum(ref.nbytes for adapter, _ in self.adapters for ref in adapter.refs())
        logits = self.tokens * self.arch.vocab_size * 4
        return max(layers.values()) + module * 2 * itemsize + held + 8 * logits + _BESIDE


def _compare(reference: str, a: torch.Tensor, other: str, b: torch.Tensor) -> LogitsDifference:
    """Of logits (T, vocabulary), token by token: in float64 all of them at once are more than a layer's weights."""
    kl = same = 0.0
    for x, y in zip(a, b, strict=True):
        p, q = x.double().log_softmax(-1), y.double().log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        same += float(x.argmax() == y.argmax())
    return LogitsDifference(
        reference=reference,
        other=other,
        max_error=float((a - b).abs().max()),
        largest=float(a.abs().max()),
        kl=kl / len(a),
        top1=same / len(a),
    )


def _readers() -> int:
    return max(1, min(8, torch.get_num_threads() // 2))


@contextmanager
def _threads() -> Iterator[tuple[Executor, int]]:
    """Some threads that read, and their number; the other half of the cores computes meanwhile.  More threads than
    cores make torch's wait for each other at every product, many times as long as they compute."""
    threads, readers = torch.get_num_threads(), _readers()
    torch.set_num_threads(max(1, threads - readers))
    try:
        with ThreadPoolExecutor(readers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool, readers
    finally:
        torch.set_num_threads(threads)


def _free_memory() -> int:
    """Bytes that can be had without swapping: those of the machine, or of the container where it has fewer."""
    import psutil

    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no limit, or none that can be read
        return free
    return min(free, limit - used)
