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
from threading import Event, RLock
from typing import Any

import torch
import transformers

from mla_tune.adapter.files import Adapter
from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.index import Checkpoint, TensorRef
from mla_tune.errors import WorkError
from mla_tune.verification.logits import memory
from mla_tune.verification.logits.differences import LogitsReport, difference
from mla_tune.verification.logits.empty_model import NotComputed, build
from mla_tune.verification.logits.streamed_model import StreamedModel
from mla_tune.verification.logits.streamed_weights import Weights

#: Relative to the largest logit: rows of a batch differ by as much when they are the same.
_NOISE = 1e-5
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
        needs = {
            name: memory.needed(arch, adapters, absorb, tokens=tokens, itemsize=d.itemsize)
            for name, d in _DTYPES.items()
        }
        free = memory.free_memory()
        self.dtype = next((name for name, need in needs.items() if need <= free * memory.SHARE), None)
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
            found["effect"] = difference("base", self.plain, "base + adapters", self.tuned)
            found["merged"] = difference("base + adapters", self.tuned, "merged", ours)
            found["idle"] = found["effect"].max_error <= _NOISE * found["effect"].largest
        if other is not None:
            found["absorbed"] = difference("merged", ours, "merged, absorbed", other)
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
            self.base, self._stock, readers, None if needs_whole_stacks(self.adapters) else memory.CHUNK
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
            streamed = self._streamed(merged, ATTENTION, readers, memory.CHUNK)
            absorb_attention(streamed.model, self.arch, absorbed, streamed.weights, streamed.dtype)
        else:
            streamed = self._streamed(merged, self._stock, readers, memory.CHUNK)
        streamed.stream(ids)
        model: Any = streamed.model
        logits = model(input_ids=ids, use_cache=False).logits.float()
        streamed.release()
        return logits[0], logits[1] if absorbed else None


@contextmanager
def _threads() -> Iterator[tuple[Executor, int]]:
    """Some threads that read, and their number; the other half of the cores computes meanwhile.  More threads than
    cores make torch's wait for each other at every product, many times as long as they compute."""
    threads, readers = torch.get_num_threads(), memory.reader_threads()
    torch.set_num_threads(max(1, threads - readers))
    try:
        with ThreadPoolExecutor(readers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool, readers
    finally:
        torch.set_num_threads(threads)
