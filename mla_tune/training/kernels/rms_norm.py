"""RMSNorm with its gradient written out, which keeps one number a token besides its input.

    ρ = 1/√(mean(x²) + ε)      x̂ = ρ x      y = w ⊙ x̂                         (Zhang and Sennrich, arXiv:1910.07467)
    ∂x = ρ (g w − x̂ · mean(g w x̂))          ∂w = Σ g x̂

With autograd's own gradient a model in bfloat16 keeps a second copy of the input in float32 and takes twice the time.
The forward pass does the module's own operations in their order, so that outputs are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def use_lean_norms(
    model: torch.nn.Module, made: Callable[[torch.Tensor, Callable[[], torch.Tensor]], None] | None
) -> int:
    """Replace the forward of every RMSNorm that is the formula above; returns how many.

    `made(output, again)` hears of each output in training and how to compute it once more.  A module that computes
    anything else (found by comparing outputs) stays as it is.
    """
    found = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm") and _is_plain(m)]
    for norm in found:
        forward = _forward_of(norm, made)
        # What hears of each output is no part of a compiled graph.
        norm.forward = torch.compiler.disable(forward) if made is not None else forward  # type: ignore
    return len(found)


def _forward_of(norm: Any, made: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    original = norm.forward

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        x, weight = hidden_states, norm.weight
        if not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad):
            return original(x)
        out = _Norm.apply(x, weight, norm.variance_epsilon)
        if made is not None:
            source = x.detach()
            made(out, lambda: original(source))
        return out

    return forward


def _is_plain(norm: Any) -> bool:
    """Whether the module's output is the formula's, bit for bit, in float32 and bfloat16."""
    weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if type(weight) is not torch.nn.Parameter or not isinstance(eps, float):
        return False
    if weight.is_meta:  # another process has the numbers: any will do
        weight = torch.linspace(0.5, 2, weight.numel(), dtype=weight.dtype)
    x = torch.linspace(-2, 3, 3 * weight.numel(), dtype=torch.float32, device=weight.device).view(3, -1)
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            out = torch.func.functional_call(norm, {"weight": weight}, (x.to(dtype),))
            if not torch.equal(out, _norm(x.to(dtype), weight, eps)[0]):
                return False
    return True


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, ρ), in the steps of transformers' modules."""
    wide = x.float()
    rho = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * rho).to(x.dtype), rho


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out, rho = _norm(x, weight, eps)
        ctx.save_for_backward(x, weight, rho)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        x, weight, rho = ctx.saved_tensors
        wide = x.float()
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (grad.float() * (wide * rho)).flatten(0, -2).sum(0).to(weight.dtype)
        scaled = grad.float() * weight.float()
        along = (scaled * wide).sum(-1, keepdim=True).mul_(rho * rho / x.shape[-1])
        dx = scaled.addcmul_(wide, along, value=-1).mul_(rho).to(x.dtype) if ctx.needs_input_grad[0] else None
        return dx, d_weight, None
