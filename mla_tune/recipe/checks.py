"""Checks of a valid recipe: advice on what runs but may be a mistake, and what a quantized base rules out."""

from __future__ import annotations

import importlib.util

from mla_tune.errors import InputError
from mla_tune.recipe.schema import Recipe
from mla_tune.sockets import ADAPTER_METHODS


def warnings(recipe: Recipe) -> list[str]:
    """Advice on a recipe: one sentence for each setting that runs but may be a mistake."""
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
        rate_of_b = opt.learning_rate * opt.mla_lr_scale * opt.lora_plus_ratio
        if opt.lora_plus_ratio > 1 and rate_of_b > 1e-2:
            notes.append(
                f"optimizer.lora_plus_ratio makes the rate of B {rate_of_b:g}, high even for LoRA+; "
                "lower optimizer.learning_rate"
            )
        if adapter.alpha / adapter.rank > 4:
            notes.append(f"adapter.alpha / adapter.rank is {adapter.alpha / adapter.rank:g}; 1 to 2 is usual")
    elif opt.mla_lr_scale != 0.65:
        notes.append("optimizer.mla_lr_scale has no effect without an adapter")
    if recipe.data.eval_fraction == 0 and recipe.data.eval_path is None:
        notes.append("data.eval_fraction is 0: no held-out loss will be measured")
    return notes


def check_quantized(recipe: Recipe, kind: str | None) -> None:
    """Raises `InputError` for a recipe that can't be trained on a quantized base.

    `kind`: how the base's weights stay quantized in memory (`nf4`, or the checkpoint's own way); None for plain
    weights, with which every recipe can be trained.
    """
    quantize = recipe.model.quantize
    if kind is None:
        return
    if quantize != "none" and kind != quantize:
        raise InputError(
            f"model.quantize: {quantize} is for plain weights, and those of {recipe.model.source} are quantized "
            f"already ({kind}); leave model.quantize out to train above them as they are, or give the bf16 checkpoint"
        )
    what = "model.quantize: nf4" if kind == "nf4" else f"the weights of {recipe.model.source} are quantized ({kind})"
    if recipe.adapter.method == "none":
        raise InputError(
            f"adapter.method: none trains the weights themselves, and {what}: quantized weights stay frozen; "
            "use an adapter, or the bf16 checkpoint without model.quantize"
        )
    unsupported = ADAPTER_METHODS.get(recipe.adapter.method).unsupported_on_quantized
    for key, asked, why in (
        (f"adapter.method: {recipe.adapter.method}", bool(unsupported), unsupported),
        ("train.compile", recipe.train.compile, "a quantized layer is not compiled"),
        (
            f"model.experts: {recipe.model.experts}",
            recipe.model.experts != "auto",
            "quantized experts have an implementation of their own; leave it at auto",
        ),
    ):
        if asked:
            raise InputError(f"{key} does not go with a quantized base ({what}): {why}")
    if kind == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("model.quantize: nf4 needs bitsandbytes: pip install 'mla-tune[quant]'")
