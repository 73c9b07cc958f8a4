"""`absorb` and `expand`: switch a transformers model with Multi-head Latent Attention to absorbed decoding and back."""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import nn

from mla_tune.errors import InputError, NotMLAError
from mla_tune.inference.absorbed_weights import find_absorbed_weights
from mla_tune.inference.attention_interface import PREFIX, STATE, register
from mla_tune.inference.batched_lora import disable_batched_lora, enable_batched_lora
from mla_tune.inference.latent_attention import LatentAttention, no_plain_weight_reason

#: Values of `absorb(mode=…)`.
MODES = ("auto", "absorbed", "expanded")
Model = TypeVar("Model", bound=nn.Module)


class absorb:
    """Make every MLA module of `model` attend in the latent space where that is cheaper.

    `model` is a transformers model or a `PeftModel` on one.  No weight is changed or copied, and `generate`, caches,
    adapters and `adapter_names` work as before.  `mode` is `auto` (each call uses the cheaper form: decoding is
    absorbed, long prompts are expanded), `absorbed` or `expanded`.  Another call of `absorb` changes the mode.
    `model.set_attn_implementation` ends absorption: call `absorb` again to absorb over the new implementation.

    Where `kv_b_proj` is quantized or offloaded, W_UK and W_UV come from the absorbed.safetensors beside the model, if
    that file was made from this model.  `unsupported_reasons` names the modules that stay expanded in every mode.

    Called as a function, absorption lasts until `expand(model)`, and the return value is not needed; as a context
    manager (`with absorb(model) as model:`), until the block ends.  Raises `NotMLAError` for a model without MLA
    modules, and `InputError` for an unknown mode.
    """

    def __init__(self, model: Any, mode: str = "auto") -> None:
        if mode not in MODES:
            raise InputError(f"mode {mode!r}: allowed are {', '.join(MODES)}")
        self.model = model
        modules = list(mla_modules(model))
        if not modules:
            raise NotMLAError(f"{type(model).__name__} has no Multi-head Latent Attention")
        for module in modules:
            _absorb_module(module, mode)
        _attach_stored_weights(model)
        enable_batched_lora(model)

    def __enter__(self) -> Any:
        return self.model

    def __exit__(self, *_: object) -> None:
        expand(self.model)


def expand(model: Model) -> Model:
    """Undo `absorb`; return the model, bit for bit as before.  Does nothing to a model that is not absorbed."""
    for module in mla_modules(model):
        if hasattr(module, STATE):
            _expand_module(module)
    disable_batched_lora(model)
    return model


def is_absorbed(model: nn.Module) -> bool:
    """Whether `absorb` is in effect on a model."""
    return any(hasattr(module, STATE) for module in mla_modules(model))


def mla_modules(model: nn.Module) -> Iterator[Any]:
    """Yield the attention modules with a latent cache.

    In all MLA families of transformers 5.23 these, and no others, have `kv_b_proj` and `expand_kv`.
    """
    return (m for m in model.modules() if hasattr(m, "kv_b_proj") and hasattr(m, "expand_kv"))


def unsupported_reasons(model: nn.Module) -> dict[str, str]:
    """Return module path → reason for each module of an absorbed model that stays expanded whatever the mode."""
    reasons = {}
    for path, module in model.named_modules():
        state: LatentAttention | None = getattr(module, STATE, None)
        if state is not None and (reason := state.unsupported_reason()):
            reasons[path] = reason
    return reasons


def _absorb_module(module: Any, mode: str) -> None:
    """Give an attention module its `LatentAttention` and the attention implementation that uses it."""
    state: LatentAttention | None = getattr(module, STATE, None)
    if state is None:
        state = LatentAttention(module)
        setattr(module, STATE, state)
        module.expand_kv = MethodType(_skip_expansion, module)
    config = module.config
    if not config._attn_implementation.startswith(PREFIX):
        config._attn_implementation = register(config._attn_implementation)
    state.mode = mode


def _attach_stored_weights(model: nn.Module) -> None:
    """Give modules without a plain `kv_b_proj` weight W_UK and W_UV from the file beside the model, if it matches."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = {
        path: module
        for path, module in inner.named_modules()
        if hasattr(module, STATE) and getattr(module, STATE).stored_weights is None and no_plain_weight_reason(module)
    }
    found, reason = find_absorbed_weights(inner, modules)
    for path, module in modules.items():
        state: LatentAttention = getattr(module, STATE)
        state.stored_weights, state.no_stored_weights_reason = found.get(path), reason


def _expand_module(module: Any) -> None:
    """Remove what `_absorb_module` added."""
    del module.expand_kv
    delattr(module, STATE)
    name = module.config._attn_implementation
    if name.startswith(PREFIX):
        module.config._attn_implementation = name.removeprefix(PREFIX)


def _skip_expansion(module: Any, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace `expand_kv`: return the latent (B, 1, S, C) and the rope key (B, 1, S, R) unexpanded.

    The attention function (`attention_interface`) then receives them in place of keys and values.
    """
    state: LatentAttention = getattr(module, STATE)
    if not module.config._attn_implementation.startswith(PREFIX):  # the user has chosen another implementation since
        return state.expand(kv_nope, k_rot)
    state.record_adapter_names(kv_nope)
    return kv_nope, k_rot
