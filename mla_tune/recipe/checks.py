"""Advice on a valid recipe: things that run, but that a user should know of."""

from __future__ import annotations

from mla_tune.recipe.schema import Recipe


def warnings(recipe: Recipe) -> list[str]:
    """One sentence for each thing worth knowing, in the order of the sections."""
    notes: list[str] = []
    adapter, opt = recipe.adapter, recipe.optimizer
    if adapter.method != "none":
        if not 0.5 <= opt.mla_lr_scale <= 0.8:
            notes.append(
                f"optimizer.mla_lr_scale is {opt.mla_lr_scale:g}; 0.5 to 0.8 is the advised range for adapters on MLA"
            )
        if opt.learning_rate * opt.mla_lr_scale > 2e-3:
            effective = opt.learning_rate * opt.mla_lr_scale
            notes.append(
                f"optimizer.learning_rate × mla_lr_scale is {effective:g}, high for LoRA; 1e-4 to 5e-4 is usual"
            )
        if adapter.alpha / adapter.rank > 4:
            notes.append(f"adapter.alpha / adapter.rank is {adapter.alpha / adapter.rank:g}; 1 to 2 is usual")
    elif opt.mla_lr_scale != 0.65:
        notes.append("optimizer.mla_lr_scale has no effect without an adapter")
    if recipe.data.eval_fraction == 0 and recipe.data.eval_path is None:
        notes.append("data.eval_fraction is 0: no held-out loss will be measured")
    return notes
