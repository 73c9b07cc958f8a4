"""The LoRA factors of one PEFT layer as tensors: of the active adapters, or of one adapter for each row of a batch.

    A (r, in)   B (out, r)   s scaling   m (out) DoRA's magnitude          y = g ⊙ (W x + s·B A x)
    g = m / ‖W + s·B A‖, one norm for each row of W (DoRA, arXiv:2402.09353); 1 without DoRA

No stale tensor is used: A and B are PEFT's own parameters, and tensors derived from them (g, the stacked factors of a
batch) are reused only while the parameters, their versions and their places in memory are unchanged (`VersionGuard`).
Every prompt also begins with `clear_derived`, which drops them.
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

#: PEFT's name, in `adapter_names`, for a row of a batch without an adapter.
BASE = "__base__"


@dataclass(frozen=True, slots=True)
class BatchedLoraFactors:
    """The factors of one layer with an adapter for each row of the batch.

    Ranks are padded with zeros to the largest, r.  A row without an adapter has zeros in A and B and ones in g.
    """

    A_T: torch.Tensor
    """Aᵀ (B, in, r)."""
    B_T: torch.Tensor
    """s · Bᵀ (B, r, out)."""
    g: torch.Tensor | None
    """g (B, out); None where no adapter is a DoRA."""


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """The factors of one layer with one adapter for all rows of the batch."""

    A: torch.Tensor
    """A (r, in)."""
    B: torch.Tensor
    """B (out, r)."""
    s: float
    """The scaling."""
    g: torch.Tensor | None
    """g (out); None where the adapter is no DoRA."""


class LayerLora:
    """What the adapters of `layer`, PEFT's LoRA layer around a linear layer, add to it."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        #: The latest batch: adapter names, what its factors were made from, and the factors.
        self._batch: tuple[list[str], VersionGuard, BatchedLoraFactors | None] | None = None
        #: g by adapter name, with what it was made from.
        self._g_cache: dict[str, tuple[VersionGuard, torch.Tensor]] = {}
        #: The result of `unsupported_reason`, and the state of the layer that it is for.
        self._reason: tuple[Any, str] | None = None

    def unsupported_reason(self) -> str:
        """Return why the layer can't be computed from W, A and B, or "" where it can."""
        layer = self.layer
        names = getattr(getattr(layer, "lora_A", None), "_modules", None)
        state = (tuple(names) if names else None, layer.training)
        if self._reason is None or self._reason[0] != state:  # cached, because this is asked for every token
            self._reason = (state, self._find_reason())
        return self._reason[1]

    def _find_reason(self) -> str:
        layer = self.layer
        is_linear = isinstance(self.layer, LoraLayer) and hasattr(layer.get_base_layer(), "out_features")
        # mla-tune adapts dense and shared MLPs through the parameter (see `adapter.placement`).
        if isinstance(self.layer, ParamWrapper):
            is_linear = is_linear and layer.parameter_name == "weight" and layer.base_layer is layer.get_base_layer()
        if not is_linear:
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

    def clear_derived(self) -> None:
        """Drop all tensors derived from the parameters; they are computed again when needed."""
        self._batch = self._reason = None
        self._g_cache.clear()

    def active(self) -> list[LoraFactors]:
        """Return the factors of the active adapters, which apply to every row, in PEFT's order."""
        layer = self.layer
        if layer.disable_adapters and layer.merged:
            layer.unmerge()  # as PEFT does in the forward of such a layer
        if layer.disable_adapters or layer.merged:
            return []
        return [self._factors(name) for name in layer.active_adapters if name in layer.lora_A]

    def batched(self, names: Sequence[str]) -> BatchedLoraFactors | None:
        """Return the stacked factors of a batch with one adapter name for each row.

        Returns None where none of these adapters is on this layer.  Raises `InputError` where adapters are merged into
        the layer.
        """
        layer = self.layer
        names = list(names)
        refuse_merged(layer)
        cached = None if self._needs_gradient(names) else self._batch
        if cached is not None and cached[0] == names and cached[1].is_unchanged():
            return None if layer.disable_adapters else cached[2]
        distinct = list(dict.fromkeys(names))
        by_name = {name: self._factors(name) for name in distinct if name in layer.lora_A}
        stacked = self._stack(names, by_name) if by_name else None
        # The guard covers all names, because an adapter may be added to this layer later.
        self._batch = (names, VersionGuard(layer, distinct), stacked)
        return None if layer.disable_adapters else stacked

    def _needs_gradient(self, names: Sequence[str]) -> bool:
        """Whether gradients for one of these adapters are recorded; cached factors carry none."""
        lora_A = self.layer.lora_A
        return torch.is_grad_enabled() and any(lora_A[name].weight.requires_grad for name in names if name in lora_A)

    def _stack(self, names: Sequence[str], by_name: dict[str, LoraFactors]) -> BatchedLoraFactors:
        """Stack the factors of each row; names that `by_name` lacks are rows without an adapter."""
        first = next(iter(by_name.values()))
        rank = max(factors.A.shape[0] for factors in by_name.values())
        A_T = first.A.new_zeros(len(names), first.A.shape[1], rank)
        B_T = first.A.new_zeros(len(names), rank, first.B.shape[0])
        has_dora = any(factors.g is not None for factors in by_name.values())
        g = first.B.new_ones(len(names), first.B.shape[0]) if has_dora else None
        for row, name in enumerate(names):
            if (factors := by_name.get(name)) is None:
                continue
            A_T[row, :, : factors.A.shape[0]] = factors.A.T
            B_T[row, : factors.A.shape[0]] = factors.B.T * factors.s
            if g is not None and factors.g is not None:
                g[row] = factors.g
        return BatchedLoraFactors(A_T, B_T, g)

    def _factors(self, name: str) -> LoraFactors:
        layer = self.layer
        A, B, s = layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])
        return LoraFactors(A, B, s, self._g(name, A, B, s) if name in layer.lora_magnitude_vector else None)

    def _g(self, name: str, A: torch.Tensor, B: torch.Tensor, s: float) -> torch.Tensor:
        """Return g (out) of a DoRA, cached while nothing that it depends on has changed."""
        module = self.layer.lora_magnitude_vector[name]
        needs_gradient = torch.is_grad_enabled() and module.weight.requires_grad
        cached = None if needs_gradient else self._g_cache.get(name)
        if cached is not None and cached[0].is_unchanged():
            return cached[1]
        W = self.layer.get_base_layer().weight
        norm = torch.linalg.norm(W.to(A.dtype) + s * (B @ A), dim=1)
        g = module.weight / norm.detach()  # the norm gets no gradient, as in the paper (section 4.3)
        if not needs_gradient:
            self._g_cache[name] = (VersionGuard(self.layer, [name]), g.detach())
        return g


