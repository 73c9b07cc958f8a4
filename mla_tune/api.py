"""The front door's own functions: `inspect` and `plan`, which the command line prints and Python users call.

The others (`load_recipe`, `train`, `merge_absorb`, `verify`, `generate`, `absorb`, `expand`, `LatentCache`) lie where
their work is done; `mla_tune/__init__.py` lists all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mla_tune.adapter.placement import Placement
    from mla_tune.arch.site import Architecture
    from mla_tune.recipe.schema import Recipe
    from mla_tune.training.resolve import ResolvedRecipe


@dataclass(frozen=True, slots=True)
class ModelReport:
    """What `inspect` found out about a model."""

    #: The model as it was named.
    model: str
    #: Every weight matrix with its role and shape, the dimensions, and the totals.
    architecture: Architecture
    #: The matrices that the recipe adapts, with rank and alpha of each; None without a recipe.
    placement: Placement | None
    #: The facts as one JSON document: sizes, KV-cache bytes a token, and an entry for each matrix.
    document: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The document that `mla-tune inspect --json` prints."""
        return self.document


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """What `train` would do with a recipe."""

    #: The recipe with all checks made: effective recipe, architecture, placement, notes.
    resolved: ResolvedRecipe
    #: Matrices and learning rates by role, steps, tokens, estimated memory in bytes, and warnings.
    document: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The document that `mla-tune plan --json` prints."""
        return self.document


def inspect(
    model: str, *, recipe: Recipe | None = None, rank: int | None = None, cache_dtype: str = "bfloat16"
) -> ModelReport:
    """Find every layer of a model that an adapter can attach to, from its config.json alone.

    `model`: a folder, a config.json, a shipped name such as "deepseek-v3", or a hub id.  `recipe`: mark the matrices
    that it adapts, and count LoRA parameters at its ranks.  `rank`: the LoRA rank to count for without a recipe (16).
    `cache_dtype`: dtype of the KV cache whose bytes a token are counted.

    Reads no weights and imports no torch.  Raises `InputError` for a name that nothing has, `FileError` for a file that
    can't be used, `NotMLAError` for a model without Multi-head Latent Attention, `PlacementError` for a recipe that
    does not fit the model.
    """
    from mla_tune.arch.build import architecture
    from mla_tune.preflight.inspect import DEFAULT_RANK, inspect_architecture
    from mla_tune.recipe.model_source import load_config

    config, where, _ = load_config(str(model))
    arch = architecture(config, where)
    placement = None
    if recipe is not None:
        from mla_tune.adapter.placement import place

        placement, rank = place(arch, recipe.adapter), recipe.adapter.rank
    facts = inspect_architecture(arch, rank or DEFAULT_RANK, cache_dtype, placement)
    return ModelReport(str(model), arch, placement, {"model": str(model), **facts})


def plan(recipe: Recipe, *, data: bool = True) -> TrainingPlan:
    """Work out what `train` would do: matrices, learning rates by role, steps, tokens, memory.  No weights are read.

    `data`: read and tokenize the data too, to count samples, tokens and steps.  Memory is estimated in bytes, for this
    machine's device.  Raises what `train` raises before it reads weights: `InputError`, `PlacementError`, `FileError`.
    """
    from mla_tune.preflight import plan as preflight
    from mla_tune.training.resolve import resolve

    resolved = resolve(recipe)
    summary, steps = _count_data(resolved) if data else (None, resolved.recipe.train.max_steps)
    gpu, dtype = _machine(resolved.recipe)
    document = preflight.plan(
        resolved.recipe,
        resolved.arch,
        resolved.placement,
        resolved.quantized,
        data=summary,
        steps=steps,
        gpu=gpu,
        dtype=dtype,
    )
    document["warnings"] += resolved.notes
    return TrainingPlan(resolved, document)


def _count_data(resolved: ResolvedRecipe) -> tuple[dict[str, Any], int]:
    """Read and tokenize the data: its summary, and the optimizer steps that it makes."""
    from mla_tune.console import err
    from mla_tune.data.prepare import optimizer_steps, prepare
    from mla_tune.model.tokenizer import load_tokenizer, tokenizer_source
    from mla_tune.training.resolve import check_held_out

    recipe, section = resolved.recipe, resolved.recipe.model
    tokenizer = load_tokenizer(tokenizer_source(section), section.trust_remote_code)
    prepared = prepare(recipe, resolved.arch, tokenizer)
    for line in prepared.lines:
        err.print(line, markup=False, soft_wrap=True)
    check_held_out(recipe, prepared)
    return prepared.summary(), optimizer_steps(recipe, prepared.train_rows)


def _machine(recipe: Recipe) -> tuple[bool, str]:
    """Whether train would use a GPU on this machine, and the dtype that it would choose."""
    import torch

    wanted = recipe.model.device
    gpu = wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())
    dtype = recipe.model.dtype
    return gpu, ("bfloat16" if gpu else "float32") if dtype == "auto" else dtype
