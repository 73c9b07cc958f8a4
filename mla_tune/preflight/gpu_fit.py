"""Which launch configuration (`configs/launch`) holds a model on so many GPUs of such a memory, from shapes.

Beside its shards a process holds what is gathered.  PyTorch's fully_shard gathers the decoder layer that computes and,
meanwhile, the next one, and keeps the output head from the end of the forward pass to the beginning of the backward
pass (torch.distributed.fsdp, "fully_shard").  DeepSpeed gathers up to `stage3_max_live_parameters` numbers, a block of
experts as a whole, and has buckets for prefetching and for reducing (deepspeed.ai, "DeepSpeed Configuration JSON").
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from mla_tune.adapter.placement import Placement
from mla_tune.arch.dims import DTYPE_BYTES
from mla_tune.arch.roles import ADAPTABLE
from mla_tune.arch.site import Architecture, Site
from mla_tune.errors import InputError
from mla_tune.preflight.family_limits import unsupported_when_sharded
from mla_tune.preflight.memory import MemoryEstimate, RunShape, estimate, quantized_bytes_per_weight
from mla_tune.preflight.plan import run_shape
from mla_tune.recipe.schema import Recipe
from mla_tune.sockets import ADAPTER_METHODS

#: Bytes on a GPU that the CUDA context, communication buffers and the workspaces of kernels take.
RESERVE = 2_000_000_000
#: Share of a GPU's memory that the allocator loses between blocks.
FRAGMENTATION = 0.05
#: DeepSpeed's defaults, in numbers: parameters gathered at once, prefetched, and gradients reduced at once.
LIVE, PREFETCH, REDUCE = 1_000_000_000, 50_000_000, 500_000_000
#: The largest count of GPUs that is tried.
MAX_GPUS = 1024


@dataclass(frozen=True, slots=True)
class GpuNeed:
    """Bytes that a run needs on one GPU, by purpose."""

    #: Launch configuration: `ddp`, `fsdp2` or `zero3` (a file of `configs/launch`).
    config: str
    #: How the base is kept in memory: its dtype, `nf4`, or the `kind` of the checkpoint's format (`fp8`, …).
    base: str
    #: `train.activation_checkpointing`.
    activation_checkpointing: str
    #: The base, or this GPU's shard of it.
    weights: int
    #: What is trained, its gradients and AdamW's moments, or this GPU's shard of them; DDP's buckets.
    trained: int
    #: Parts of a sharded model that are gathered for a while.
    gathered: int
    #: What the forward pass keeps for the backward pass.
    activations: int
    #: The largest working set of a layer or of the output head.
    working: int
    #: CUDA context, communication, fragmentation.
    reserve: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.trained + self.gathered + self.activations + self.working + self.reserve


def parse_memory(text: str) -> int:
    """The memory of one GPU as a user writes it (`80GB`, `80`, `79.6GiB`) → bytes.  Raises `InputError`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|GiB|TB|TiB|G|)\s*", text, re.IGNORECASE)
    units = {"gb": 10**9, "g": 10**9, "": 10**9, "gib": 2**30, "tb": 10**12, "tib": 2**40}
    size = float(found[1]) * units[found[2].lower()] if found else 0
    if size <= 0:
        raise InputError(f"--memory: '{text}' is no size; give the memory of one GPU, like 80GB")
    return round(size)


def gpu_need(config: str, arch: Architecture, run: RunShape, m: MemoryEstimate, gpus: int, memory: int) -> GpuNeed:
    """What a run needs on each of `gpus` GPUs of `memory` bytes.

    `config`: ddp, fsdp2 or zero3.  `m`: the estimate for one process that holds the whole model.
    """
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
        reserve=RESERVE + round(FRAGMENTATION * memory),
    )


def _gathered(config: str, arch: Architecture, base: str, size: int) -> int:
    """Bytes of what is gathered of a sharded model at once; `size`: bytes per weight that is not quantized."""
    head = arch.vocab_size * arch.dims.D
    if config == "fsdp2":
        quantized_size = size if base == "plain" else quantized_bytes_per_weight(base)

        def held(site: Site) -> float:
            return site.params * (quantized_size if site.role in ADAPTABLE else size)

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
    if not 1 <= gpus <= MAX_GPUS:
        raise InputError(f"--gpus: {gpus} is not in 1 to {MAX_GPUS}")
    dtype = "bfloat16" if recipe.model.dtype == "auto" else recipe.model.dtype
    run = run_shape(recipe, arch, quantized, dtype=dtype, gpu=True)
    left_out = {c: wrong for c in ("fsdp2", "zero3") if (wrong := unsupported_when_sharded(recipe, placement, c, None))}
    rows = [
        _row(config, arch, placement, replace(run, base=base), gpus, memory)
        for config, base in _candidates(run, placement)
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
    # Activation checkpointing changes activations alone: where the recipe's does not fit, another may.
    lighter = {name: of(name) for name in ("mla", "full")}
    fitting = (name for name, other in lighter.items() if gpu_need(config, arch, *other, gpus, memory).total <= memory)
    return {
        **asdict(n),
        "total": n.total,
        "fits": n.total <= memory,
        "fits_with": next(fitting, None) if n.total > memory else None,
        "from_gpus": _smallest_count(config, arch, *lighter["full"], memory),
    }


def _candidates(run: RunShape, placement: Placement) -> Iterable[tuple[str, str]]:
    """The pairs that are compared: launch configuration, and how the base is kept in memory (`RunShape.base`)."""
    quantized = []
    if placement.method != "none" and not ADAPTER_METHODS.get(placement.method).unsupported_on_quantized:
        # Where a checkpoint is published quantized, NF4 is for its version in bfloat16.
        quantized = list(dict.fromkeys(base for base in (run.base, "nf4") if base != "plain"))
    for config in ("ddp", "fsdp2", "zero3"):
        yield config, "plain"
        if config != "zero3":
            yield from ((config, base) for base in quantized)


def _smallest_count(config: str, arch: Architecture, run: RunShape, m: MemoryEstimate, memory: int) -> int | None:
    """The smallest count of GPUs that hold the run (multiples of 8 beyond 8); None if no count does."""
    for gpus in (1, 2, 4, *range(8, MAX_GPUS + 1, 8)):
        if config != "ddp" and gpus == 1:
            continue
        if gpu_need(config, arch, run, m, gpus, memory).total <= memory:
            return gpus
    return None


def _advice(rows: list[dict[str, Any]], gpus: int) -> str:
    """The command for the first configuration that fits, or what to change.  Plain bases come before quantized ones,
    and a whole model in every process, which communicates least, before shards."""
    rows = sorted(rows, key=lambda row: row["base"] not in DTYPE_BYTES)
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
