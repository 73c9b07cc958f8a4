"""Base and adapters, unmerged, by PEFT, and the base's own output beside it, from the same weights."""

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

#: What PEFT adds to the parameter of a stack of experts while it runs.
_SUM = "_LoraFactorsProxy"


class PeftUnsupported(Exception):
    """PEFT doesn't compute with these adapters as they were trained; the text says why."""


def attach(streamed: StreamedModel, adapters: Sequence[tuple[Adapter, float]]) -> PeftModel:
    """Put the adapters on the model, all active, each delta times its weight.  Raises `PeftUnsupported`."""
    names = [f"adapter_{i}" for i in range(len(adapters))]
    for adapter, _ in adapters:
        if any(delta.expert is not None for delta in adapter.deltas):
            raise PeftUnsupported(
                f"{adapter.folder}: adapters of single experts, as older versions wrote them, are loaded otherwise "
                "than they were trained"
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
        # PEFT has them in float32, like the placeholders, and would convert the factors of all experts for each chunk.
        if isinstance(module, peft_layer.ParamWrapper | AuxiliaryTrainingWrapper):
            for parameter in module.parameters():
                if not parameter.is_meta:
                    parameter.data = parameter.data.to(streamed.dtype)
    _check_complete(streamed, model, adapters, names)
    return model.eval()


def _check_complete(
    streamed: StreamedModel, model: nn.Module, adapters: Sequence[tuple[Adapter, float]], names: Sequence[str]
) -> None:
    """PEFT only warns of what is missing, and drops some keys without a word: count the numbers that it took up.

    Raises `PeftUnsupported`.
    """
    trained = sum(slot.trained.numel() for slot in streamed.slots() if slot.trained is not None)
    state = model.state_dict(keep_vars=True)
    for (adapter, _), name in zip(adapters, names, strict=True):
        parts = [p for key, p in state.items() if name in key.split(".")]
        held, stored = sum(p.numel() for p in parts) + trained, sum(prod(ref.shape) for ref in _of_the_model(adapter))
        if held != stored or any(p.is_meta for p in parts):
            raise PeftUnsupported(f"{adapter.folder}: of {stored:,} trained numbers PEFT takes up {held:,}")


def _of_the_model(adapter: Adapter) -> Iterator[TensorRef]:
    """The adapter's tensors but those of MTP layers, which transformers' model doesn't have."""
    for delta in adapter.deltas:
        if not delta.site.mtp:
            yield from delta.refs()
    yield from (saved.ref for saved in adapter.saved)


class PairedForward:
    """Makes every adapted module compute the first half of a batch without adapters and the second with them, from the
    same base weights."""

    def __init__(self, streamed: StreamedModel, model: nn.Module) -> None:
        self._switches: dict[nn.Module, list[Any]] = {}
        inside: dict[nn.Module, nn.Module] = {}
        for module in model.modules():
            if _is_switch(module) and module not in inside:
                inside |= dict.fromkeys(module.modules(), module)
                self._switches[module] = [m for m in module.modules() if _is_switch(m)]
        self._trained: dict[nn.Module, list[Slot]] = {}
        for slot in streamed.slots():
            if slot.trained is not None:
                root = inside.get(slot.module, slot.module)
                self._trained.setdefault(root, []).append(slot)
        stacks = {streamed.model.get_submodule(path) for piece in streamed.pieces.values() for path in piece.stacks}
        for module in {**self._switches, **self._trained}:
            if module not in stacks:
                self._split(module)

    def parts(self, module: nn.Module) -> list[Callable[[], None] | None]:
        """The contexts in which the two halves of a batch run through `module`."""
        if module not in self._switches:
            return [None]
        return [partial(self._switch, module, False), partial(self._switch, module, True)]

    def _switch(self, module: nn.Module, on: bool) -> None:
        for switch in self._switches.get(module, ()):
            switch.enable_adapters(on)

    def _split(self, module: nn.Module) -> None:
        inner: Callable[..., Any] = module.forward

        def forward(x: torch.Tensor) -> Any:
            first, second = x.chunk(2)
            self._switch(module, False)
            plain = inner(first)
            self._switch(module, True)
            base = [(slot, slot.value.data) for slot in self._trained.get(module, ())]
            for slot, _ in base:
                assert slot.trained is not None
                slot.put(slot.trained)
            tuned = inner(second)
            for slot, tensor in base:
                slot.put(tensor)
            if isinstance(plain, tuple):  # a router
                return tuple(torch.cat(pair) for pair in zip(plain, tuned, strict=True))
            return torch.cat((plain, tuned))

        module.forward = forward


def _is_switch(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def needs_whole_stacks(adapters: Sequence[tuple[Adapter, float]]) -> bool:
    """Whether PEFT adds the deltas of all experts of a layer up, so that it needs them all: with several adapters at
    once, or when it has not the part that `summed_where_used` replaces."""
    on_experts = any(delta.site.is_experts for adapter, _ in adapters for delta in adapter.deltas)
    return on_experts and (len(adapters) > 1 or not hasattr(peft_layer, _SUM))


@contextmanager
def summed_where_used(streamed: StreamedModel) -> Iterator[None]:
    """Meanwhile PEFT's W + s·B·A of a stack of experts is made in the place of W, for the experts that run.

    PEFT makes it for all experts, beside W, and twice.  The factors of each expert and s are still PEFT's.  The row
    without adapters has been computed when W is overwritten, and W is read anew for the next layer.
    """

    class InPlace(nn.Module):
        def __init__(self, lhs: torch.Tensor, rhs: torch.Tensor, scaling: float) -> None:
            super().__init__()
            self.factors, self.done = (lhs, rhs, scaling), False

        def forward(self, W: torch.Tensor) -> torch.Tensor:
            if not self.done:  # it is asked for again to check its shape
                lhs, rhs, scaling = self.factors
                for expert, at in streamed.experts:
                    if at < len(W):
                        W[at].addmm_(lhs[expert], rhs[expert], alpha=scaling)
                self.done = True
            return W

    original = getattr(peft_layer, _SUM, None)
    if original is None:
        yield
        return
    setattr(peft_layer, _SUM, InPlace)
    try:
        yield
    finally:
        setattr(peft_layer, _SUM, original)
