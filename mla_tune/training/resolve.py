"""A recipe → everything that follows from it and its model's config.json, before data or weights are read.

`train`, `plan`, `data` and `bench train` all begin here, so what one of them refuses or changes, all of them do.
Imports no torch; only a recipe with `adapter.modules_to_save`, or a run of several processes, needs it, and then later.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mla_tune.adapter.placement import Placement, place
from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.quantized.config import format_in_memory, format_kind
from mla_tune.errors import InputError
from mla_tune.preflight.family_limits import apply_family_limits, check_window, unsupported_when_sharded
from mla_tune.recipe.checks import check_quantized, warnings
from mla_tune.recipe.model_source import config_and_architecture
from mla_tune.recipe.schema import Recipe
from mla_tune.training.distributed.launch import Worker

if TYPE_CHECKING:
    from mla_tune.data.prepare import Prepared

#: What people call a sharding.
SHARDING_TITLES = {"fsdp2": "FSDP2", "zero3": "DeepSpeed ZeRO-3"}


@dataclass(frozen=True, slots=True)
class ResolvedRecipe:
    """What a recipe means on its model."""

    #: The effective recipe: as given, with the changes that the model's family needs.
    recipe: Recipe
    #: The model's config.json.
    config: Mapping[str, Any]
    #: The model's architecture.
    arch: Architecture
    #: The matrices that are adapted and the modules that are trained whole.
    placement: Placement
    #: How the base's weights stay quantized in memory (`fp8`, `nf4`, …); None for plain weights.
    quantized: str | None
    #: This process among those of its run.
    worker: Worker
    #: What the model's configuration and its family change or leave open, one sentence each.
    notes: tuple[str, ...]
    #: Advice on the recipe: things that run, but that a user should know of, one sentence each.
    warnings: tuple[str, ...]


def resolve(recipe: Recipe, worker: Worker | None = None) -> ResolvedRecipe:
    """Make every check that `train` makes before it reads data or weights.

    `worker`: the process that is to train, where it matters that there are several; None for one process.
    Raises `InputError` (`PlacementError`, `NotMLAError`) for a recipe that can't be trained as it is, and `FileError`
    for a model whose config.json can't be read.
    """
    worker = worker or Worker()
    _check_trackers(recipe)
    advice = warnings(recipe)
    config, arch = config_and_architecture(recipe.model)
    recipe, changes = apply_family_limits(recipe, arch)
    placement = place(arch, recipe.adapter)
    quantized = format_kind(format_in_memory(config, recipe.model.quantize, recipe.model.source))
    check_quantized(recipe, quantized)
    check_window(recipe, arch)
    if recipe.adapter.modules_to_save:
        from mla_tune.model.modules_to_save import with_modules_to_save  # makes the model without numbers: needs torch

        placement = with_modules_to_save(placement, arch, config, recipe.adapter.modules_to_save, bool(quantized))
    check_launch(recipe, placement, worker, quantized)
    return ResolvedRecipe(recipe, config, arch, placement, quantized, worker, (*arch.warnings, *changes), tuple(advice))


def check_held_out(recipe: Recipe, data: Prepared) -> None:
    """Raises `InputError` for a recipe that needs held-out rows and whose data has none."""
    if recipe.train.early_stopping and not data.held_out_rows:
        raise InputError("train.early_stopping needs held-out rows: set data.eval_fraction or data.eval_path")


def _check_trackers(recipe: Recipe) -> None:
    """Raises `InputError` for a tracker that is not installed."""
    missing = [name for name in recipe.output.report_to if find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise InputError(
            f"output.report_to: {', '.join(missing)} {verb} not installed; pip install 'mla-tune[log]', or take "
            f"{'it' if len(missing) == 1 else 'them'} out"
        )


def check_launch(recipe: Recipe, placement: Placement, worker: Worker, quantized: str | None) -> None:
    """Raises `InputError` for a launch that contradicts itself, and for what was not tried in many processes."""
    sharding = SHARDING_TITLES.get(worker.sharding)
    if os.environ.get("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2" and sharding == "FSDP2":
        raise InputError("the launcher's configuration says FSDP 1; mla-tune knows FSDP 2: set fsdp_version: 2")
    if sharding and worker.world_size == 1:
        raise InputError(
            f"{sharding} shards a model over processes, and this is one process: start it with torchrun, accelerate "
            "launch or --processes, or leave the sharding out"
        )
    if worker.world_size == 1:
        return
    if worker.launched:
        _check_gpus(recipe, worker)
    wrong = unsupported_when_sharded(recipe, placement, worker.sharding, quantized) if sharding else []
    if wrong:
        raise InputError(f"{sharding} is not tried together with {'; '.join(wrong)}; use --launch ddp, or change that")


def _check_gpus(recipe: Recipe, worker: Worker) -> None:
    """Raises `InputError` where a machine has more processes than GPUs."""
    import torch

    from mla_tune.model.load import pick_device

    if pick_device(recipe.model.device).type == "cuda" and worker.local_world_size > torch.cuda.device_count():
        raise InputError(
            f"{worker.local_world_size} processes on this machine, and {torch.cuda.device_count()} GPUs: "
            "start one process for each GPU"
        )
