"""Attach the planned adapter with PEFT, and compare what PEFT attached with the plan."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper

from mla_tune.adapter.peft_config import peft_config
from mla_tune.adapter.placement import Placement
from mla_tune.arch.site import Architecture
from mla_tune.errors import CheckError
from mla_tune.model.modules_to_save import modules_to_save_copies, peft_names, train_in_float32


@dataclass(frozen=True, slots=True)
class AttachedLora:
    """One LoRA that PEFT attached."""

    parameter: str
    """The base parameter that it adapts, by its name in the model without PEFT."""
    rank: int
    """Its rank r."""
    scale: float
    """Its scale s."""
    layer: LoraLayer
    """PEFT's layer, which holds A and B."""


def attach(model: torch.nn.Module, arch: Architecture, placement: Placement, seed: int) -> PeftModel:
    """Wrap `model` with the planned LoRA: A is drawn from `seed`, B is zero (`lora_init` has other initializations).

    Raises `CheckError` with the differences where PEFT attached anything but the plan.
    """
    torch.manual_seed(seed)
    config = peft_config(arch, placement, peft_names(placement, model))
    with warnings.catch_warnings():
        # PEFT 0.21 warns that it ignores keys that name parameters, and does apply them; the result is checked below.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
        peft_model = get_peft_model(model, config)  # type: ignore[arg-type]
    train_in_float32(peft_model)
    check_attached(peft_model, placement)
    return peft_model  # type: ignore[return-value]


def attached_loras(model: torch.nn.Module, adapter: str = "default") -> list[AttachedLora]:
    """List every LoRA of `adapter` in a PEFT model."""
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or adapter not in module.lora_A:
            continue
        path = name.removeprefix("base_model.model.").replace(".base_layer", "")
        leaf = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
        found.append(AttachedLora(f"{path}.{leaf}", module.r[adapter], module.scaling[adapter], module))
    return found


def check_attached(model: torch.nn.Module, placement: Placement) -> None:
    """Check that each planned LoRA is attached, with its rank and scale, and that nothing else can be trained.

    Raises `CheckError` with the differences.
    """
    want = {p.site.parameter: (p.rank * placement.width, placement.scale(p)) for p in placement.sites}
    have = {a.parameter: (a.rank, a.scale) for a in attached_loras(model)}
    problems = [f"planned, but PEFT attached nothing: {k}" for k in want.keys() - have.keys()]
    problems += [f"attached, but not planned: {k}" for k in have.keys() - want.keys()]
    for k in want.keys() & have.keys():
        if want[k][0] != have[k][0] or abs(want[k][1] - have[k][1]) > 1e-9 * want[k][1]:
            problems.append(f"{k}: planned rank {want[k][0]}, scale {want[k][1]:g}; got {have[k][0]}, {have[k][1]:g}")
    planned, copied = {path for path, _ in placement.modules_to_save}, modules_to_save_copies(model)
    problems += [f"planned in modules_to_save, but PEFT made no copy: {path}" for path in planned - copied.keys()]
    problems += [f"PEFT made a copy to train, but it is not planned: {path}" for path in copied.keys() - planned]
    copies = {id(p) for copy in copied.values() for p in copy.parameters()}
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    problems += [
        f"trainable, but not part of an adapter: {n}" for n, p in trainable if ".lora_" not in n and id(p) not in copies
    ]
    if problems:
        shown = "\n  ".join(sorted(problems)[:20])
        more = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckError(
            f"the adapter that PEFT attached is not the one planned; nothing was trained:\n  {shown}{more}"
        )


def freeze_unreached(model: torch.nn.Module, arch: Architecture) -> int:
    """Freeze weights that get no gradient from text, where all weights are trained; return how many numbers they have.

    They are the towers of a multimodal model, through which text does not pass, and indexers, which transformers runs
    without gradients.
    """
    text_model = (f"{arch.prefix}.", "lm_head.")
    frozen = 0
    for name, parameter in model.named_parameters():
        if not name.startswith(text_model) or ".indexer." in name:
            parameter.requires_grad_(False)
            frozen += parameter.numel()
    return frozen
