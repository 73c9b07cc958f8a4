"""Base and adapters, unmerged, by PEFT, and the base's own output beside it, from the same weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import peft.tuners.lora.layer as peft_layer
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from mla_tune.adapter.files import WEIGHTS_FILE, open_adapter
from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.index import Checkpoint, read_shard
from mla_tune.merge.probe_model import Slot, Streamed, placeholders

#: What PEFT adds to the parameter of a stack of experts while it runs.
_SUM = "_LoraFactorsProxy"


class PeftCannot(Exception):
    """PEFT doesn't compute with these adapters as they were trained; the text says why."""


def attach(
    streamed: Streamed, base: Checkpoint, arch: Architecture, adapters: Sequence[tuple[Path, float]]
) -> PeftModel:
    """Put the adapters on the model, all active, each delta times its weight.  Raises `PeftCannot`."""
    names = [f"adapter_{i}" for i in range(len(adapters))]
    for folder, _ in adapters:
        if any(delta.expert is not None for delta in open_adapter(folder, arch, base.tensors).deltas):
            raise PeftCannot(
                f"{folder}: adapters of single experts, as older versions wrote them, are loaded otherwise than they "
                "were trained"
            )
    options: Any = {"low_cpu_mem_usage": True, "autocast_adapter_dtype": False, "torch_device": "cpu"}
    model: Any = streamed.model
    with warnings.catch_warnings(), placeholders(streamed):
        warnings.simplefilter("ignore")
        try:
            for (folder, _), name in zip(adapters, names, strict=True):
                if model is streamed.model:
                    model = PeftModel.from_pretrained(model, folder, adapter_name=name, **options)
                else:
                    model.load_adapter(folder, adapter_name=name, **options)
            model.base_model.set_adapter(names)
        except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
            raise PeftCannot(f"loading the adapter fails: {str(error).splitlines()[0]}") from error
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            scaling: dict[str, float] = module.scaling  # type: ignore[assignment]
            for (_, weight), name in zip(adapters, names, strict=True):
                if name in scaling:
                    scaling[name] *= weight
        elif isinstance(module, AuxiliaryTrainingWrapper):
            for parameter in module.parameters():
                if not parameter.is_meta:
                    parameter.data = parameter.data.to(streamed.dtype)
    _check_complete(streamed, model, adapters, names)
    return model.eval()


def _check_complete(
    streamed: Streamed, model: nn.Module, adapters: Sequence[tuple[Path, float]], names: Sequence[str]
) -> None:
    """PEFT only warns of what is missing, and drops some keys without a word: count the numbers that it took up."""
    trained = sum(slot.trained.numel() for slot in streamed.slots() if slot.trained is not None)
    for (folder, _), name in zip(adapters, names, strict=True):
        parts = [(key, p) for key, p in model.state_dict(keep_vars=True).items() if name in key.split(".")]
        held = sum(p.numel() for _, p in parts) + trained
        tensors = read_shard(folder / WEIGHTS_FILE).tensors
        # Copies of trained biases that no version of PEFT reads (see `adapter.files`).
        copies = (".original_module.", ".modules_to_save.")
        stored = 0
        for key, ref in tensors.items():
            if not any(part in key for part in copies):
                stored += torch.Size(ref.shape).numel()
        if held != stored or any(p.is_meta for _, p in parts):
            raise PeftCannot(f"{folder}: of {stored:,} trained numbers PEFT takes up {held:,}")


class SideBySide:
    """Makes every adapted module compute the first half of a batch without adapters and the second with them, from the
    same base weights."""

    def __init__(self, streamed: Streamed, model: nn.Module) -> None:
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


def in_place(adapters: Sequence[tuple[Path, float]]) -> bool:
    """Whether the installed PEFT keeps the factors of experts apart, so that `summed_where_used` has an effect; with
    several adapters at once it doesn't."""
    return len(adapters) == 1 and hasattr(peft_layer, _SUM)


@contextmanager
def summed_where_used(streamed: Streamed) -> Iterator[None]:
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
