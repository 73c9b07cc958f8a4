"""The forward probe: does the merged model say what base + adapters say?

Three ways to the same logits, on some random tokens, layer by layer: (1) base and adapters unmerged, by PEFT; (2) the
merged checkpoint, by stock transformers; (3) the merged checkpoint with absorbed attention.  The base alone is computed
beside (1), to tell whether the adapters do anything at all.  Float32 where a layer fits into memory, so that what
differs is the weights; bfloat16 otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from mla_tune.adapter.files import Adapter, open_adapter
from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.index import Checkpoint, TensorRef
from mla_tune.merge.probe_model import Streamed, build
from mla_tune.merge.probe_weights import Weights

#: Share of the free memory that a probe may take.
_SHARE = 0.8
#: Memory beside weights, adapters and logits: attention, buffers of the reader, what is not given back at once.
_BESIDE = 100_000_000
#: Bytes of experts in memory at a time: few enough for a processor's cache.
_CHUNK = 8_000_000
#: Relative to the largest logit: rows of a batch differ by as much when they are the same.
_NOISE = 1e-5
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Comparison:
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
class ProbeReport:
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
    effect: Comparison | None
    merged: Comparison | None
    absorbed: Comparison | None
    idle: bool
    memory: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def probe(
    base: Checkpoint,
    arch: Architecture,
    adapters: Sequence[tuple[Path, float]],
    merged: Checkpoint,
    absorbed: Mapping[str, TensorRef] | None,
    absorb: str,
    *,
    tokens: int = 32,
    seed: int = 0,
) -> ProbeReport:
    """Compare logits of base + adapters, of `merged`, and of `merged` with the tensors `absorbed`.

    `adapters` are PEFT adapter folders with the weights of their deltas.  `absorbed` are the tensors of the absorbed
    files, by key, `absorb` says which (split or fold; none: no comparison).  `tokens` random ones, drawn from `seed`,
    make one sequence.  Raises `CheckError` where a checkpoint or the absorbed files lack a tensor, or one has another
    shape than the model's.
    """
    started = time.perf_counter()
    wanted = dict(absorbed) if absorbed and absorb != "none" else {}
    opened = [(open_adapter(folder, arch, base.tensors), weight) for folder, weight in adapters]
    needs = {name: _need(arch, opened, wanted, tokens, d.itemsize) for name, d in _DTYPES.items()}
    free = _free_memory()
    dtype = next((name for name, need in needs.items() if need <= free * _SHARE), None)

    def report(ran: bool, reason: str, memory: int, **found: Any) -> ProbeReport:
        compared: dict[str, Any] = {"effect": None, "merged": None, "absorbed": None, "idle": False} | found
        seconds = time.perf_counter() - started
        return ProbeReport(ran, reason, tokens, seed, dtype, **compared, memory=memory, seconds=seconds)

    if dtype is None:
        need = needs["bfloat16"]
        return report(False, f"a layer needs {need / 1e9:.1f} GB in bfloat16, {free / 1e9:.1f} GB are free", need)
    ids = torch.randint(0, arch.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with torch.no_grad(), _threads() as readers:
            plain, tuned, reason = _unmerged(base, arch, opened, ids, _DTYPES[dtype], readers)
            if tuned is None and not wanted:
                return report(False, reason, needs[dtype])
            ours, other = _merged(merged, arch, wanted, ids, _DTYPES[dtype], readers)
    finally:
        transformers.logging.set_verbosity(verbosity)
    ways = {"the base": plain, "base + adapters": tuned, "the merged model": ours, "absorbed attention": other}
    for name, logits in ways.items():
        if logits is not None and not logits.isfinite().all():
            return report(False, f"logits of {name} are not finite numbers", needs[dtype])
    found: dict[str, Any] = {}
    if plain is not None and tuned is not None:
        found["effect"] = _compare("base", plain, "base + adapters", tuned)
        found["merged"] = _compare("base + adapters", tuned, "merged", ours)
        found["idle"] = found["effect"].max_error <= _NOISE * found["effect"].largest
    if other is not None:
        found["absorbed"] = _compare("merged", ours, "merged, absorbed", other)
    return report(True, reason, needs[dtype], **found)


def _unmerged(
    base: Checkpoint,
    arch: Architecture,
    adapters: Sequence[tuple[Adapter, float]],
    ids: torch.Tensor,
    dtype: torch.dtype,
    readers: tuple[Executor, int],
) -> tuple[torch.Tensor | None, torch.Tensor | None, str]:
    """(logits of the base, logits with the adapters, why there are none), logits (T, vocabulary) in float32."""
    from mla_tune.merge.probe_peft import PeftCannot, SideBySide, attach, summed_where_used, whole_stacks

    chunk = None if whole_stacks(adapters) else _CHUNK
    streamed = Streamed(build(base, arch, "sdpa"), arch, Weights(base, arch), dtype, *readers, chunk)
    try:
        model: Any = attach(streamed, adapters)
    except PeftCannot as error:
        return None, None, f"merged was not compared with base + adapters, since PEFT does not compute them: {error}"
    streamed.stream(ids, SideBySide(streamed, model))
    with summed_where_used(streamed):
        logits = model(input_ids=ids.expand(2, -1), use_cache=False).logits.float()
    streamed.release()
    return logits[0], logits[1], ""


def _merged(
    merged: Checkpoint,
    arch: Architecture,
    absorbed: Mapping[str, TensorRef],
    ids: torch.Tensor,
    dtype: torch.dtype,
    readers: tuple[Executor, int],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits (T, vocabulary) in float32 of the merged model, and with absorbed attention."""
    weights = Weights(merged, arch)
    model: Any
    if absorbed:
        from mla_tune.merge.probe_attention import ATTENTION, absorb_attention

        model, ids = build(merged, arch, ATTENTION), ids.expand(2, -1)
        absorb_attention(model, arch, absorbed, weights, dtype)
    else:
        model = build(merged, arch, "sdpa")
    streamed = Streamed(model, arch, weights, dtype, *readers, _CHUNK)
    streamed.stream(ids)
    logits = model(input_ids=ids, use_cache=False).logits.float()
    streamed.release()
    return logits[0], logits[1] if absorbed else None


