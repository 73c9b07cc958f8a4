"""Build a transformers model from config.json without memory for its parameters, which are on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.initialization import no_init_weights

from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.index import Checkpoint
from mla_tune.checkpoint.quantized.config import FIELDS
from mla_tune.model.auto import auto_class, set_experts


def build_empty_model(checkpoint: Checkpoint, arch: Architecture, attention: str) -> PreTrainedModel:
    """Build the model of a checkpoint's config.json in float32, not quantized; buffers have memory, parameters don't.

    `attention` is transformers' name of the attention implementation.  Raises `LogitsUnavailable` for a model type
    that transformers doesn't have.
    """
    ignored = (*FIELDS, "auto_map", "model_type")
    settings = {k: v for k, v in checkpoint.config.items() if k not in ignored}
    # A published config.json may name a model type that transformers doesn't know: then the family's is used.
    kind = arch.model_type if arch.model_type in CONFIG_MAPPING else arch.family.model_type
    if kind not in CONFIG_MAPPING:
        raise LogitsUnavailable(f"transformers has no model of the type '{arch.model_type}'")
    config = CONFIG_MAPPING[kind].from_dict(settings)
    with no_init_weights(), init_empty_weights(include_buffers=False), _EmptyOnMeta():
        model = auto_class(config).from_config(config, dtype=torch.float32, attn_implementation=attention)
    set_experts(model, "eager")
    return model.eval()


class LogitsUnavailable(Exception):
    """The logits can't be computed; the message says why."""


class _EmptyOnMeta(TorchFunctionMode):
    """Makes `torch.empty` allocate on the meta device.

    `init_empty_weights` alone allocates each parameter before it drops it, which fails where the experts of one layer
    need more than the machine's memory.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
