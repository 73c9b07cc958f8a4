"""Which of the shipped launch configurations (`configs/launch`) holds a model on so many GPUs of such a size.

From shapes alone, with the arithmetic in `GpuNeed`.  What a process holds besides its shards: PyTorch's fully_shard
gathers the decoder layer that computes and the next one while it comes, and keeps the output head from the end of the
forward pass to the beginning of the backward pass (torch.distributed.fsdp, "fully_shard"); DeepSpeed gathers up to
`stage3_max_live_parameters` numbers, a block of experts as a whole, and has buckets for prefetching and for reducing
(deepspeed.ai, "DeepSpeed Configuration JSON").
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from mla_tune.adapter.placement import Placement
from mla_tune.arch.roles import ADAPTABLE
from mla_tune.arch.site import Architecture, Site
from mla_tune.errors import InputError
from mla_tune.preflight.family_limits import unsupported_when_sharded
from mla_tune.preflight.memory import QUANTIZED, MemoryEstimate, RunShape, estimate
from mla_tune.preflight.plan import run_shape
from mla_tune.recipe.schema import Recipe

#: Bytes that the CUDA context, communication buffers and kernels' workspaces take on a GPU, and the share of it that
#: the allocator loses between blocks.
RESERVE, LOST = 2_000_000_000, 0.05
#: DeepSpeed's defaults, in numbers: parameters gathered at once, prefetched, and gradients reduced at once.
LIVE, PREFETCH, REDUCE = 1_000_000_000, 50_000_000, 500_000_000
#: GPUs are looked for up to here.
MOST = 1024


@dataclass(frozen=True, slots=True)
class GpuNeed:
    """Bytes on one GPU of a run by `config` (a file of configs/launch) with the base in `base`.

    weights      the base, or this GPU's shard of it
    trained      trained numbers, their gradients and AdamW's moments, or this GPU's shard; DDP's buckets
    gathered     of a sharded model what is whole for a while
    activations  what the forward pass keeps for the backward pass
    working      the largest working set of a layer or of the output head
    reserve      context, communication, fragmentation
    """

    config: str
    base: str
    activation_checkpointing: str
    weights: int
    trained: int
    gathered: int
    activations: int
    working: int
    reserve: int

    @property
    def total(self) -> int:
        return self.weights + self.trained + self.gathered + self.activations + self.working + self.reserve


def parse_memory(text: str) -> int:
    """`80GB`, `80`, `79.6GiB` → bytes.  Raises `InputError`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|GiB|TB|TiB|G|)\s*", text, re.IGNORECASE)
    units = {"gb": 10**9, "g": 10**9, "": 10**9, "gib": 2**30, "tb": 10**12, "tib": 2**40}
    size = float(found[1]) * units[found[2].lower()] if found else 0
    if size <= 0:
        raise InputError(f"--memory: '{text}' is no size; give the memory of one GPU, like 80GB")
    return round(size)