def _compare(reference: str, a: torch.Tensor, other: str, b: torch.Tensor) -> Comparison:
    """Of logits (T, vocabulary), token by token: in float64 all of them at once are more than a layer's weights."""
    kl = same = 0.0
    for x, y in zip(a, b, strict=True):
        p, q = x.double().log_softmax(-1), y.double().log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        same += float(x.argmax() == y.argmax())
    return Comparison(
        reference=reference,
        other=other,
        max_error=float((a - b).abs().max()),
        largest=float(a.abs().max()),
        kl=kl / len(a),
        top1=same / len(a),
    )


def _need(
    arch: Architecture,
    adapters: Sequence[tuple[Adapter, float]],
    absorbed: Mapping[str, TensorRef],
    tokens: int,
    itemsize: int,
) -> int:
    """Bytes at the peak: the largest piece with its absorbed tensors, all adapters, and logits."""
    from mla_tune.merge.probe_peft import whole_stacks

    layers: dict[int | None, int] = {}
    for site in arch:
        numbers = site.params
        if site.is_experts and whole_stacks(adapters):
            numbers *= 4  # W, two deltas, and their sum with W
        elif site.is_experts:
            numbers = (_readers() + 1) * max(_CHUNK // itemsize, numbers // site.count)
        layers[site.layer] = layers.get(site.layer, 0) + numbers * itemsize
    module = sum(r.nbytes for k, r in absorbed.items() if k.startswith(f"{arch.attention_paths[0]}."))
    held = sum(ref.nbytes for adapter, _ in adapters for ref in adapter.refs())
    logits = tokens * arch.vocab_size * 4
    return max(layers.values()) + module * 4 + held + 8 * logits + _BESIDE


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
