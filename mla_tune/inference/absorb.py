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
from mla_tune.inference.latent_attention import LatentAttention, no_plain_weight

MODES = ("auto", "absorbed", "expanded")
Model = TypeVar("Model", bound=nn.Module)


class absorb:
    """Make every MLA module of `model` attend in the latent space where that is cheaper.

    `model` is a transformers model or a `PeftModel` on one.  No weight is changed or copied, and nothing else about the
    model: `generate`, caches, adapters and `adapter_names` work as before.  `mode`: auto (each call takes the cheaper
    way: decoding is absorbed, long prompts are expanded), absorbed or expanded.  Called again, it changes the mode.
    `model.set_attn_implementation` ends it: call it again to absorb over another implementation.

    Where `kv_b_proj` is quantized or offloaded, W_UK and W_UV come from the absorbed.safetensors beside the model, if
    that was made from it; modules that stay expanded are told by `unsupported_reasons`.

    As a function it returns nothing of use and lasts until `expand(model)`; as a context manager (`with absorb(model)
    as model:`) until the block ends.  Raises `NotMLAError` for a model without MLA modules, `InputError` for a mode.
    """

    def __init__(self, model: Any, mode: str = "auto") -> None:
        if mode not in MODES:
            raise InputError(f"mode {mode!r}: allowed are {', '.join(MODES)}")
        self.model = model
        modules = list(mla_modules(model))
        if not modules:
            raise NotMLAError(f"{type(model).__name__} has no Multi-head Latent Attention")
        for module in modules:
            _absorb(module, mode)
        _take_stored(model)
        enable_batched_lora(model)

    def __enter__(self) -> Any:
        return self.model

    def __exit__(self, *_: object) -> None:
        expand(self.model)


def expand(model: Model) -> Model:
    """Take `absorb` back: the model is as it was, to the bit.  Does nothing to a model that is not absorbed."""
    for module in mla_modules(model):
        if hasattr(module, STATE):
            _expand(module)
    disable_batched_lora(model)
    return model


def is_absorbed(model: nn.Module) -> bool:
    """Whether `absorb` is in effect on a model."""
    return any(hasattr(module, STATE) for module in mla_modules(model))


def mla_modules(model: nn.Module) -> Iterator[Any]:
    """The attention modules with a latent cache: exact in all families of transformers 5.23."""
    return (m for m in model.modules() if hasattr(m, "kv_b_proj") and hasattr(m, "expand_kv"))


def unsupported_reasons(model: nn.Module) -> dict[str, str]:
    """By module path, why it is not absorbed whatever the mode; empty where all can be."""
    found = {}
    for path, module in model.named_modules():
        state: LatentAttention | None = getattr(module, STATE, None)
        if state is not None and (why := state.unsupported_reason()):
            found[path] = why
    return found


def _absorb(module: Any, mode: str) -> None:
    state: LatentAttention | None = getattr(module, STATE, None)
    if state is None:
        state = LatentAttention(module)
        setattr(module, STATE, state)
        module.expand_kv = MethodType(_keep_latent, module)
    config = module.config
    if not config._attn_implementation.startswith(PREFIX):
        config._attn_implementation = register(config._attn_implementation)
    state.mode = mode


def _take_stored(model: nn.Module) -> None:
    """For modules without a plain `kv_b_proj`, W_UK and W_UV from the file beside the model, where it fits."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    wanting = {
        path: module
        for path, module in inner.named_modules()
        if hasattr(module, STATE) and getattr(module, STATE).stored is None and no_plain_weight(module)
    }
    found, why = find_absorbed_weights(inner, wanting)
    for path, module in wanting.items():
        state: LatentAttention = getattr(module, STATE)
        state.stored, state.not_stored = found.get(path), why


def _expand(module: Any) -> None:
    del module.expand_kv
    delattr(module, STATE)
    name = module.config._attn_implementation
    if name.startswith(PREFIX):
        module.config._attn_implementation = name.removeprefix(PREFIX)


def _keep_latent(module: Any, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In the place of `expand_kv`: the latent (B, 1, S, C) and the rope key (B, 1, S, R) as they are."""
    state: LatentAttention = getattr(module, STATE)
    if not module.config._attn_implementation.startswith(PREFIX):  # the user has set another one since
        return state.expand(kv_nope, k_rot)
    state.listen(kv_nope)
    return kv_nope, k_rot
