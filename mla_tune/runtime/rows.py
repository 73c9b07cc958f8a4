"""Rows of one batch with different adapters: every LoRA of a linear layer as two batched products.

PEFT runs its adapters one after another over parts of the batch; with eight of them that takes longer than the layer.
Here the factors of all rows lie in one stack (kept while rows and parameters stay the same), and

    y = g ⊙ (W x + B (A x)) + bias          A, B (times s) and g of the row's own adapter

PEFT itself says which row has which adapter: its hooks hand `adapter_names` to each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from mla_tune.errors import InputError
from mla_tune.runtime import experts
from mla_tune.runtime.lora import LoraTensors, is_adapted


class RowForward:
    """In the place of the `forward` of a PEFT layer on a linear one."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.original, self.tensors = layer, layer.forward, LoraTensors(layer)
        self._listening, self._heard = False, None

    def __call__(self, x: torch.Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        if self._listening:
            self._heard = adapter_names
            return x
        by_parameter = isinstance(self.layer, ParamWrapper)
        if adapter_names is None and not by_parameter:
            return self.original(x, *args, **kwargs)
        whole = bool(args or kwargs or self.tensors.obstacle())
        if adapter_names is None:
            if experts.is_experts(self.layer):
                return experts.forward(self.layer, x, *args, **kwargs)
            return self.original(x, *args, **kwargs) if whole else self._all_rows(x)
        if whole and by_parameter:  # routed experts, which PEFT refuses whether or not these adapters are on them
            here = [name for name in dict.fromkeys(adapter_names) if name in self.layer.lora_A]
            if here:
                raise InputError(
                    f"{here[0]} adapts routed experts: rows of a batch can't have adapters of their own there"
                )
            return self.layer.base_layer(x, *args, **kwargs)
        if whole:
            return self.original(x, *args, adapter_names=adapter_names, **kwargs)
        base, count = self.layer.base_layer(x), len(adapter_names)
        if x.shape[0] == count and x.dim() > 2:
            flat = x.reshape(count, -1, x.shape[-1])
        elif x.dim() == 2 and x.shape[0] % count == 0:
            flat = x.view(count, -1, x.shape[-1])  # tokens of all rows in a line
        else:
            raise InputError(f"adapter_names has {count} rows, and a layer is given {tuple(x.shape)}")
        if flat.shape[1] > 1:
            self.tensors.forget()  # a prompt: what is derived from parameters is made anew
        rows = self.tensors.rows(adapter_names)
        if rows is None:
            return base
        wide = base.view(count, -1, base.shape[-1])
        inner = torch.bmm(flat.to(rows.A_T.dtype), rows.A_T)
        if rows.g is None and wide.dtype == inner.dtype:
            return torch.baddbmm(wide, inner, rows.B_T).view(base.shape)
        bias = getattr(self.layer.get_base_layer(), "bias", None)
        added = torch.bmm(inner, rows.B_T)
        if rows.g is not None:
            added = (added + (wide if bias is None else wide - bias)) * rows.g.unsqueeze(1)
            wide = 0 if bias is None else bias
        return (wide + added).to(base.dtype).view(base.shape)

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


def row_forward(layer: Any) -> RowForward:
    """That of this layer, put in its place where it has none."""
    found = layer.__dict__.get("forward")
    if not isinstance(found, RowForward):
        found = layer.forward = RowForward(layer)
    return found


def let_rows_choose(model: nn.Module) -> None:
    """For every LoRA of a linear layer in the model.  Layers that are adapted later stay PEFT's: as right, slower."""
    for module in model.modules():
        if is_adapted(module):
            row_forward(module)


def drop_names(model: nn.Module) -> None:
    """Take out the hooks with `adapter_names` that PEFT leaves behind where a forward ends by an error: with them,
    every later call would be one of that batch."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if "adapter_names" in (getattr(hook, "keywords", None) or {}):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def undo_rows_choose(model: nn.Module) -> None:
    for module in model.modules():
        found = module.__dict__.get("forward")
        if isinstance(found, RowForward):
            undo(found)


def undo(forward: RowForward) -> None:
    layer = forward.layer
    del layer.forward
    if getattr(forward.original, "__func__", None) is not type(layer).forward:
        layer.forward = forward.original  # another library's, that was there before
