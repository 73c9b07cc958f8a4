"""The LoRA of one linear layer of PEFT, as tensors: for the adapters that are active, or row by row of a batch.

    A (r, in)   B (out, r)   s scaling   m (out) DoRA's magnitude          y = g ⊙ (W x + s·B A x)
    g = m / ‖W + s·B A‖, one norm for each row of W (DoRA, arXiv:2402.09353); 1 without DoRA

Nothing is kept that could go stale: A and B are views of PEFT's own parameters, and what is derived from them (g,
stacks of a mixed batch) is kept only while parameters, versions and places in memory are the same, and is made anew at
`forget`, with which every prompt begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from mla_tune.errors import InputError

#: PEFT's name for a row of a batch without an adapter.
BASE = "__base__"


@dataclass(frozen=True, slots=True)
class BatchedLoraFactors:
    """One adapter for each row of a batch: Aᵀ (B, in, r), Bᵀ (B, r, out) times s, g (B, out) or None where all are 1.

    Ranks are filled up with zeros to the largest; a row of the base has zeros and ones.
    """

    A_T: torch.Tensor
    B_T: torch.Tensor
    g: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """One adapter for all rows: A (r, in), B (out, r), s, g (out) or None."""

    A: torch.Tensor
    B: torch.Tensor
    s: float
    g: torch.Tensor | None


class LayerLora:
    """What the adapters of `layer`, a `peft` LoRA layer on a linear one, add to it."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self._rows: tuple[list[str], VersionGuard, BatchedLoraFactors | None] | None = None
        self._norms: dict[str, tuple[VersionGuard, torch.Tensor]] = {}
        self._reason: tuple[Any, str] | None = None

    def unsupported_reason(self) -> str:
        """Why the layer can't be taken apart into W, A and B; empty where it can."""
        layer = self.layer
        names = getattr(getattr(layer, "lora_A", None), "_modules", None)
        state = (tuple(names) if names else None, layer.training)
        if self._reason is None or self._reason[0] != state:  # asked for every token
            self._reason = (state, self._find_reason())
        return self._reason[1]

    def _find_reason(self) -> str:
        layer = self.layer
        linear = isinstance(self.layer, LoraLayer) and hasattr(layer.get_base_layer(), "out_features")
        # mla-tune adapts dense and shared MLPs through the parameter (see `adapter.placement`).
        if isinstance(self.layer, ParamWrapper):
            linear = linear and layer.parameter_name == "weight" and layer.base_layer is layer.get_base_layer()
        if not linear:
            return f"a {type(layer).__name__} is no LoRA of a linear layer"
        if getattr(layer, "fan_in_fan_out", False):
            return "fan_in_fan_out"
        variants = [type(v).__name__ for v in layer.lora_variant.values() if type(v).__name__ != "DoraLinearVariant"]
        if variants:
            return f"a {variants[0]} is neither LoRA nor DoRA"
        if any(layer.lora_bias.get(name, False) for name in layer.lora_A):
            return "a bias on B"
        if layer.training and any(not isinstance(d, nn.Identity) and d.p for d in layer.lora_dropout.values()):
            return "dropout while training"
        return ""

    def forget(self) -> None:
        """Drop everything that was derived from the parameters; it is made anew when it is needed."""
        self._rows = self._reason = None
        self._norms.clear()

    def active(self) -> list[LoraFactors]:
        """The adapters that act on every row now, in PEFT's order."""
        layer = self.layer
        if layer.disable_adapters and layer.merged:
            layer.unmerge()  # as PEFT does when such a layer is run
        if layer.disable_adapters or layer.merged:
            return []
        return [self._update(name) for name in layer.active_adapters if name in layer.lora_A]

    def rows(self, names: Sequence[str]) -> BatchedLoraFactors | None:
        """The adapters of a batch, one name for each row; None where none of them adapts this layer."""
        layer = self.layer
        names = list(names)
        refuse_merged(layer)
        kept = None if self._learns(names) else self._rows
        if kept is not None and kept[0] == names and kept[1].holds():
            return None if layer.disable_adapters else kept[2]
        distinct = list(dict.fromkeys(names))
        updates = {name: self._update(name) for name in distinct if name in layer.lora_A}
        rows = self._stack(names, updates) if updates else None
        self._rows = (names, VersionGuard(layer, distinct), rows)  # those that are not here, too: they may come
        return None if layer.disable_adapters else rows

    def _learns(self, names: Sequence[str]) -> bool:
        """Whether gradients are wanted: what was kept without them has none."""
        lora_A = self.layer.lora_A
        return torch.is_grad_enabled() and any(lora_A[name].weight.requires_grad for name in names if name in lora_A)

    def _stack(self, names: Sequence[str], updates: dict[str, LoraFactors]) -> BatchedLoraFactors:
        some = next(iter(updates.values()))
        rank = max(u.A.shape[0] for u in updates.values())
        A_T = some.A.new_zeros(len(names), some.A.shape[1], rank)
        B_T = some.A.new_zeros(len(names), rank, some.B.shape[0])
        dora = any(u.g is not None for u in updates.values())
        g = some.B.new_ones(len(names), some.B.shape[0]) if dora else None
        for row, name in enumerate(names):
            if (update := updates.get(name)) is None:
                continue
            A_T[row, :, : update.A.shape[0]] = update.A.T
            B_T[row, : update.A.shape[0]] = update.B.T * update.s
            if g is not None and update.g is not None:
                g[row] = update.g
        return BatchedLoraFactors(A_T, B_T, g)

    def _update(self, name: str) -> LoraFactors:
        layer = self.layer
        A, B, s = layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])
        return LoraFactors(A, B, s, self._g(name, A, B, s) if name in layer.lora_magnitude_vector else None)

    def _g(self, name: str, A: torch.Tensor, B: torch.Tensor, s: float) -> torch.Tensor:
        module = self.layer.lora_magnitude_vector[name]
        learns = torch.is_grad_enabled() and module.weight.requires_grad
        kept = None if learns else self._norms.get(name)
        if kept is not None and kept[0].holds():
            return kept[1]
        W = self.layer.get_base_layer().weight
        norm = torch.linalg.norm(W.to(A.dtype) + s * (B @ A), dim=1)
        g = module.weight / norm.detach()  # a constant of the gradient, as in the paper (section 4.3)
        if not learns:
            self._norms[name] = (VersionGuard(self.layer, [name]), g.detach())
        return g


