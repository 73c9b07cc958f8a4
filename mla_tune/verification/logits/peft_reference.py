"""The reference of the comparison of logits: base + unmerged adapters by PEFT, and the base alone, in one pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any

import peft.tuners.lora.layer as peft_layer
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from mla_tune.adapter.deltas import Adapter
from mla_tune.checkpoint.index import TensorRef
from mla_tune.verification.logits.streamed_model import StreamedModel, placeholders
from mla_tune.verification.logits.streamed_weights import Slot

#: The private class of PEFT that adds W + s·B·A of stacked experts in a forward pass.
_PROXY_CLASS = "_LoraFactorsProxy"


class PeftUnsupported(Exception):
    """PEFT doesn't compute these adapters as they were trained; the message says why."""


def attach_adapters(streamed: StreamedModel, adapters: Sequence[tuple[Adapter, float]]) -> PeftModel:
    """Attach all adapters to the model with PEFT and activate them, each delta times the adapter's weight.

    Raises `PeftUnsupported`.
    """
    names = [f"adapter_{i}" for i in range(len(adapters))]
    for adapter, _ in adapters:
        if any(delta.expert is not None for delta in adapter.deltas):
            raise PeftUnsupported(
                f"{adapter.folder}: PEFT loads adapters of single experts, which older versions of transformers made, "
                "differently from how they were trained"
            )
    options: Any = {"low_cpu_mem_usage": True, "autocast_adapter_dtype": False, "torch_device": "cpu"}
    model: Any = streamed.model
    with warnings.catch_warnings(), placeholders(streamed):
        warnings.simplefilter("ignore")
        try:
            for (adapter, _), name in zip(adapters, names, strict=True):
                if model is streamed.model:
                    model = PeftModel.from_pretrained(model, adapter.folder, adapter_name=name, **options)
                else:
                    model.load_adapter(adapter.folder, adapter_name=name, **options)
            model.base_model.set_adapter(names)
        except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise PeftUnsupported(f"loading the adapter fails: {first}") from error
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            scaling: dict[str, float] = module.scaling  # type: ignore[assignment]
            for (_, weight), name in zip(adapters, names, strict=True):
                if name in scaling:
                    scaling[name] *= weight
        # PEFT keeps them in float32, like the placeholders, and would convert the factors of all experts for each
        # chunk of experts.
        if isinstance(module, peft_layer.ParamWrapper | AuxiliaryTrainingWrapper):
            for parameter in module.parameters():
                if not parameter.is_meta:
                    parameter.data = parameter.data.to(streamed.dtype)
    _check_complete(streamed, model, adapters, names)
    return model.eval()


def _check_complete(
    streamed: StreamedModel, model: nn.Module, adapters: Sequence[tuple[Adapter, float]], names: Sequence[str]
) -> None:
    """Raise `PeftUnsupported` where PEFT loaded fewer numbers than an adapter's file holds.

    PEFT only warns of missing tensors, and ignores some keys silently.
    """
    trained = sum(slot.trained.numel() for slot in streamed.slots() if slot.trained is not None)
    state = model.state_dict(keep_vars=True)
    for (adapter, _), name in zip(adapters, names, strict=True):
        parts = [p for key, p in state.items() if name in key.split(".")]
        loaded, stored = (
            sum(p.numel() for p in parts) + trained,
            sum(prod(ref.shape) for ref in _refs_in_model(adapter)),
        )
        if loaded != stored or any(p.is_meta for p in parts):
            raise PeftUnsupported(f"{adapter.folder}: PEFT loads {loaded:,} of {stored:,} trained numbers")


def _refs_in_model(adapter: Adapter) -> Iterator[TensorRef]:
    """Yield the adapter's tensors, except for those of MTP layers, which transformers' model doesn't have."""
    for delta in adapter.deltas:
        if not delta.site.mtp:
            yield from delta.refs()
    yield from (saved.ref for saved in adapter.saved)


