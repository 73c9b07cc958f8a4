"""LoRA of routed experts by its factors: PEFT makes W + s·B A of all experts of a layer for every token.

    E experts   r rank       A (E·r, in), experts one after another      B (out, r·E), the experts counted fastest

The model's own loop over the experts that are hit runs with stacks in the place of its weights that multiply as

    x → W[e] x + Σ s·B[e] (A[e] x)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import ParamWrapper


class LowRankExpert:
    """W[e] (out, in) and its updates (A (r, in), B (out, r), s), where only `linear` asks for it."""

    def __init__(self, W: torch.Tensor, updates: list[tuple[torch.Tensor, torch.Tensor, float]]) -> None:
        self.W, self.updates = W, updates

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear or kwargs or len(args) != 2:
            return NotImplemented
        x, self = args
        y = F.linear(x, self.W)
        for A, B, s in self.updates:
            y = y + (F.linear(F.linear(x.to(A.dtype), A), B) * s).to(y.dtype)
        return y


class LowRankStack:
    """The weights (E, out, in) of all experts, by number."""

    def __init__(self, W: torch.Tensor, updates: list[tuple[torch.Tensor, torch.Tensor, float]]) -> None:
        self.W, self.updates = W, updates

    def __getitem__(self, e: Any) -> LowRankExpert:
        return LowRankExpert(self.W[e], [(A[e], B[e], s) for A, B, s in self.updates])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.W, name)


def is_experts(layer: Any) -> bool:
    """Whether `layer`, of PEFT, is one on the stacked weights (E, out, in) of routed experts."""
    return isinstance(layer, ParamWrapper) and all(
        w.get_param().dim() == 3 and w._did_swap_in_out_features and w.parameter_name in w.get_base_layer()._parameters
        for w in _wrappers(layer)
    )


def forward(layer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The experts with the active adapters of `layer` and of the wrappers in it."""
    experts = layer.get_base_layer()
    stacks = {}
    for wrapper in _wrappers(layer):
        updates = list(_updates(wrapper))
        if updates:
            stacks[wrapper.parameter_name] = LowRankStack(wrapper.get_param(), updates)
    if not stacks:
        return experts(*args, **kwargs)
    # The loop of the model's own file: the others want the weights as one tensor.
    own = type(experts).forward
    loop = getattr(own, "__wrapped__", own)
    experts.__dict__.update(stacks)  # found before the parameters
    try:
        return loop(experts, *args, **kwargs)
    finally:
        for name in stacks:
            del experts.__dict__[name]


def _wrappers(layer: Any) -> Iterator[Any]:
    while isinstance(layer, ParamWrapper):
        yield layer
        layer = layer.base_layer


def _updates(wrapper: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    """A (E, r, in), B (E, out, r) and s of each active adapter, views of PEFT's parameters."""
    if wrapper.disable_adapters or wrapper.merged:
        return
    E = wrapper.get_param().shape[0]
    for name in wrapper.active_adapters:
        if name in wrapper.lora_A:
            A, B = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
            yield A.view(E, -1, A.shape[1]), B.view(B.shape[0], -1, E).permute(2, 0, 1), float(wrapper.scaling[name])
