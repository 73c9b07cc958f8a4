"""The forward probe: logits of base + adapters (by PEFT, unmerged), of the merged model, and of absorbed attention.

Random tokens go through the model classes of transformers in float32; weights are read from disk while they are used
(`merge.probe_weights`), so the model may be far larger than the memory.  Nothing here is shared with the merge.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mla_tune.adapter.files import Adapter, open_adapter
from mla_tune.arch.registry import architecture
from mla_tune.arch.roles import Role
from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.index import Checkpoint, TensorRef

#: Memory beside weights: pieces of them, activations, and what the libraries take.
_SLACK = 256_000_000


@dataclass(frozen=True, slots=True)
class Difference:
    """Two sets of logits at the same positions.  `max_abs` is the largest difference of two logits, `kl` the mean over
    positions of KL(first ‖ second) in nats, `top1` the share of positions with the same most probable token."""

    max_abs: float
    kl: float
    top1: float


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What the logits said.  Where `ran` is false no pass was made, and `reason` says why.

    `effect` compares base + adapters with the base alone: zeros mean that these tokens say nothing about the adapters.
    `merge` compares base + adapters with the merged model, and `absorption` the merged model with the same model and
    absorbed attention (`mode`: split, fold or none).  A comparison that was not made is None; `reason` says why.
    `memory` is the estimated need in bytes beside the libraries, `seconds` are those of the whole probe.
    """

    ran: bool
    reason: str
    mode: str
    effect: Difference | None
    merge: Difference | None
    absorption: Difference | None
    tokens: int
    dtype: str
    seconds: float
    memory: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def probe(
    base: Checkpoint,
    arch: Architecture,
    adapters: Sequence[tuple[Path, float]],
    merged: Checkpoint,
    absorbed: Mapping[str, TensorRef] | None,
    absorb: Literal["split", "fold", "none"],
    *,
    tokens: int = 32,
    seed: int = 0,
) -> ProbeReport:
    """Run `tokens` random tokens through base + adapters, base, merged and merged with absorbed attention.

    `adapters` are adapter folders with their weights; `absorbed` maps `<attention path>.W_UK` and `.W_UV` (split) or
    `.W_QK` and `.W_VO` (fold) to tensors.  Raises `CheckError` for a merged checkpoint (or absorbed tensors) from which
    the model can't be built; the message names what is missing.
    """
    started = time.perf_counter()
    opened = [(open_adapter(folder, arch, base.tensors), weight) for folder, weight in adapters]
    mode = absorb if absorbed else "none"
    tokens = min(tokens, arch.max_position_embeddings or tokens)
    need, free = _need(arch, opened, tokens), _available()

    def report(reason: str, *differences: Difference | None, ran: bool = True) -> ProbeReport:
        seconds = time.perf_counter() - started
        return ProbeReport(ran, reason, mode, *differences, tokens, "float32", round(seconds, 3), need)

    if free is not None and need > free:
        reason = f"it needs about {need / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
        return report(reason, None, None, None, ran=False)

    from mla_tune.merge.probe_attention import ABSORBED, absorb_second_row
    from mla_tune.merge.probe_model import PeftRefused, open_model, with_adapters
    from mla_tune.model.load import quiet

    quiet()
    ids = torch.randint(arch.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))

    merged_arch = architecture(merged.config, str(merged.folder / "config.json"))
    model = open_model(merged, merged_arch, "eager" if mode == "none" else ABSORBED)
    if mode == "none":
        after, apart = _logits(model, ids)[0], None
    else:
        absorb_second_row(model, merged_arch, merged, absorbed or {}, mode)
        after, apart = _logits(model, ids.expand(2, -1))
    absorption = None if apart is None else compare(after, apart)
    del model
    if not opened:
        return report("no adapter was given to compare with", None, None, absorption)
    model = open_model(base, arch)
    plain = _logits(model, ids)[0]
    try:
        model = with_adapters(model, opened)
    except PeftRefused as refusal:
        return report(f"base + adapter was not compared: {refusal}", None, None, absorption)
    before = _logits(model, ids)[0]
    return report("", compare(before, plain), compare(before, after), absorption)


def compare(first: torch.Tensor, second: torch.Tensor) -> Difference:
    """Two (tokens, vocabulary) sets of logits."""
    p, q = first.double().log_softmax(-1), second.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    top1 = (first.argmax(-1) == second.argmax(-1)).double().mean().item()
    return Difference((first - second).abs().max().item(), max(kl, 0.0), top1)


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


def _need(arch: Architecture, adapters: Sequence[tuple[Adapter, float]], tokens: int) -> int:
    """Bytes: the adapters in float32 as PEFT holds them, what it makes of a matrix that it needs whole, and logits."""
    floats = lambda ref: ref.nbytes + 4 * torch.Size(ref.shape).numel()  # noqa: E731 (as read, and as kept)
    held = sum(floats(ref) for adapter, _ in adapters for ref in adapter.refs())
    several = len(adapters) > 1
    whole = 0
    for adapter, _ in adapters:
        parameters = adapter.settings.get("target_parameters") or []
        for delta in adapter.deltas:
            rows, columns = delta.site.shape
            if delta.magnitude is not None or (parameters and not delta.site.is_experts):
                whole = max(whole, 4 * (rows * columns * 4 + columns * columns))
            elif delta.site.is_experts and several:
                whole = max(whole, 4 * 6 * delta.site.count * rows * columns)
    return held + whole + 8 * 4 * tokens * arch.vocab_size + _SLACK


def _available() -> int | None:
    """Free memory in bytes; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
