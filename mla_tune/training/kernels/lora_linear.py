"""LoRA in training: compute W x, then add s·B(A x) to it in place.

PEFT's layer makes s·B A x as a tensor of its own and adds it in a second pass; for a matrix that it adapts as a
parameter (`target_parameters`) it makes W + s·B A, and a gradient as large as W.  Here the result is the same,
(W + s·B·A) x (Hu et al., arXiv:2106.09685, section 4.1), for a linear layer with a plain or a quantized weight.  Layers
of any other kind (DoRA, dropout, plain experts, a sharded base, several adapters) keep PEFT's forward.  Experts with
quantized weights are given A and B (`set_expert_lora`) and add s·B(A x) themselves, an expert at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear, LoraLayer, ParamWrapper

from mla_tune.model.quantized_linear import (
    ExpertLora,
    QuantizedLinear,
    clear_expert_lora,
    quantized_weight_of,
    set_expert_lora,
)


def use_lora_factors(model: torch.nn.Module, adapter: str = "default") -> int:
    """Replace the forward of every LoRA of `adapter` on a linear layer or on quantized experts; return how many."""
    count = 0
    for layer in model.modules():
        if type(layer) not in (Linear, ParamWrapper):
            continue
        if _is_plain(layer, adapter):
            layer.forward = _forward_of(layer, adapter, layer.forward)  # type: ignore[method-assign]
        elif isinstance(layer, ParamWrapper) and _is_frozen_experts(layer, adapter):
            layer.forward = _experts_forward_of(layer, adapter, layer.forward)  # type: ignore[method-assign]
        else:
            continue
        count += 1
    return count


def _is_frozen_experts(layer: Any, adapter: str) -> bool:
    experts = layer.get_base_layer()
    return not isinstance(experts, QuantizedLinear) and (
        quantized_weight_of(experts, layer.parameter_name) is not None and list(layer.lora_A) == [adapter]
    )


def _experts_forward_of(layer: Any, adapter: str, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    experts: Any = layer.get_base_layer()

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if layer.merged or layer.disable_adapters or layer.active_adapters != [adapter]:
            return original(x, *args, **kwargs)
        a, b = (f[adapter].weight for f in (layer.lora_A, layer.lora_B))
        set_expert_lora(experts, layer.parameter_name, ExpertLora(a, b, layer.scaling[adapter]))
        try:
            return layer.base_layer(x, *args, **kwargs)
        finally:
            clear_expert_lora(experts, layer.parameter_name)

    return forward


def _is_plain(layer: Any, adapter: str) -> bool:
    base = layer.base_layer
    if (
        type(base) not in (torch.nn.Linear, QuantizedLinear)
        or list(layer.lora_A) != [adapter]
        or layer.lora_magnitude_vector
    ):
        return False
    if isinstance(layer, ParamWrapper) and (layer.parameter_name != "weight" or base.bias is not None):
        return False
    variants = getattr(layer, "lora_variant", {})
    factors: Any = (layer.lora_A[adapter], layer.lora_B[adapter])
    extra = any(f.bias is not None for f in factors)
    return not variants and not extra and isinstance(layer.lora_dropout[adapter], torch.nn.Identity)


def _forward_of(layer: LoraLayer, adapter: str, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    base: Any = layer.base_layer

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        factors: Any = (layer.lora_A[adapter], layer.lora_B[adapter])
        a, b = (f.weight for f in factors)
        cast = torch.is_autocast_enabled(x.device.type)
        odd = args or kwargs or layer.merged or layer.disable_adapters or layer.active_adapters != [adapter]
        if odd or type(a) is not torch.nn.Parameter or (not cast and not x.dtype == a.dtype == base.weight.dtype):
            return original(x, *args, **kwargs)
        out = base(x)
        low = F.linear(x, a)
        # No gradient needs the output of a linear layer, so it may be changed in place.
        flat = out.view(-1, out.shape[-1])
        flat.addmm_(low.reshape(-1, low.shape[-1]).to(out.dtype), b.t().to(out.dtype), alpha=layer.scaling[adapter])
        return out

    return forward
