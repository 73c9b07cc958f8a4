"""Write the result of a run: the adapter (or the model, where every weight was trained), and a preset's base."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from mla_tune.adapter.placement import Placement
from mla_tune.model.load import Loaded
from mla_tune.recipe.schema import Recipe
from mla_tune.resources import EMBEDDED_MODEL
from mla_tune.runs.folder import RunFolder


def save_base(loaded: Loaded, tokenizer: Any, recipe: Recipe, folder: RunFolder) -> str:
    """Return what run.json names as the base: a folder, a hub id, `embedded`, or `preset NAME`.

    The random weights of a preset are saved into `base/` of the run folder, since an adapter fits no other weights.
    """
    if loaded.base is not None:
        folder_of_base = Path(loaded.base)
        if folder_of_base == EMBEDDED_MODEL:
            return "embedded"
        return str(folder_of_base.resolve()) if folder_of_base.is_dir() else loaded.base
    if recipe.adapter.method == "none":
        return f"preset {recipe.model.preset}"
    if not folder.base.exists():
        loaded.model.save_pretrained(folder.base)
        tokenizer.save_pretrained(folder.base)
    # What PEFT records as the adapter's base.
    loaded.model.name_or_path = loaded.model.config._name_or_path = str(folder.base.resolve())
    return str(folder.base.resolve())


def save_result(
    model: Any,
    loaded: Loaded,
    tokenizer: Any,
    folder: RunFolder,
    placement: Placement,
    readme: str | None = None,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write adapter/ (or model/) of a run folder, whole or not at all.

    `readme`: text of the model card, instead of PEFT's.  `weights`: the gathered parameters of a sharded model.
    """
    target = folder.model if placement.method == "none" else folder.adapter
    beside = target.with_name(target.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    if placement.method == "none":
        dtype = torch.float32 if loaded.dtype == "float32" else getattr(torch, loaded.dtype)
        if weights is None:
            model.to(dtype)
        else:
            weights = {name: weight.to(dtype) for name, weight in weights.items()}
            model.config.dtype = dtype
        tokenizer.save_pretrained(beside)
    model.save_pretrained(beside, **({"state_dict": weights} if weights is not None else {}))
    if readme is not None:
        (beside / "README.md").write_text(readme, encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    beside.rename(target)