class VersionGuard:
    """Tells whether anything that the adapters of these names are made of has changed since.

    Torch's own lookups (`layer.lora_A[name].weight`) take ten times as long as those in the dictionaries behind them,
    and this is asked of every layer for every token.
    """

    def __init__(self, layer: Any, names: Sequence[str]) -> None:
        self._layer, self._base, self._merged = layer, layer.get_base_layer(), list(layer.merged_adapters)
        #: Dictionary, key, and what it must hold, by identity.
        self._held: list[tuple[dict[str, Any], str, Any]] = []
        #: Parameter, its version, its place in memory.
        self._marks: list[tuple[Any, int, int]] = []
        self._scaling = [(name, layer.scaling.get(name)) for name in names]
        modules = [self._base]
        for group in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            for name in names:
                module = group._modules.get(name)
                self._held.append((group._modules, name, module))
                if module is not None:
                    modules.append(module)
        for module in modules:
            p = module._parameters["weight"]
            self._held.append((module._parameters, "weight", p))
            self._marks.append((p, p._version, p.data_ptr()))

    def holds(self) -> bool:
        """Whether nothing has changed since this guard was made."""
        layer = self._layer
        if layer.get_base_layer() is not self._base or layer.merged_adapters != self._merged:
            return False
        scaling = layer.scaling
        for name, s in self._scaling:  # loops: `all` of a generator takes half as long again
            if scaling.get(name) != s:
                return False
        for found, key, value in self._held:
            if found.get(key) is not value:
                return False
        for p, version, place in self._marks:  # noqa: SIM110
            if p._version != version or p.data_ptr() != place:
                return False
        return True


def refuse_merged(layer: Any) -> None:
    """Raise `InputError` where adapters are merged into the weights of `layer`: every row would have them."""
    if layer.merged:
        raise InputError(
            f"merged into the base: {', '.join(layer.merged_adapters)}; unmerge them before rows of a batch choose "
            "their adapters"
        )


def is_adapted(module: nn.Module) -> bool:
    """Whether PEFT has put an adapter on this module."""
    return isinstance(module, BaseTunerLayer)
