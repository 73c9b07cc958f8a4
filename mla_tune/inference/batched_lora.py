"""Rows of one batch with different adapters: every LoRA of a linear layer as two batched products.

PEFT runs its adapters one after another over parts of the batch; with eight of them that takes longer than the layer.
Here the factors of all rows lie in one stack (kept while rows and parameters stay the same), and

    y = g ⊙ (W x + B (A x)) + bias          A, B (times s) and g of the row's own adapter

PEFT itself says which row has which adapter: its hooks hand `adapter_names` to each layer.
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
    """In the place of the `forward` of a PEFT layer."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.original, self.tensors = layer, layer.forward, LayerLora(layer)
        self.experts = ExpertLora(layer)
        #: Whether its tokens are those of the text: the patches of an image lie in no row of the batch.
        self.of_text = False
        self._listening, self._heard = False, None

    def __call__(self, x: torch.Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        if self._listening:
            self._heard = adapter_names
            return x
        layer = self.layer
        by_parameter = isinstance(layer, ParamWrapper)
        if adapter_names is None and not by_parameter:
            return self.original(x, *args, **kwargs)
        if is_experts(layer) and len(args) == 2 and not kwargs:
            return self._experts(x, *args, adapter_names=adapter_names)
        whole = bool(args or kwargs or self.tensors.unsupported_reason())
        if adapter_names is None:
            if whole or layer.disable_adapters or layer.merged:
                return self.original(x, *args, **kwargs)
            return self._all_rows(x)
        if whole and by_parameter:  # which PEFT refuses whether or not these adapters are on it
            self._refuse(adapter_names)
            return layer.base_layer(x, *args, **kwargs)
        if whole:
            return self.original(x, *args, adapter_names=adapter_names, **kwargs)
        return self._rows(x, adapter_names)

    def _rows(self, x: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
        """A linear layer: x (B, …, in)."""
        base, count = self.layer.base_layer(x), len(names)
        if x.shape[0] != count or x.dim() < 2:
            raise InputError(f"adapter_names has {count} rows, and a layer is given {tuple(x.shape)}")
        flat = x.reshape(count, -1, x.shape[-1])
        if flat.shape[1] > 1:
            self.tensors.forget()  # a prompt: what is derived from parameters is made anew
        rows = self.tensors.rows(names)
        if rows is None:
            return base
        wide = base.view(count, -1, base.shape[-1])
        inner = torch.bmm(flat.to(rows.A_T.dtype), rows.A_T)
        if rows.g is None and wide.dtype == inner.dtype:
            add = torch.baddbmm if torch.is_grad_enabled() else torch.Tensor.baddbmm_
            return add(wide, inner, rows.B_T).view(base.shape)
        bias = getattr(self.layer.get_base_layer(), "bias", None)
        added = torch.bmm(inner, rows.B_T)
        if rows.g is not None:
            added = (added + (wide if bias is None else wide - bias)) * rows.g.unsqueeze(1)
            wide = 0 if bias is None else bias
        return (wide + added).to(base.dtype).view(base.shape)

    def _experts(self, *given: torch.Tensor, adapter_names: Sequence[str] | None) -> torch.Tensor:
        """Routed experts: their tokens (B·T, D), expert numbers and weights (B·T, K)."""
        if adapter_names is None:
            if any(w.disable_adapters or w.merged for w in wrappers(self.layer)):
                return self.original(*given)
            return self.experts.active(*given)
        if not self.of_text:
            self._refuse(adapter_names)
        return self.experts.rows(adapter_names, *given)

    @property
    def refuses(self) -> bool:
        """Whether rows can't have adapters of their own here: a parameter of something else, a router for one."""
        if is_experts(self.layer):
            return not self.of_text
        return isinstance(self.layer, ParamWrapper) and bool(self.tensors.unsupported_reason())

    def _refuse(self, names: Sequence[str]) -> None:
        """Raise `InputError` where one of these adapters is on such a layer."""
        for wrapper in wrappers(self.layer):
            for name in dict.fromkeys(names):
                if name in wrapper.lora_A:
                    raise InputError(
                        f"{name} adapts {wrapper.parameter_name} of a {type(wrapper.get_base_layer()).__name__}: rows "
                        "of a batch can't have adapters of their own there"
                    )

    def _all_rows(self, x: torch.Tensor) -> torch.Tensor:
        """The active adapters on a layer that PEFT reaches as a parameter; PEFT makes W + s·B A for every token."""
        y = self.layer.base_layer(x)
        for update in self.tensors.active():
            y = y + (((x.to(update.A.dtype) @ update.A.mT) @ update.B.mT) * update.s).to(y.dtype)
        return y

    def listen(self, x: torch.Tensor) -> Sequence[str] | None:
        """The adapter names that PEFT hands to this layer now."""
        self._listening, self._heard = True, None
        try:
            self.layer(x)
        finally:
            self._listening = False
        return self._heard


def batched_lora_forward(layer: Any) -> BatchedLoraForward:
    """That of this layer, put in its place where it has none."""
    found = layer.__dict__.get("forward")
    if not isinstance(found, BatchedLoraForward):
        found = layer.forward = BatchedLoraForward(layer)
    return found


def enable_batched_lora(model: nn.Module) -> None:
    """For every LoRA of a linear layer and of routed experts in the model.  Layers that are adapted later stay PEFT's
    until it is called again: slower, and without rows of their own where PEFT reaches them as parameters."""
    attention = (path for path, m in model.named_modules() if hasattr(m, "kv_b_proj") and hasattr(m, "expand_kv"))
    #: Of the layers of the text: `model.language_model.layers.`
    text = {match[0] if (match := re.match(r"(?:.*?\.)?(?=\d+\.)", path)) else "" for path in attention}
    for path, module in model.named_modules():
        if is_adapted(module):
            batched_lora_forward(module).of_text = path.startswith(tuple(text))


def supports_batched_lora(model: nn.Module, name: str) -> bool:
    """Whether rows of a batch can have this adapter of an absorbed model, whatever the others have."""
    layers: list[Any] = [m for m in model.modules() if is_adapted(m)]
    return not any(batched_lora_forward(layer).refuses for layer in layers if name in layer.lora_A)


def drop_stale_adapter_names(model: nn.Module) -> None:
    """Take out the hooks with `adapter_names` that PEFT leaves behind where a forward ends by an error: with them,
    every later call would be one of that batch."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if "adapter_names" in (getattr(hook, "keywords", None) or {}):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def disable_batched_lora(model: nn.Module) -> None:
    """Give every adapted layer PEFT's own forward back."""
    for module in model.modules():
        found = module.__dict__.get("forward")
        if isinstance(found, BatchedLoraForward):
            undo(found)


def undo(forward: BatchedLoraForward) -> None:
    """Give one layer the forward back that it had before."""
    layer = forward.layer
    del layer.forward
    if getattr(forward.original, "__func__", None) is not type(layer).forward:
        layer.forward = forward.original  # another library's, that was there before
