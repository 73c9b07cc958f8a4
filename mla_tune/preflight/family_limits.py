"""Limits of a recipe: what it can't have on a certain family of models, and what where the model is sharded."""

from __future__ import annotations

from mla_tune.adapter.placement import RESIDUAL_INITS, Placement
from mla_tune.arch.site import Architecture
from mla_tune.errors import InputError
from mla_tune.recipe.schema import Recipe
from mla_tune.sockets import ADAPTER_METHODS


def apply_family_limits(recipe: Recipe, arch: Architecture) -> tuple[Recipe, list[str]]:
    """The recipe with the changes that this family needs, and a sentence for each change that a user should know of.

    Linear attention (KDA) carries a state from one token to the next, and transformers does not reset it between the
    samples of a packed row: packing is turned off, and rows are padded.  Indexers choose keys by a mask, which packed
    attention does not have: `model.attention: auto` becomes one that has it.  Raises `InputError` for an attention
    that the recipe names and the family can't have.
    """
    family, section, notes = arch.family, recipe.model, []
    what = f"model.attention: {section.attention}"
    if family.eager_only and section.attention not in ("auto", "eager"):
        raise InputError(f"{what}: {family.title} has eager attention only (transformers); leave it out, or eager")
    if family.needs_mask and section.attention not in ("auto", "eager", "sdpa"):
        why = "linear attention" if family.carries_state else "an indexer that chooses keys by a mask"
        raise InputError(f"{what}: {family.title} has {why}, so it needs eager or sdpa")
    changes: dict[str, dict[str, object]] = {}
    if section.attention == "auto" and family.needs_mask:
        changes["model"] = {"attention": "eager" if family.eager_only else "sdpa"}
    if family.carries_state and recipe.train.packing:
        changes["train"] = {"packing": False}
        notes.append(
            f"train.packing: off, since the linear attention of {family.title} would carry its state from one sample "
            "of a packed row into the next; rows hold one sample each"
        )
    if not changes:
        return recipe, notes
    parts = {name: getattr(recipe, name).model_copy(update=update) for name, update in changes.items()}
    return recipe.model_copy(update=parts), notes


def check_window(recipe: Recipe, arch: Architecture) -> None:
    """Raises `InputError` for rows that are longer than the model's window of tokens."""
    window, length = arch.max_position_embeddings, recipe.train.max_length
    if window and length > window:
        raise InputError(f"train.max_length is {length}, but this model's window is {window} tokens")


def unsupported_when_sharded(recipe: Recipe, placement: Placement, sharding: str, quantized: str | None) -> list[str]:
    """Keys of the recipe, with their values, that are not supported where the model is sharded over processes.

    `sharding`: fsdp2 or zero3.  `quantized`: how the base's weights stay quantized, None for plain ones.
    """
    wrong = []
    if recipe.train.compile:
        wrong.append("train.compile: true")
    if quantized and sharding == "zero3":
        wrong.append(f"a quantized base ({quantized})")
    if recipe.model.dtype == "float16":
        wrong.append("model.dtype: float16")
    if placement.init in RESIDUAL_INITS:
        wrong.append(f"adapter.init: {placement.init}, which reads all weights in every process")
    if placement.modules_to_save:
        wrong.append("adapter.modules_to_save")
    if placement.method != "none" and not ADAPTER_METHODS.get(placement.method).sharded:
        wrong.append(f"adapter.method: {placement.method}")
    return wrong