def gpu_need(config: str, arch: Architecture, run: RunShape, m: MemoryEstimate, gpus: int, memory: int) -> GpuNeed:
    """What one of `gpus` GPUs of `memory` bytes has to hold.  `config`: ddp, fsdp2 or zero3; `m`: of one process."""
    states = m.gradients + m.optimizer + m.adapters
    weights, gathered = m.weights, 0
    if config == "ddp":
        states += m.gradients * (gpus > 1)
    else:
        weights, states = -(-weights // gpus), -(-states // gpus)
        gathered = _gathered(config, arch, run.base, 2 if run.dtype != "float32" else 4)
    return GpuNeed(
        config=config,
        base=run.base if run.base != "plain" else run.dtype,
        activation_checkpointing=run.activation_checkpointing,
        weights=weights,
        trained=states,
        gathered=gathered,
        activations=m.activations,
        working=m.working,
        reserve=RESERVE + round(LOST * memory),
    )


def _gathered(config: str, arch: Architecture, base: str, size: int) -> int:
    head = arch.vocab_size * arch.dims.D
    if config == "fsdp2":

        def held(site: Site) -> float:
            quantized = base != "plain" and site.role in ADAPTABLE
            return site.params * (QUANTIZED[base] if quantized else size)

        layer = max(sum(held(s) for s in arch.sites if s.layer == i) for i in range(arch.num_layers))
        return round(max(2 * layer, layer + head * size))
    experts = [sum(s.params for s in arch.sites if s.layer == i and ".mlp." in s.path) for i in range(arch.num_layers)]
    return (max(LIVE, *experts, head) + PREFETCH + REDUCE) * size


def gpu_fit(
    recipe: Recipe, arch: Architecture, placement: Placement, quantized: str | None, *, gpus: int, memory: int
) -> dict[str, Any]:
    """One JSON document: for every shipped configuration what a GPU needs, whether it fits, and what would make it fit.

    `quantized`: how the base's weights stay quantized, None for plain ones.  `memory`: bytes of one GPU.
    A GPU trains in bfloat16 unless the recipe names a dtype.  Raises `InputError` for a count of GPUs that is none.
    """
    if not 1 <= gpus <= MOST:
        raise InputError(f"--gpus: {gpus} is not in 1 to {MOST}")
    dtype = "bfloat16" if recipe.model.dtype == "auto" else recipe.model.dtype
    run = run_shape(recipe, arch, quantized, dtype=dtype, gpu=True)
    left_out = {c: wrong for c in ("fsdp2", "zero3") if (wrong := unsupported_when_sharded(recipe, placement, c, None))}
    rows = [
        _row(config, arch, placement, replace(run, base=base), gpus, memory)
        for config, base in _ways(run, placement)
        if config not in left_out
    ]
    return {
        "model": recipe.model.source,
        "params_total": arch.params_total,
        "trainable_params": arch.params_total if placement.method == "none" else placement.trainable_params,
        "gpus": gpus,
        "memory": memory,
        "batch_size": run.batch,
        "max_length": run.length,
        "dtype": dtype,
        "activation_checkpointing": run.activation_checkpointing,
        "published": arch.quantization,
        "configs": rows,
        "left_out": left_out,
        "advice": _advice(rows, gpus),
    }


def _row(
    config: str, arch: Architecture, placement: Placement, run: RunShape, gpus: int, memory: int
) -> dict[str, Any]:
    def of(activation_checkpointing: str) -> tuple[RunShape, MemoryEstimate]:
        other = replace(run, activation_checkpointing=activation_checkpointing)
        return other, estimate(arch, placement, other)

    n = gpu_need(config, arch, *of(run.activation_checkpointing), gpus, memory)
    # Checkpointing changes activations alone: if the recipe's does not fit, perhaps the next one does.
    lighter = {name: of(name) for name in ("mla", "full")}
    fitting = (name for name, other in lighter.items() if gpu_need(config, arch, *other, gpus, memory).total <= memory)
    return {
        **asdict(n),
        "total": n.total,
        "fits": n.total <= memory,
        "fits_with": next(fitting, None) if n.total > memory else None,
        "from_gpus": _from(config, arch, *lighter["full"], memory),
    }


def _ways(run: RunShape, placement: Placement) -> Iterable[tuple[str, str]]:
    """Configuration and state of the base: plain, or as the checkpoint has it or the recipe may ask for it."""
    quantized = []
    if placement.method in ("lora", "rslora"):
        # Where a checkpoint is published in FP8, NF4 is for its bfloat16 twin.
        quantized = ["fp8", "nf4"] if run.base == "fp8" else ["nf4"]
    for config in ("ddp", "fsdp2", "zero3"):
        yield config, "plain"
        if config != "zero3":
            yield from ((config, base) for base in quantized)


def _from(config: str, arch: Architecture, run: RunShape, m: MemoryEstimate, memory: int) -> int | None:
    """The fewest GPUs (by eights from eight on) that hold it; None if no number does."""
    for gpus in (1, 2, 4, *range(8, MOST + 1, 8)):
        if config != "ddp" and gpus == 1:
            continue
        if gpu_need(config, arch, run, m, gpus, memory).total <= memory:
            return gpus
    return None


def _advice(rows: list[dict[str, Any]], gpus: int) -> str:
    """The first that fits: plain bases before quantized ones, and a whole model in every process, which sends least,
    before shards."""
    rows = sorted(rows, key=lambda row: row["base"] in QUANTIZED)
    for row in rows:
        if row["fits"]:
            return _command(row, gpus)
    for row in rows:
        if row["fits_with"]:
            return f"{_command(row, gpus)} --set train.activation_checkpointing={row['fits_with']}"
    fewest = min((r for r in rows if r["from_gpus"]), key=lambda r: r["from_gpus"], default=None)
    if fewest is None:
        return "no number of such GPUs holds it; lower train.batch_size or train.max_length"
    return (
        f"none fits; {fewest['config']} from {fewest['from_gpus']} such GPUs on, with "
        f"train.activation_checkpointing: full. "
        "Lower train.batch_size or train.max_length, or take larger GPUs"
    )


def _command(row: dict[str, Any], gpus: int) -> str:
    sets = " --set model.quantize=nf4" if row["base"] == "nf4" else ""
    if gpus == 1:
        return f"mla-tune train{sets}"
    return (
        f"mla-tune train --processes {gpus}" + (f" --launch {row['config']}" if row["config"] != "ddp" else "") + sets
    )
