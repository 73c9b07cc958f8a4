"""Prepare a loaded, adapted model for training: choose its kernels, and put them in the place of the stock parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper

from mla_tune.data.collate import Collator
from mla_tune.data.padding_free import PaddingFreeCollator
from mla_tune.data.prepare import Prepared
from mla_tune.model.auto import set_experts
from mla_tune.model.load import DTYPES, Loaded
from mla_tune.recipe.schema import Recipe
from mla_tune.training.kernels import packed_attention as packed
from mla_tune.training.kernels.autotune import EXPERTS, PADDING_FREE, autotune_attention, autotune_experts
from mla_tune.training.kernels.lora_linear import use_lora_factors
from mla_tune.training.kernels.mla_checkpointing import enable_mla_checkpointing
from mla_tune.training.kernels.rms_norm import use_lean_norms
from mla_tune.training.objective import Objective


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """The kernels of a run."""

    #: Name of the attention function, as transformers knows it.
    attention: str
    #: `attention`, and `experts` where there are routed experts; for run.json, and kept on resume.
    kernels: dict[str, str]
    #: What was measured; for the log.
    lines: list[str]

    def collator(self, recipe: Recipe, tokenizer: Any) -> Any:
        """Return the collator that lays batches out as the attention wants them."""
        t = recipe.train
        if self.attention in PADDING_FREE:
            return PaddingFreeCollator()
        return Collator(tokenizer.pad_token_id, t.max_length, packed=t.packing)


def prepare_model(
    model: Any,
    loaded: Loaded,
    recipe: Recipe,
    data: Prepared,
    objective: Objective,
    kernels: dict[str, str] | None = None,
) -> KernelConfig:
    """Choose the kernels and replace the model's loss, norms, LoRA and attention by them; set up recomputation.

    `model` may be wrapped by PEFT and is changed in place.  `kernels`: those of the run that is resumed, or of the main
    process; they are used instead of a measurement.

    Raises `InputError` for an attention that this machine does not have.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    lines: list[str] = []
    attention = _attention(loaded, recipe, data, kernels, lines)
    base.set_attn_implementation(attention)
    experts = _experts(base, loaded, recipe, kernels, lines)
    if experts:
        set_experts(base, experts)
    objective.prepare_model(base)
    if recipe.adapter.method != "none":
        use_lora_factors(model)
    if recipe.train.activation_checkpointing == "mla":
        enable_mla_checkpointing(model)
    else:
        use_lean_norms(model, None)
    if recipe.train.compile:
        _compile(base, recipe.train.activation_checkpointing == "full")
    return KernelConfig(attention, {"attention": attention, **({"experts": experts} if experts else {})}, lines)


def _attention(loaded: Loaded, recipe: Recipe, data: Prepared, kernels: dict[str, str] | None, lines: list[str]) -> str:
    packed.register()
    wanted = recipe.model.attention
    if wanted == "packed":
        return packed.NAME
    if wanted != "auto":
        return wanted
    if kernels:
        return kernels["attention"]
    rows = [_lengths(row) for row in _first(data.train_rows, recipe.train.batch_size)]
    choice = autotune_attention(loaded.arch, rows, loaded.device, DTYPES[loaded.dtype])
    lines.append(choice.line())
    return choice.name


def _experts(base: Any, loaded: Loaded, recipe: Recipe, kernels: dict[str, str] | None, lines: list[str]) -> str | None:
    if not any(site.is_experts for site in loaded.arch.sites):
        return None
    now: str = base.config.get_text_config()._experts_implementation
    if recipe.model.experts != "auto" or now not in EXPERTS:
        return now
    if kernels and "experts" in kernels:
        return kernels["experts"]
    # Either grouped_mm's kernel can't take these sizes, or the weights are not on their device before they are sharded.
    if now == "eager" or next(loaded.model.parameters()).device.type != loaded.device.type:
        return now
    choice = autotune_experts(loaded.model, loaded.arch, EXPERTS, loaded.device)
    lines.append(choice.line())
    return choice.name


def _first(rows: Any, count: int) -> list[dict[str, Any]]:
    """Return the first rows of a list or a stream."""
    found = []
    for row in rows:
        found.append(row)
        if len(found) == count:
            break
    return found


def _lengths(row: dict[str, Any]) -> list[int]:
    """Return the number of tokens of each sample of a row."""
    total = len(row["input_ids"])
    starts = [i for i, place in enumerate(row.get("position_ids", [0])) if place == 0]
    return [b - a for a, b in zip(starts, [*starts[1:], total], strict=True)]


def _compile(base: Any, checkpointed: bool) -> None:
    """Compile each decoder layer by itself; layers of one kind share what was compiled.

    PEFT adapts fused experts by a parametrization that it adds and removes in every forward pass, a new class each
    time.  It would have to be compiled again at every step, so these modules are left out.
    """
    for module in base.modules():
        if isinstance(module, ParamWrapper) and "forward" not in vars(module):  # without `use_lora_factors`
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
    for layer in base.get_decoder().layers:
        # A checkpointed layer can't be compiled itself, but the modules in it can.
        for module in layer.children() if checkpointed else [layer]:
            module.forward = torch.compile(module.forward, dynamic=True)
