"""A transformers model from config.json whose parameters are on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.initialization import no_init_weights

from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.index import Checkpoint
from mla_tune.model.auto import auto_class, set_experts


def build(checkpoint: Checkpoint, arch: Architecture, attention: str) -> PreTrainedModel:
    """The model of config.json in float32 with parameters on the meta device and real buffers, as if not quantized."""
    left_out = ("quantization_config", "compression_config", "auto_map", "model_type")
    settings = {k: v for k, v in checkpoint.config.items() if k not in left_out}
    # A published type may be an alias that transformers doesn't know.
    kind = arch.model_type if arch.model_type in CONFIG_MAPPING else arch.family.model_type
    if kind not in CONFIG_MAPPING:
        raise NotComputed(f"transformers has no model of the type '{arch.model_type}'")
    config = CONFIG_MAPPING[kind].from_dict(settings)
    with no_init_weights(), init_empty_weights(include_buffers=False), _EmptyOnMeta():
        model = auto_class(config).from_config(config, dtype=torch.float32, attn_implementation=attention)
    set_experts(model, "eager")
    return model.eval()


class NotComputed(Exception):
    """Logits can't be had; the text says why."""


class _EmptyOnMeta(TorchFunctionMode):
    """`init_empty_weights` allocates each parameter before it drops it, which fails where the experts of one layer are
    more than the machine's memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
