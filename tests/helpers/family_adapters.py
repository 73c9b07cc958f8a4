"""LoRA adapters on the tiny families: planned, attached, with numbers in B."""

from __future__ import annotations

from typing import Any

import torch

from mla_tune.adapter.placement import Placement, place
from mla_tune.arch.build import architecture
from mla_tune.model.attach import attach
from mla_tune.recipe.schema import AdapterSection
from tests.helpers.tiny_families import FAMILIES, VOCABULARY, tiny

IDS = torch.randint(0, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(1))
#: PEFT 0.21 loses adapters on these of Mistral Large 4 between save and load.
LOST = {"mistral_large4": {"safe", "all-linear", "W_UKV-priority"}}


def planned(name: str, targets: Any) -> Placement:
    """The placement of `targets` in the tiny family `name`, with rank 4 and alpha 8."""
    return place(architecture(FAMILIES[name]), AdapterSection(targets=targets, rank=4, alpha=8))


def adapted(name: str, placement: Placement) -> Any:
    """A tiny model with the adapter on it, and numbers in B."""
    model: Any = attach(tiny(name), architecture(FAMILIES[name]), placement, seed=0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model: Any) -> torch.Tensor:
    """Logits (1, 12, vocabulary) of the fixed tokens `IDS`."""
    return model(input_ids=IDS, use_cache=False).logits
