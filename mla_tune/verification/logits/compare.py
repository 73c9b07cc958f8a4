"""The comparison of logits: does the merged model compute what base + adapters compute?

The same random tokens go through (1) the base, (2) base and adapters, unmerged, by PEFT, (3) the merged checkpoint by
stock transformers, and (4) the merged checkpoint with absorbed attention.  (1) tells whether the adapters change any
logit at all.  Models are computed layer by layer, so that memory holds one layer: in float32 where that fits, so that
only the weights differ, and otherwise in bfloat16.
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

from mla_tune.adapter.deltas import Adapter
from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.index import Checkpoint, TensorRef
from mla_tune.errors import WorkError
from mla_tune.verification.logits import memory
from mla_tune.verification.logits.differences import LogitsReport, difference
from mla_tune.verification.logits.empty_model import LogitsUnavailable, build_empty_model
from mla_tune.verification.logits.streamed_model import StreamedModel
from mla_tune.verification.logits.streamed_weights import WeightReader

#: The adapters change nothing if all logits change by less than this share of the largest: two equal rows of one batch
#: differ by as much.
_NOISE = 1e-5
#: The dtypes to compute in, the preferred one first.
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LogitsComparison:
    """Compares the logits of one merge.

    `compute_reference` needs base and adapters only and may run before the merged model exists; `compare` needs all.
    Any thread may call them: calls wait for each other.
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
        """`adapters` are given with their weights.

        `absorb` is the mode of the absorbed tensors to compare: `split`, `fold`, or `none`.  One sequence of `tokens`
        random tokens, drawn from `seed`, is the input.  `progress(n)` is called for every n bytes of weights that are
        done, of the base and then of the merged model.
        """
        self.base, self.arch, self.adapters, self.absorb = base, arch, adapters, absorb
        self.tokens, self.seed, self.progress = tokens, seed, progress
        self.seconds = 0.0
        self._lock, self._stop = RLock(), Event()
        self._attention = "eager" if arch.family.eager_only else "sdpa"
        self.ids = torch.randint(0, arch.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))
        self.base_logits = self.adapted_logits = None
        #: Why something was not compared; empty where everything was.
        self.reason = ""
        self._has_reference = False
        needs = {
            name: memory.needed(arch, adapters, absorb, tokens=tokens, itemsize=d.itemsize)
            for name, d in _DTYPES.items()
        }
        free = memory.free_memory()
        self.dtype = next((name for name, need in needs.items() if need <= free * memory.SHARE), None)
        self.memory = needs[self.dtype or "bfloat16"]
        if self.dtype is None:
            self.reason = f"one layer needs {self.memory / 1e9:.1f} GB in bfloat16, but {free / 1e9:.1f} GB are free"

    def compute_reference(self) -> None:
        """Compute the logits of the base and of base + adapters; does nothing when called again."""
        with self._lock:
            if not self._has_reference and self.dtype is not None:
                try:
                    with self._computing() as readers:
                        self.base_logits, self.adapted_logits, self.reason = self._reference_logits(readers)
                except LogitsUnavailable as error:
                    self.dtype, self.reason = None, str(error)
            self._has_reference = True

    def stop(self) -> None:
        """Make the computation in another thread end soon, with `WorkError`."""
        self._stop.set()

    def compare(self, merged: Checkpoint, absorbed: Mapping[str, TensorRef]) -> LogitsReport:
        """Compare `merged`, and its `absorbed` tensors by key, with base + adapters; returns the report.

        Raises `CheckError` where a checkpoint or the absorbed files lack a tensor, or one has another shape than the
        model's.
        """
        self.compute_reference()
        wanted = absorbed if self.absorb != "none" else {}
        if self.dtype is None or (self.adapted_logits is None and not wanted):
            return self._report(ran=False)
        with self._computing() as readers:
            merged_logits, absorbed_logits = self._merged_logits(merged, wanted, readers)
        computed = {
            "the base": self.base_logits,
            "base + adapters": self.adapted_logits,
            "the merged model": merged_logits,
            "absorbed attention": absorbed_logits,
        }
        for name, logits in computed.items():
            if logits is not None and not logits.isfinite().all():
                self.reason = f"the logits of {name} are not finite numbers"
                return self._report(ran=False)
        found: dict[str, Any] = {}
        if self.base_logits is not None and self.adapted_logits is not None:
            found["effect"] = difference("base", self.base_logits, "base + adapters", self.adapted_logits)
            found["merged"] = difference("base + adapters", self.adapted_logits, "merged", merged_logits)
            found["idle"] = found["effect"].max_error <= _NOISE * found["effect"].largest
        if absorbed_logits is not None:
            found["absorbed"] = difference("merged", merged_logits, "merged, absorbed", absorbed_logits)
        return self._report(ran=True, **found)

    def _report_progress(self, nbytes: int) -> None:
        if self._stop.is_set():
            raise WorkError("the comparison of logits was stopped")
        if self.progress:
            self.progress(nbytes)

    def _report(self, *, ran: bool, **found: Any) -> LogitsReport:
        compared: dict[str, Any] = {"effect": None, "merged": None, "absorbed": None, "idle": False} | found
        about: dict[str, Any] = {"tokens": self.tokens, "seed": self.seed, "dtype": self.dtype, "memory": self.memory}
        return LogitsReport(ran=ran, reason=self.reason, seconds=self.seconds, **about, **compared)

    @contextmanager
    def _computing(self) -> Iterator[tuple[Executor, int]]:
        """Switch off gradients and transformers' warnings; yields the threads that read, and their number."""
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
        # Another tool may have stored the experts of this checkpoint in another layout.
        arch = self.arch.located(checkpoint.tensors)
        weights = WeightReader(checkpoint, arch)
        model = build_empty_model(checkpoint, arch, attention)
        threads, read_ahead = readers
        dtype = _DTYPES[self.dtype]
        return StreamedModel(
            model,
            arch,
            weights,
            dtype,
            threads=threads,
            read_ahead=read_ahead,
            chunk=chunk,
            progress=self._report_progress,
        )

    def _reference_logits(self, readers: tuple[Executor, int]) -> tuple[torch.Tensor | None, torch.Tensor | None, str]:
        """Return the logits of the base and of base + adapters, (T, vocabulary) in float32; or None, None, reason."""
        from mla_tune.verification.logits.peft_reference import (
            PairedForward,
            PeftUnsupported,
            attach_adapters,
            expert_deltas_in_place,
            needs_all_experts,
        )

        streamed = self._streamed(
            self.base, self._attention, readers, None if needs_all_experts(self.adapters) else memory.CHUNK
        )
        try:
            model: Any = attach_adapters(streamed, self.adapters)
        except PeftUnsupported as error:
            reason = f"base + adapters was not compared with merged, because PEFT can't compute it: {error}"
            return None, None, reason
        streamed.stream(self.ids, PairedForward(streamed, model))
        with expert_deltas_in_place(streamed):
            logits = model(input_ids=self.ids.expand(2, -1), use_cache=False).logits.float()
        streamed.release()
        return logits[0], logits[1], ""

    def _merged_logits(
        self, merged: Checkpoint, absorbed: Mapping[str, TensorRef], readers: tuple[Executor, int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the logits of the merged model, and those with absorbed attention: (T, vocabulary) in float32."""
        ids = self.ids
        if absorbed:
            from mla_tune.verification.logits.absorbed_reference import ATTENTION, absorb_attention

            ids = ids.expand(2, -1)
            streamed = self._streamed(merged, ATTENTION, readers, memory.CHUNK)
            absorb_attention(streamed.model, self.arch, absorbed, streamed.weights, streamed.dtype)
        else:
            streamed = self._streamed(merged, self._attention, readers, memory.CHUNK)
        streamed.stream(ids)
        model: Any = streamed.model
        logits = model(input_ids=ids, use_cache=False).logits.float()
        streamed.release()
        return logits[0], logits[1] if absorbed else None


@contextmanager
def _threads() -> Iterator[tuple[Executor, int]]:
    """Yield a pool of threads that read, and their number; meanwhile torch computes with the other half of the cores.

    With more threads than cores, torch's threads wait for each other at every product, for much longer than they
    compute.
    """
    threads, readers = torch.get_num_threads(), memory.reader_threads()
    torch.set_num_threads(max(1, threads - readers))
    try:
        with ThreadPoolExecutor(readers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool, readers
    finally:
        torch.set_num_threads(threads)
