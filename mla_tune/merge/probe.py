"""The forward probe: does the merged model say what base + adapters say?

Three ways to the same logits, on some random tokens, layer by layer: (1) base and adapters unmerged, by PEFT; (2) the
merged checkpoint, by stock transformers; (3) the merged checkpoint with absorbed attention.  The base alone is computed
beside (1), to tell whether the adapters do anything at all.  Float32 where a layer fits into memory, so that what
differs is the weights; bfloat16 otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from mla_tune.adapter.files import WEIGHTS_FILE
from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.index import Checkpoint, TensorRef, read_shard
from mla_tune.merge.probe_model import Pool, Streamed, Weights, build

#: Share of the free memory that a probe may take.
_SHARE = 0.8
#: Memory beside weights, adapters and logits: attention, buffers of the reader, what is not given back at once.
_BESIDE = 100_000_000
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
    merged model with its absorbed form; None where it was not compared.  `idle`: the adapters change no logit, so
    that a merge can't be told from none.  `memory` is the estimate in bytes that `dtype` was chosen by.
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
    needs = {name: _need(arch, adapters, wanted, tokens, d.itemsize) for name, d in _DTYPES.items()}
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
    pool = Pool()
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with torch.no_grad():
            plain, tuned, reason = _unmerged(base, arch, adapters, ids, _DTYPES[dtype], pool)
            if tuned is None and not wanted:
                return report(False, reason, needs[dtype])
            ours, other = _merged(merged, arch, wanted, ids, _DTYPES[dtype], pool)
    finally:
        transformers.logging.set_verbosity(verbosity)
    found: dict[str, Any] = {}
    if plain is not None and tuned is not None:
        found["effect"] = _compare("base", plain, "base + adapters", tuned)
        found["merged"] = _compare("base + adapters", tuned, "merged", ours)
        found["idle"] = found["effect"].max_error == 0
    if other is not None:
        found["absorbed"] = _compare("merged", ours, "merged, absorbed", other)
    return report(True, reason, needs[dtype], **found)


def _unmerged(
    base: Checkpoint,
    arch: Architecture,
    adapters: Sequence[tuple[Path, float]],
    ids: torch.Tensor,
    dtype: torch.dtype,
    pool: Pool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, str]:
    """(logits of the base, logits with the adapters, why there are none), logits (T, vocabulary) in float32."""
    from mla_tune.merge.probe_peft import PeftCannot, SideBySide, attach, summed_where_used

    streamed = Streamed(build(base, arch, "sdpa"), arch, Weights(base, arch), dtype, pool)
    try:
        model: Any = attach(streamed, base, arch, adapters)
    except PeftCannot as error:
        return None, None, f"merged was not compared with base + adapters, since PEFT does not compute them: {error}"
    streamed.stream(ids, SideBySide(streamed))
    with summed_where_used(streamed):
        logits = model(input_ids=ids.expand(2, -1), use_cache=False).logits.float()
    return logits[0], logits[1], ""


def _merged(
    merged: Checkpoint,
    arch: Architecture,
    absorbed: Mapping[str, TensorRef],
    ids: torch.Tensor,
    dtype: torch.dtype,
    pool: Pool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits (T, vocabulary) in float32 of the merged model, and with absorbed attention."""
    weights = Weights(merged, arch)
    if not absorbed:
        streamed = Streamed(build(merged, arch, "sdpa"), arch, weights, dtype, pool)
        streamed.stream(ids)
        net: Any = streamed.model
        return net(input_ids=ids, use_cache=False).logits[0].float(), None
    from mla_tune.merge.probe_attention import ATTENTION
    from mla_tune.merge.probe_attention import absorb as absorb_attention

    streamed = Streamed(build(merged, arch, ATTENTION), arch, weights, dtype, pool)
    absorb_attention(streamed.model, arch, absorbed, weights, dtype)
    streamed.stream(ids)
    model: Any = streamed.model
    logits = model(input_ids=ids.expand(2, -1), use_cache=False).logits.float()
    return logits[0], logits[1]


def _compare(reference: str, a: torch.Tensor, other: str, b: torch.Tensor) -> Comparison:
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return Comparison(
        reference=reference,
        other=other,
        max_error=float((a - b).abs().max()),
        largest=float(a.abs().max()),
        kl=float((p.exp() * (p - q)).sum(-1).mean()),
        top1=float((a.argmax(-1) == b.argmax(-1)).double().mean()),
    )


def _need(
    arch: Architecture,
    adapters: Sequence[tuple[Path, float]],
    absorbed: Mapping[str, TensorRef],
    tokens: int,
    itemsize: int,
) -> int:
    """Bytes at the peak: the largest piece with its absorbed tensors, all adapters, and logits."""
    from mla_tune.merge.probe_peft import sums_in_place

    layers: dict[int | None, int] = {}
    # Where PEFT adds up experts itself: W, two deltas, and the sum.
    copies = 1 if len(adapters) == 1 and sums_in_place() else 4
    for site in arch:
        used = min(1.0, 2 * tokens * arch.experts_per_token / site.count) if site.is_experts else 1.0
        layers[site.layer] = layers.get(site.layer, 0) + int(
            site.params * itemsize * (used * copies if site.is_experts else 1)
        )
    module = [sum(r.nbytes * 4 for k, r in absorbed.items() if k.startswith(f"{p}.")) for p in arch.attention_paths[:1]]
    held = sum(ref.nbytes for folder, _ in adapters for ref in read_shard(folder / WEIGHTS_FILE).tensors.values())
    logits = 2 * tokens * arch.vocab_size * 8
    return max(layers.values()) + sum(module) + held + 4 * logits + _BESIDE


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
