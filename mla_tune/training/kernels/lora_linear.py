"""LoRA in training: compute W x, then add s·B(A x) to it in place.

The result is PEFT's, (W + s·B·A) x (Hu et al., arXiv:2106.09685, section 4.1).  PEFT's layer computes s·B A x as
another tensor and adds it in a second pass.  For a matrix that PEFT adapts as a parameter (`target_parameters`), it
computes W + s·B A, and a gradient as large as W.

Replaced are the forwards of linear layers with a plain or a quantized weight.  Other layers (DoRA, dropout, plain
experts, a sharded base, several adapters) keep PEFT's forward.  Experts with quantized weights are given A and B by
`set_expert_lora`, and add s·B(A x) an expert at a time (`model.quantized_linear.quantized_experts`).
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
    """Replace the forward of every LoRA of `adapter` that can be computed this way; return how many there are."""
    count = 0
    for layer in model.modules():
        if type(layer) not in (Linear, ParamWrapper):
            continue
        if _is_lora_on_linear(layer, adapter):
            layer.forward = _linear_forward(layer, adapter, layer.forward)  # type: ignore[method-assign]
        elif isinstance(layer, ParamWrapper) and _is_lora_on_quantized_experts(layer, adapter):
            layer.forward = _experts_forward(layer, adapter, layer.forward)  # type: ignore[method-assign]
        else:
            continue
        count += 1
    return count


def _is_lora_on_quantized_experts(layer: Any, adapter: str) -> bool:
    """Whether the layer adapts a quantized stack of experts, and has this adapter only."""
    experts = layer.get_base_layer()
    return not isinstance(experts, QuantizedLinear) and (
        quantized_weight_of(experts, layer.parameter_name) is not None and list(layer.lora_A) == [adapter]
    )


def _experts_forward(layer: Any, adapter: str, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A forward that passes A, B and s to the experts; `original` runs while the adapter is not the only active one."""
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


def _is_lora_on_linear(layer: Any, adapter: str) -> bool:
    """Whether the layer is a LoRA without bias, dropout or variants on a linear layer, and has this adapter only."""
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


def _linear_forward(
    layer: LoraLayer, adapter: str, original: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """A forward that adds s·B(A x) in place; `original` runs in cases that it does not cover."""
    base: Any = layer.base_layer

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        factors: Any = (layer.lora_A[adapter], layer.lora_B[adapter])
        a, b = (f.weight for f in factors)
        cast = torch.is_autocast_enabled(x.device.type)
        other = args or kwargs or layer.merged or layer.disable_adapters or layer.active_adapters != [adapter]
        if other or type(a) is not torch.nn.Parameter or (not cast and not x.dtype == a.dtype == base.weight.dtype):
            return original(x, *args, **kwargs)
        out = base(x)
        low = F.linear(x, a)
        # In place, which is allowed because no gradient depends on the output of a linear layer.
        flat = out.view(-1, out.shape[-1])
        flat.addmm_(low.reshape(-1, low.shape[-1]).to(out.dtype), b.t().to(out.dtype), alpha=layer.scaling[adapter])
        return out

    return forward
