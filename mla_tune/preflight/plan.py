"""What `train` would do with a recipe, worked out without weights: matrices, learning rates, steps, memory."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from mla_tune.adapter.placement import Placement
from mla_tune.arch.roles import Role
from mla_tune.arch.site import Architecture
from mla_tune.preflight.memory import RunShape, estimate
from mla_tune.recipe.checks import warnings
from mla_tune.recipe.schema import Recipe
from mla_tune.serving.unmerged import unmerged_notes


def role_rates(placement: Placement, recipe: Recipe) -> dict[str, float]:
    """Peak learning rate by role: learning_rate × mla_lr_scale × the role's lr_scale (`all`, unscaled, without an
    adapter)."""
    o = recipe.optimizer
    if placement.method == "none":
        return {"all": o.learning_rate}
    base = o.learning_rate * o.mla_lr_scale
    rates = {r.value: base * placement.by_role(r)[0].lr_scale for r in placement.roles}
    return rates | dict.fromkeys(placement.modules_to_save_names, base * o.modules_to_save_lr_scale)


def cache_notes(placement: Placement) -> list[str]:
    """What an adapter on these roles means for a cache that is shared between it and the base."""
    if Role.W_DKV not in placement.roles:
        return []
    return ["W_DKV: changes the latent, so a cached prefix can't be shared between this adapter and the base"]


def _not_estimated(arch: Architecture) -> list[str]:
    """A warning for the kinds of layers that the memory estimate leaves out, where the model has them."""
    names = {
        Role.LINEAR_ATTENTION: "linear attention",
        Role.INDEXER: "indexers",
        Role.HYPER_CONNECTION: "hyper-connections",
    }
    present = [name for role, name in names.items() if arch.by_role(role)]
    return [f"memory: what {' and '.join(present)} keep for the backward pass is not estimated"] if present else []


def run_shape(recipe: Recipe, arch: Architecture, quantized: str | None, *, dtype: str, gpu: bool) -> RunShape:
    """What the recipe's memory depends on.

    `quantized`: the format in which the base's weights stay (`nf4`, or the `kind` of the checkpoint's format); None for
    plain weights.
    """
    t, attention = recipe.train, recipe.model.attention
    if attention == "auto":
        attention = ("eager" if arch.family.eager_only else "sdpa") if arch.family.needs_mask else "packed"
    return RunShape(
        batch=t.batch_size,
        length=t.max_length,
        dtype=dtype,
        gpu=gpu,
        packing=t.packing,
        attention=attention,
        activation_checkpointing=t.activation_checkpointing,
        base=quantized or "plain",
    )


def plan(
    recipe: Recipe,
    arch: Architecture,
    placement: Placement,
    quantized: str | None,
    *,
    data: dict[str, Any] | None,
    steps: int | None,
    gpu: bool,
    dtype: str,
) -> dict[str, Any]:
    """The plan of a resolved recipe as one JSON document.

    `quantized`: as for `run_shape`.  `data`: `Prepared.summary()`, and `steps`: the optimizer steps that it makes; None
    where the data was not looked at.  `gpu` and `dtype`: what the recipe's device and dtype mean on this machine.
    """
    memory = estimate(arch, placement, run_shape(recipe, arch, quantized, dtype=dtype, gpu=gpu))
    trainable = arch.params_total if placement.method == "none" else placement.trainable_params
    return {
        "model": recipe.model.source,
        "model_type": arch.model_type,
        "params_total": arch.params_total,
        "method": placement.method,
        "adapted": [p.site.parameter for p in placement.sites],
        "roles": _role_rows(recipe, placement),
        "learning_rate": role_rates(placement, recipe),
        "trainable_params": trainable,
        "trainable_share": trainable / arch.params_total,
        # PEFT keeps adapters of half-precision models in float32, and saves them so.
        "adapter_bytes": 0 if placement.method == "none" else trainable * 4 * placement.width,
        "steps": steps,
        "tokens": _trained_tokens(recipe, data, steps),
        "data": data,
        "dtype": dtype,
        "memory": {
            **asdict(memory),
            "total": memory.total,
            "measured_as": "allocated on the GPU" if gpu else "resident, of the process",
        },
        "warnings": [
            *warnings(recipe),
            *_not_estimated(arch),
            *cache_notes(placement),
            *unmerged_notes(arch, placement),
        ],
    }


def _role_rows(recipe: Recipe, placement: Placement) -> list[dict[str, Any]]:
    """One row for each adapted role, and one for each name of `modules_to_save`, which has neither rank nor alpha."""
    rates = role_rates(placement, recipe)
    rows = []
    for role in placement.roles:
        planned = placement.by_role(role)
        rows.append(
            {
                "role": role.value,
                "matrices": sum(p.site.count for p in planned),
                "rank": planned[0].rank,
                "alpha": planned[0].alpha,
                "params": sum(p.lora_params for p in planned),
                "learning_rate": rates[role.value],
                # LoRA+: B is faster than A.
                "learning_rate_b": rates[role.value] * recipe.optimizer.lora_plus_ratio,
            }
        )
    for name in placement.modules_to_save_names:
        counts = [n for path, n in placement.modules_to_save if path.rpartition(".")[2] == name]
        rows.append(
            {
                "role": name,
                "matrices": len(counts),
                "rank": None,
                "alpha": None,
                "params": sum(counts),
                "learning_rate": rates[name],
                "learning_rate_b": rates[name],
            }
        )
    return rows


def _trained_tokens(recipe: Recipe, data: dict[str, Any] | None, steps: int | None) -> int | None:
    """Tokens of all steps, from the mean length of a row; None where the data was not looked at."""
    if not data or not steps:
        return None
    per_row = data["train"]["tokens"] / max(1, data["train"]["rows"])
    return round(steps * recipe.train.batch_size * recipe.train.gradient_accumulation_steps * per_row)
