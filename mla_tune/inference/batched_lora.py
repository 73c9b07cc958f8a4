"""A faster forward of PEFT's LoRA layers, in which each row of a batch can have another adapter.

PEFT runs the adapters of a mixed batch one after another, each on its rows; with eight of them that takes longer than
the layer itself.  Here the factors of all rows are stacked (and reused while rows and parameters stay the same), and
two batched products compute

    y = g ⊙ (W x + B (A x)) + bias          with A, B (times s) and g of the row's adapter

The adapter of each row comes from PEFT: its hooks pass `adapter_names` to each layer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from mla_tune.errors import InputError
from mla_tune.inference.batched_expert_lora import ExpertLora, is_experts, wrappers
from mla_tune.inference.lora_tensors import LayerLora, is_adapted


class BatchedLoraForward:
    """A callable that replaces the `forward` of a PEFT layer (see `ensure_batched_forward`)."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        #: The forward that it replaces.
        self.original = layer.forward
        #: Factors, where the layer adapts a linear layer.
        self.lora = LayerLora(layer)
        #: Factors, where the layer adapts routed experts.
        self.experts = ExpertLora(layer)
        #: Whether the layer is in the text decoder, whose tokens belong to rows of the batch.  The image patches in a
        #: vision tower do not.
        self.in_text_decoder = False
        self._is_recording, self._recorded_names = False, None

    def __call__(self, x: torch.Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        if self._is_recording:
            self._recorded_names = adapter_names
            return x
        layer = self.layer
        by_parameter = isinstance(layer, ParamWrapper)
        if adapter_names is None and not by_parameter:
            return self.original(x, *args, **kwargs)
        if is_experts(layer) and len(args) == 2 and not kwargs:
            return self._forward_experts(x, *args, adapter_names=adapter_names)
        needs_original = bool(args or kwargs or self.lora.unsupported_reason())
        if adapter_names is None:
            if needs_original or layer.disable_adapters or layer.merged:
                return self.original(x, *args, **kwargs)
            return self._forward_active(x)
        if needs_original and by_parameter:  # PEFT would refuse the batch even if none of its adapters is on this layer
            self._refuse(adapter_names)
            return layer.base_layer(x, *args, **kwargs)
        if needs_original:
            return self.original(x, *args, adapter_names=adapter_names, **kwargs)
        return self._forward_batched(x, adapter_names)

    @property
    def refuses_adapter_names(self) -> bool:
        """Whether this layer can't compute rows with different adapters.

        That is a layer on a parameter of a module other than a linear layer or routed experts (a router, for example),
        or on routed experts outside the text decoder.
        """
        if is_experts(self.layer):
            return not self.in_text_decoder
        return isinstance(self.layer, ParamWrapper) and bool(self.lora.unsupported_reason())

    def requested_adapter_names(self, x: torch.Tensor) -> Sequence[str] | None:
        """Return the adapter names that PEFT's hooks pass to this layer now; None outside a mixed batch.

        `x` is any input; the layer's output is not computed.
        """
        self._is_recording, self._recorded_names = True, None
        try:
            self.layer(x)
        finally:
            self._is_recording = False
        return self._recorded_names

    def _forward_batched(self, x: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
        """Compute a linear layer with the adapter `names[i]` for row i of x (B, …, in)."""
        base, count = self.layer.base_layer(x), len(names)
        if x.shape[0] != count or x.dim() < 2:
            raise InputError(f"adapter_names has {count} names, but a layer got an input of shape {tuple(x.shape)}")
        flat = x.reshape(count, -1, x.shape[-1])
        if flat.shape[1] > 1:
            self.lora.clear_derived()  # several tokens a row: a prompt begins
        factors = self.lora.batched(names)
        if factors is None:
            return base
        y = base.view(count, -1, base.shape[-1])
        inner = torch.bmm(flat.to(factors.A_T.dtype), factors.A_T)
        if factors.g is None and y.dtype == inner.dtype:
            add = torch.baddbmm if torch.is_grad_enabled() else torch.Tensor.baddbmm_
            return add(y, inner, factors.B_T).view(base.shape)
        bias = getattr(self.layer.get_base_layer(), "bias", None)
        added = torch.bmm(inner, factors.B_T)
        if factors.g is not None:
            added = (added + (y if bias is None else y - bias)) * factors.g.unsqueeze(1)
            y = 0 if bias is None else bias
        return (y + added).to(base.dtype).view(base.shape)

    def _forward_active(self, x: torch.Tensor) -> torch.Tensor:
        """Compute a linear layer that PEFT adapts as a parameter, with the active adapters for all rows.

        PEFT's own forward would compute the matrix W + s·B A at each call.
        """
        y = self.layer.base_layer(x)
        for lora in self.lora.active():
            y = y + (((x.to(lora.A.dtype) @ lora.A.mT) @ lora.B.mT) * lora.s).to(y.dtype)
        return y

    def _forward_experts(self, *inputs: torch.Tensor, adapter_names: Sequence[str] | None) -> torch.Tensor:
        """Compute routed experts; `inputs` are tokens (B·T, D), expert indices (B·T, K) and weights (B·T, K)."""
        if adapter_names is None:
            if any(w.disable_adapters or w.merged for w in wrappers(self.layer)):
                return self.original(*inputs)
            return self.experts.forward_active(*inputs)
        if not self.in_text_decoder:
            self._refuse(adapter_names)
        return self.experts.forward_batched(adapter_names, *inputs)

    def _refuse(self, names: Sequence[str]) -> None:
        """Raise `InputError` where one of these adapters is on this layer."""
        for wrapper in wrappers(self.layer):
            for name in dict.fromkeys(names):
                if name in wrapper.lora_A:
                    raise InputError(
                        f"{name} adapts {wrapper.parameter_name} of a {type(wrapper.get_base_layer()).__name__}: rows "
                        "of one batch can't have different adapters there; use one adapter for the whole batch"
                    )


def ensure_batched_forward(layer: Any) -> BatchedLoraForward:
    """Return the `BatchedLoraForward` of a PEFT layer; put one in place of its forward if it has none."""
    forward = layer.__dict__.get("forward")
    if not isinstance(forward, BatchedLoraForward):
        forward = layer.forward = BatchedLoraForward(layer)
    return forward


def enable_batched_lora(model: nn.Module) -> None:
    """Give every adapted layer of the model a `BatchedLoraForward`.

    Layers that are adapted later keep PEFT's forward until this is called again: they are slower, and layers that PEFT
    adapts as parameters refuse rows with different adapters.
    """
    attention = (path for path, m in model.named_modules() if hasattr(m, "kv_b_proj") and hasattr(m, "expand_kv"))
    # Paths of the decoder layers begin like those of attention up to the layer's index: `model.language_model.layers.`
    prefixes = {match[0] if (match := re.match(r"(?:.*?\.)?(?=\d+\.)", path)) else "" for path in attention}
    for path, module in model.named_modules():
        if is_adapted(module):
            ensure_batched_forward(module).in_text_decoder = path.startswith(tuple(prefixes))


def disable_batched_lora(model: nn.Module) -> None:
    """Give every adapted layer of the model its own forward back."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, BatchedLoraForward):
            _restore_forward(forward)


def _restore_forward(forward: BatchedLoraForward) -> None:
    layer = forward.layer
    del layer.forward
    if getattr(forward.original, "__func__", None) is not type(layer).forward:
        layer.forward = forward.original  # another library had replaced it before


def supports_batched_lora(model: nn.Module, name: str) -> bool:
    """Whether rows of an absorbed model can have the adapter `name` while other rows have other adapters."""
    layers: list[Any] = [m for m in model.modules() if is_adapted(m)]
    return not any(ensure_batched_forward(layer).refuses_adapter_names for layer in layers if name in layer.lora_A)


def drop_stale_adapter_names(model: nn.Module) -> None:
    """Remove the hooks with `adapter_names` that PEFT leaves in the model where a forward raises an error.

    With them, every later call would use the adapters of that batch.
    """
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if "adapter_names" in (getattr(hook, "keywords", None) or {}):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