class VersionGuard:
    """Detects whether the parameters of a layer, of its base and its adapters `names`, have changed since it was made.

    It is asked for every layer and every token.  Therefore it reads the dictionaries behind torch's modules: a lookup
    like `layer.lora_A[name].weight` takes ten times as long.
    """

    def __init__(self, layer: Any, names: Sequence[str]) -> None:
        self._layer, self._base, self._merged = layer, layer.get_base_layer(), list(layer.merged_adapters)
        #: Dictionary, key, and the object that it must hold there.
        self._expected: list[tuple[dict[str, Any], str, Any]] = []
        #: Parameter, its version, and its place in memory.
        self._parameters: list[tuple[Any, int, int]] = []
        self._scaling = [(name, layer.scaling.get(name)) for name in names]
        modules = [self._base]
        for group in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            for name in names:
                module = group._modules.get(name)
                self._expected.append((group._modules, name, module))
                if module is not None:
                    modules.append(module)
        for module in modules:
            p = module._parameters["weight"]
            self._expected.append((module._parameters, "weight", p))
            self._parameters.append((p, p._version, p.data_ptr()))

    def is_unchanged(self) -> bool:
        """Whether nothing has changed since this guard was made."""
        layer = self._layer
        if layer.get_base_layer() is not self._base or layer.merged_adapters != self._merged:
            return False
        scaling = layer.scaling
        for name, s in self._scaling:  # a loop, because `all` with a generator takes 1.5 times as long
            if scaling.get(name) != s:
                return False
        for dictionary, key, value in self._expected:
            if dictionary.get(key) is not value:
                return False
        for p, version, place in self._parameters:  # noqa: SIM110
            if p._version != version or p.data_ptr() != place:
                return False
        return True


def refuse_merged(layer: Any) -> None:
    """Raise `InputError` where adapters are merged into the weights of `layer`, and so would apply to every row."""
    if layer.merged:
        raise InputError(
            f"adapters are merged into the base weights: {', '.join(layer.merged_adapters)}; unmerge them before a "
            "call with adapter_names"
        )


def is_adapted(module: nn.Module) -> bool:
    """Whether this module is PEFT's layer around another one."""
    return isinstance(module, BaseTunerLayer)
