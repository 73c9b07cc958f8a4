"""Train complete modules beside the LoRA (`adapter.modules_to_save`).

PEFT compares the ends of module paths as text, so that `norm` selects every norm of every layer.  In a recipe a name
selects modules with exactly that name, and PEFT is given names that select no others.
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
    """Return the placement with every module that `names` select, and its number of parameters.

    `config` is the model's config.json, from which a model without numbers is built; `quantized`: its matrices stay
    quantized.  Raises `PlacementError` for a name that no module has, and for modules that can't be trained completely.
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
                raise PlacementError(
                    f"{_KEY}: '{name}' ({path}) has modules inside, or is a stack of experts; name single modules"
                )
            if path in adapted:
                raise PlacementError(
                    f"{_KEY}: '{name}' ({path}) has a LoRA already (adapter.targets); keep one of the two"
                )
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
    """Path of each module → number of its parameters; 0 for a module with modules inside, and for stacked experts."""
    from transformers import AutoConfig

    from mla_tune.model.auto import auto_class

    built = AutoConfig.for_model(**{k: v for k, v in config.items() if k not in FIELDS})
    with torch.device("meta"):
        model: Any = auto_class(built).from_config(built)
    found = {}
    for path, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        is_leaf = path and not list(module.children()) and all(p.ndim < 3 for p in own)
        if path:
            found[path] = sum(p.numel() for p in own) if is_leaf else 0
    return found


def peft_names(placement: Placement, model: torch.nn.Module) -> list[str] | None:
    """Names under which PEFT, which compares ends of paths, finds exactly the planned modules; None without any.

    A name is the last part of a path where no other module's path ends in it, else the full path.
    """
    paths = {path for path, _ in placement.modules_to_save}
    everywhere = [name for name, _ in model.named_modules()]
    names = set()
    for path in paths:
        leaf = path.rpartition(".")[2]
        names.add(leaf if {n for n in everywhere if n.endswith(leaf)} <= paths else path)
    return sorted(names) or None


def modules_to_save_copies(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Path of a module in the model without PEFT → the copy of it that PEFT trains."""
    from peft.utils.other import ModulesToSaveWrapper

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            found[name.removeprefix("base_model.model.")] = module.modules_to_save["default"]
    return found


def train_in_float32(model: torch.nn.Module) -> None:
    """Convert the copies to float32, as PEFT does with LoRA factors; their outputs keep the model's dtype."""
    for copy in modules_to_save_copies(model).values():
        dtype = next(copy.parameters()).dtype
        if dtype != torch.float32:
            copy.float()
            copy.register_forward_hook(_cast_to(dtype))


def _cast_to(dtype: torch.dtype) -> Callable[[torch.nn.Module, Any, Any], torch.Tensor]:
    return lambda module, inputs, output: output.to(dtype)
