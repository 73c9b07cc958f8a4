"""mla-tune: fine-tune models with Multi-head Latent Attention, merge and absorb the result, and prove it right.

    load_recipe(name, overrides)   a recipe file or a shipped recipe, checked
    inspect(model)                 every layer that an adapter can attach to; no weights, no torch
    plan(recipe)                   what train would do; no weights
    train(recipe)                  a run folder with an adapter
    merge_absorb(run)              a checkpoint in the base's own format, absorbed tensors, and the proof
    verify(folder)                 the proof alone, for a merge made by any tool
    generate(model, prompts)       answers, decoded in the latent space
    absorb(model), expand(model)   the same for a transformers model that you hold, and back
    LatentCache                    a KV cache with room for tokens to come

docs/python.md walks through all of them.  A name is loaded when it is first used: `import mla_tune` imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mla_tune.api import inspect, plan
    from mla_tune.inference.absorb import absorb, expand
    from mla_tune.inference.generate import generate
    from mla_tune.inference.latent_cache import LatentCache
    from mla_tune.merge.run import merge_absorb
    from mla_tune.recipe.load import load_recipe
    from mla_tune.training.run import train
    from mla_tune.verification.verify import verify

__all__ = [
    "LatentCache",
    "absorb",
    "expand",
    "generate",
    "inspect",
    "load_recipe",
    "merge_absorb",
    "plan",
    "train",
    "verify",
]

#: Name → the module that has it.
_HOMES = {
    "LatentCache": "mla_tune.inference.latent_cache",
    "absorb": "mla_tune.inference.absorb",
    "expand": "mla_tune.inference.absorb",
    "generate": "mla_tune.inference.generate",
    "inspect": "mla_tune.api",
    "load_recipe": "mla_tune.recipe.load",
    "merge_absorb": "mla_tune.merge.run",
    "plan": "mla_tune.api",
    "train": "mla_tune.training.run",
    "verify": "mla_tune.verification.verify",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