class PairedForward:
    """Makes every adapted module compute the first half of a batch without adapters and the second half with them.

    Both halves use the same base weights, so that each weight is read once.
    """

    def __init__(self, streamed: StreamedModel, model: nn.Module) -> None:
        #: Outermost adapted module → all modules in it that can switch adapters on and off.
        self._switches: dict[nn.Module, list[Any]] = {}
        inside: dict[nn.Module, nn.Module] = {}
        for module in model.modules():
            if _can_switch(module) and module not in inside:
                inside |= dict.fromkeys(module.modules(), module)
                self._switches[module] = [m for m in module.modules() if _can_switch(m)]
        #: Outermost adapted module → parameters in it that an adapter replaces.
        self._trained: dict[nn.Module, list[Slot]] = {}
        for slot in streamed.slots():
            if slot.trained is not None:
                root = inside.get(slot.module, slot.module)
                self._trained.setdefault(root, []).append(slot)
        stacks = {streamed.model.get_submodule(path) for part in streamed.parts.values() for path in part.stacks}
        for module in {**self._switches, **self._trained}:
            if module not in stacks:
                self._wrap(module)

    def setups(self, module: nn.Module) -> list[Callable[[], None] | None]:
        """Return what to call before each half of a batch goes through `module`; [None] if halves don't differ."""
        if module not in self._switches:
            return [None]
        return [partial(self._enable_adapters, module, enabled=enabled) for enabled in (False, True)]

    def _enable_adapters(self, module: nn.Module, *, enabled: bool) -> None:
        for switch in self._switches.get(module, ()):
            switch.enable_adapters(enabled)

    def _wrap(self, module: nn.Module) -> None:
        inner: Callable[..., Any] = module.forward

        def forward(x: torch.Tensor) -> Any:
            first, second = x.chunk(2)
            self._enable_adapters(module, enabled=False)
            plain = inner(first)
            self._enable_adapters(module, enabled=True)
            base = [(slot, slot.value.data) for slot in self._trained.get(module, ())]
            for slot, _ in base:
                assert slot.trained is not None
                slot.set(slot.trained)
            adapted = inner(second)
            for slot, tensor in base:
                slot.set(tensor)
            if isinstance(plain, tuple):  # a router
                return tuple(torch.cat(pair) for pair in zip(plain, adapted, strict=True))
            return torch.cat((plain, adapted))

        module.forward = forward


def _can_switch(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def needs_all_experts(adapters: Sequence[tuple[Adapter, float]]) -> bool:
    """Tell whether PEFT must have the weights of all experts of a layer in memory at once.

    It must for several adapters on experts, and where PEFT lacks the class that `expert_deltas_in_place` replaces.
    """
    on_experts = any(delta.site.is_experts for adapter, _ in adapters for delta in adapter.deltas)
    return on_experts and (len(adapters) > 1 or not hasattr(peft_layer, _PROXY_CLASS))


@contextmanager
def expert_deltas_in_place(streamed: StreamedModel) -> Iterator[None]:
    """Within this context, PEFT computes W + s·B·A of stacked experts in the memory of W, for the experts in memory.

    PEFT itself computes it for all experts, in new memory, and twice.  The factors of each expert and s are still
    PEFT's.  Overwriting W is safe: the half of the batch without adapters runs first, and each layer's W is read again.
    """

    class InPlace(nn.Module):
        def __init__(self, lhs: torch.Tensor, rhs: torch.Tensor, scaling: float) -> None:
            super().__init__()
            self.factors, self.is_done = (lhs, rhs, scaling), False

        def forward(self, W: torch.Tensor) -> torch.Tensor:
            if not self.is_done:  # PEFT calls it twice, once to check the shape
                lhs, rhs, scaling = self.factors
                for expert, at in streamed.experts:
                    if at < len(W):
                        W[at].addmm_(lhs[expert], rhs[expert], alpha=scaling)
                self.is_done = True
            return W

    original = getattr(peft_layer, _PROXY_CLASS, None)
    if original is None:
        yield
        return
    setattr(peft_layer, _PROXY_CLASS, InPlace)
    try:
        yield
    finally:
        setattr(peft_layer, _PROXY_CLASS, original)
