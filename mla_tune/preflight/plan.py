"""What `train` would do with a recipe, worked out without weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from mla_tune.adapter.placement import Placement
from mla_tune.arch.lookup import architecture_of
from mla_tune.arch.roles import Role
from mla_tune.arch.site import Architecture
from mla_tune.preflight.memory import MemoryEstimate, RunShape, estimate
from mla_tune.recipe.checks import warnings
from mla_tune.recipe.schema import Recipe


def role_rates(placement: Placement, recipe: Recipe) -> dict[str, float]:
    """Peak learning rate by role: learning_rate × mla_lr_scale × the role's lr_scale (`all`, unscaled, without an
    adapter)."""
    o = recipe.optimizer
    if placement.method == "none":
        return {"all": o.learning_rate}
    base = o.learning_rate * o.mla_lr_scale
    rates = {r.value: base * placement.by_role(r)[0].lr_scale for r in placement.roles}
    return rates | dict.fromkeys(placement.whole_names, base * o.modules_to_save_lr_scale)


def serving_notes(arch: Architecture, placement: Placement) -> list[str]:
    """Where this adapter can't be served unmerged, or only with care."""
    notes = []
    roles = set(placement.roles)
    if Role.W_UKV in roles:
        notes.append(
            "W_UKV: vLLM loads an unmerged kv_b_proj adapter and applies it nowhere (issue 48974), llama.cpp's "
            "converter refuses it; SGLang applies it. Merge it with mla-tune merge-absorb, or leave W_UKV out"
        )
    if Role.W_DKV in roles:
        notes.append("W_DKV: changes the latent, so a cached prefix can't be shared between this adapter and the base")
    if roles & {Role.EXPERTS_GATE_UP, Role.EXPERTS_DOWN}:
        notes.append("experts: few engines serve an unmerged adapter on routed experts; merge it")
    if len({(p.rank, p.alpha) for p in placement.sites}) > 1:
        notes.append(
            "ranks differ by role: an engine that reads only r and lora_alpha would scale it wrongly; merge it"
        )
    if placement.method == "dora":
        notes.append("DoRA: vLLM and SGLang refuse unmerged DoRA adapters; merge it")
    return notes


def _not_estimated(arch: Architecture) -> list[str]:
    """What of this family the memory estimate leaves out."""
    names = {
        Role.LINEAR_ATTENTION: "linear attention",
        Role.INDEXER: "indexers",
        Role.HYPER_CONNECTION: "hyper-connections",
    }
    present = [name for role, name in names.items() if arch.by_role(role)]
    return [f"memory: what {' and '.join(present)} keep for the backward pass is not estimated"] if present else []


def run_shape(recipe: Recipe, arch: Architecture, dtype: str, gpu: bool) -> RunShape:
    """What the recipe's memory depends on; the base stays quantized where the checkpoint or the recipe says so."""
    t, section = recipe.train, recipe.model
    attention = section.attention
    if attention == "auto":
        attention = ("eager" if arch.family.eager_only else "sdpa") if arch.family.needs_mask else "packed"
    quantized = (
        None if section.preset else arch.quantization or (section.quantize if section.quantize != "none" else None)
    )
    base = "plain" if quantized is None else "nf4" if quantized == "nf4" else "fp8"
    return RunShape(t.batch_size, t.max_length, dtype, gpu, t.packing, attention, t.activation_checkpointing, base)


def plan(
    recipe: Recipe,
    placement: Placement,
    *,
    data: dict[str, Any] | None,
    steps: int | None,
    gpu: bool,
    dtype: str,
) -> dict[str, Any]:
    """The plan as one JSON document.  `data` is `Prepared.summary()`, None where the data was not looked at."""
    section = recipe.model
    arch = architecture_of(section)
    t = recipe.train
    run = run_shape(recipe, arch, dtype, gpu)
    memory: MemoryEstimate = estimate(arch, placement, run)
    rates = role_rates(placement, recipe)
    roles = [
        {
            "role": r.value,
            "matrices": sum(p.site.count for p in placement.by_role(r)),
            "rank": placement.by_role(r)[0].rank,
            "alpha": placement.by_role(r)[0].alpha,
            "params": sum(p.lora_params for p in placement.by_role(r)),
            "learning_rate": rates[r.value],
            # LoRA+: B is faster than A.
            "learning_rate_b": rates[r.value] * recipe.optimizer.lora_plus_ratio,
        }
        for r in placement.roles
    ]
    roles += [
        {
            "role": name,
            "matrices": len(counts),
            "rank": None,
            "alpha": None,
            "params": sum(counts),
            "learning_rate": rates[name],
            "learning_rate_b": rates[name],
        }
        for name in placement.whole_names
        if (counts := [n for path, n in placement.whole if path.rpartition(".")[2] == name])
    ]
    trainable = arch.params_total if placement.method == "none" else placement.trainable_params
    tokens = None
    if data and steps:
        per_row = data["train"]["tokens"] / max(1, data["train"]["rows"])
        tokens = round(steps * t.batch_size * t.gradient_accumulation_steps * per_row)
    return {
        "model": section.source,
        "model_type": arch.model_type,
        "params_total": arch.params_total,
        "method": placement.method,
        "adapted": [p.site.parameter for p in placement.sites],
        "roles": roles,
        "learning_rate": rates,
        "trainable_params": trainable,
        "trainable_share": trainable / arch.params_total,
        # PEFT keeps adapters of half-precision models in float32, and saves them so.
        "adapter_bytes": 0 if placement.method == "none" else trainable * 4 * placement.width,
        "steps": steps,
        "tokens": tokens,
        "data": data,
        "dtype": dtype,
        "memory": {
            **asdict(memory),
            "total": memory.total,
            "measured_as": "allocated on the GPU" if gpu else "resident, of the process",
        },
        "warnings": [*warnings(recipe), *_not_estimated(arch), *serving_notes(arch, placement)],
    }
