"""`adapter.modules_to_save`: modules that are trained whole beside the LoRA.

PEFT takes a name for every module whose path ends in the same letters (`norm` would be each norm of each layer).  Here
a name means modules of exactly that name, and PEFT is given names that it can't read otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from mla_tune.adapter.placement import Placement
from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.quantized.config import FIELDS
from mla_tune.errors import PlacementError, did_you_mean

_KEY = "adapter.modules_to_save"


def with_modules_to_save(
    placement: Placement, arch: Architecture, config: Mapping[str, Any], names: Sequence[str], quantized: bool
) -> Placement:
    """The placement, with every module that `names` mean and its number of parameters.

    `config`: the model's config.json; a model without numbers is made of it.  Raises `PlacementError` for a name that
    no module has, and for a module that can't be trained whole.
    """
    if not names:
        return placement
    modules = _modules(config)
    adapted = {p.site.path for p in placement.sites}
    matrices = {site.path for site in arch.sites if site.role != "lm_head"}
    found: dict[str, int] = {}
    for name in names:
        paths = [p for p in modules if p == name or p.endswith(f".{name}")]
        if not paths:
            leaves = sorted({p.rpartition(".")[2] for p, count in modules.items() if count})
            raise PlacementError(f"{_KEY}: the model has no module '{name}'{did_you_mean(name, leaves)}")
        for path in paths:
            if not modules[path]:
                raise PlacementError(f"{_KEY}: '{name}' ({path}) holds other modules; name those that are meant")
            if path in adapted:
                raise PlacementError(f"{_KEY}: '{name}' ({path}) has a LoRA already (adapter.targets); one of the two")
            if arch.tied and path.rpartition(".")[2] in ("embed_tokens", "lm_head"):
                raise PlacementError(
                    f"{_KEY}: '{name}': embeddings and output head of this model are one matrix, which PEFT would copy "
                    "and train apart"
                )
            if quantized and path in matrices:
                raise PlacementError(f"{_KEY}: '{name}' ({path}) is quantized in this base: such weights stay frozen")
            found[path] = modules[path]
    return replace(placement, modules_to_save=tuple(found.items()))


def _modules(config: Mapping[str, Any]) -> dict[str, int]:
    """Path → own parameters of each module; 0 of one that holds others, or stacked experts."""
    from transformers import AutoConfig

    from mla_tune.model.auto import auto_class

    built = AutoConfig.for_model(**{k: v for k, v in config.items() if k not in FIELDS})
    with torch.device("meta"):
        model: Any = auto_class(built).from_config(built)
    found = {}
    for path, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        leaf = path and not list(module.children()) and all(p.ndim < 3 for p in own)
        if path:
            found[path] = sum(p.numel() for p in own) if leaf else 0
    return found


def peft_names(placement: Placement, model: torch.nn.Module) -> list[str] | None:
    """Names for PEFT, which compares ends: the last part of a path where that means exactly the planned modules."""
    paths = {path for path, _ in placement.modules_to_save}
    everywhere = [name for name, _ in model.named_modules()]
    names = set()
    for path in paths:
        leaf = path.rpartition(".")[2]
        names.add(leaf if {n for n in everywhere if n.endswith(leaf)} <= paths else path)
    return sorted(names) or None


def modules_to_save_copies(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Path in the model without PEFT → the copy that is trained."""
    from peft.utils.other import ModulesToSaveWrapper

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            found[name.removeprefix("base_model.model.")] = module.modules_to_save["default"]
    return found


def train_in_float32(model: torch.nn.Module) -> None:
    """Give the copies float32 numbers, as PEFT gives LoRA, and their outputs the dtype that the model's had."""
    for copy in modules_to_save_copies(model).values():
        dtype = next(copy.parameters()).dtype
        if dtype != torch.float32:
            copy.float()
            copy.register_forward_hook(_cast_to(dtype))


def _cast_to(dtype: torch.dtype) -> Callable[[torch.nn.Module, Any, Any], torch.Tensor]:
    return lambda module, inputs, output: output.to(dtype)
