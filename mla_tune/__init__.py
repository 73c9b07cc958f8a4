"""mla-tune: fine-tune models with Multi-head Latent Attention, merge and absorb the result, and prove it right.

mla_tune.absorb(model)   decode in the latent space, inside transformers' own `generate`
mla_tune.expand(model)   and back
mla_tune.LatentCache     a cache with room for tokens to come
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mla_tune.inference.absorb import absorb, expand
    from mla_tune.inference.latent_cache import LatentCache

__all__ = ["LatentCache", "absorb", "expand"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # torch is loaded by those alone who ask for it
        module = "latent_cache" if name == "LatentCache" else "absorb"
        return getattr(import_module(f"mla_tune.inference.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
