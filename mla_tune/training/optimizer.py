"""A recipe → parameter groups for AdamW, with the learning rate of each role."""

from __future__ import annotations

from typing import Any

import torch

from mla_tune.adapter.placement import Placement
from mla_tune.arch.roles import Role
from mla_tune.errors import CheckError
from mla_tune.model.attach import attached_loras
from mla_tune.model.modules_to_save import modules_to_save_copies
from mla_tune.preflight.plan import role_rates
from mla_tune.recipe.schema import Recipe


def param_groups(model: torch.nn.Module, placement: Placement, recipe: Recipe) -> list[dict[str, Any]]:
    """Return AdamW's groups, one for each role and kind of decay, each with its peak `lr` and its `role`.

    With LoRA+ (Hayou et al., arXiv:2402.12354) a role is two groups, `W_O.A` and `W_O.B`, and B's rate is
    `optimizer.lora_plus_ratio` times A's; DoRA's magnitudes go with A.  Matrices get `weight_decay`, vectors (norms,
    biases, magnitudes) none.  Every trainable parameter is in exactly one group, or `CheckError`.
    """
    rates, weight_decay = role_rates(placement, recipe), recipe.optimizer.weight_decay
    faster = recipe.optimizer.lora_plus_ratio
    rates |= {
        f"{role}.{factor}": r for role in rates for factor, r in (("A", rates[role]), ("B", rates[role] * faster))
    }
    role_of: dict[int, str] = {}
    if placement.method != "none":
        roles: dict[str, Role] = {p.site.parameter: p.site.role for p in placement.sites}
        for a in attached_loras(model):
            # Through the LoRA's own containers: a wrapper nested in another one holds both experts matrices.
            containers = (("A", a.layer.lora_A), ("B", a.layer.lora_B), ("A", a.layer.lora_magnitude_vector))
            for factor, container in containers:
                for parameter in container.parameters():
                    role = roles[a.parameter].value
                    role_of[id(parameter)] = role if faster == 1 else f"{role}.{factor}"
        for path, copy in modules_to_save_copies(model).items():
            role_of |= {id(p): path.rpartition(".")[2] for p in copy.parameters()}
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role = "all" if placement.method == "none" else role_of.get(id(parameter))
        if role is None:
            raise CheckError(f"{name} is trainable but belongs to no role of the recipe")
        decays = parameter.ndim >= 2
        group = groups.setdefault(
            (role, decays),
            {"params": [], "role": role, "lr": rates[role], "weight_decay": weight_decay if decays else 0.0},
        )
        group["params"].append(parameter)
    return list(groups.values())
