"""LoRA in training: W x, then s·B(A x) added in place.

PEFT's layer makes s·B A x as a tensor of its own and adds it in a second pass; for a matrix that it reaches as a
parameter (`target_parameters`) it makes W + s·B A, and its gradient as large as W.  This is the same mathematics as
(W + s·B·A) x for one plain linear layer (Hu et al., arXiv:2106.09685, section 4.1); layers of any other kind (DoRA,
dropout, experts, a quantised or sharded base, several adapters) keep PEFT's forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear, LoraLayer, ParamWrapper


def by_factors(model: torch.nn.Module, adapter: str = "default") -> int:
    """Give every LoRA of `adapter` on a plain linear layer the forward above; returns how many have it."""
    count = 0
    for layer in model.modules():
        if type(layer) in (Linear, ParamWrapper) and _is_plain(layer, adapter):
            layer.forward = _forward_of(layer, adapter, layer.forward)  # type: ignore[method-assign]
            count += 1
    return count


def _is_plain(layer: Any, adapter: str) -> bool:
    base = layer.base_layer
    if type(base) is not torch.nn.Linear or list(layer.lora_A) != [adapter] or layer.lora_magnitude_vector:
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
        # Nothing keeps the output of a linear layer for its gradient, so it may be added to where it lies.
        flat = out.view(-1, out.shape[-1])
        flat.addmm_(low.reshape(-1, low.shape[-1]).to(out.dtype), b.t().to(out.dtype), alpha=layer.scaling[adapter])
        return out

    return forward
