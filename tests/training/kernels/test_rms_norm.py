"""The written-out gradient of RMSNorm, and that the forward pass is the module's own, bit for bit."""

from __future__ import annotations

import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

from mla_tune.training.kernels.rms_norm import use_lean_norms
from tests.helpers.tiny_families import FAMILIES, tiny


def norm_of(width: int, dtype: torch.dtype = torch.float32) -> DeepseekV3RMSNorm:
    norm = DeepseekV3RMSNorm(width, eps=1e-6).to(dtype)
    with torch.no_grad():
        norm.weight.add_(0.3 * torch.randn(width, generator=torch.Generator().manual_seed(1)))
    return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_the_same_bits(dtype: torch.dtype) -> None:
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    norm = norm_of(24, dtype)
    wanted = norm(x)
    assert use_lean_norms(torch.nn.ModuleList([norm]), None) == 1
    assert torch.equal(norm(x), wanted)


def test_gradients_are_those_of_autograd_in_float64() -> None:
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0), requires_grad=True)
    g = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(2))
    norm = norm_of(24)
    use_lean_norms(torch.nn.ModuleList([norm]), None)
    dx, dw = torch.autograd.grad(norm(x), (x, norm.weight), g)
    wide, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    y = weight * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    wanted_x, wanted_w = torch.autograd.grad(y, (wide, weight), g.double())
    torch.testing.assert_close(dx.double(), wanted_x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dw.double(), wanted_w, rtol=1e-5, atol=1e-6)


def test_gradients_in_bfloat16_are_as_near_as_the_stock_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(64, 256, generator=generator).bfloat16() for _ in range(2))
    stock, lean = norm_of(256, torch.bfloat16), norm_of(256, torch.bfloat16)
    use_lean_norms(torch.nn.ModuleList([lean]), None)
    exact_norm, exact_x = norm_of(256).double(), x.double().requires_grad_()
    exact_norm.weight.data = stock.weight.detach().double()
    wide = exact_x * torch.rsqrt(exact_x.square().mean(-1, keepdim=True) + 1e-6) * exact_norm.weight
    wanted = torch.autograd.grad(wide, exact_x, g.double())[0]
    errors = []
    for norm in (stock, lean):
        leaf = x.clone().requires_grad_()
        found = torch.autograd.grad(norm(leaf), leaf, g)[0]
        errors.append((found.double() - wanted).square().mean().sqrt().item())
    assert errors[1] <= 1.01 * errors[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_norm_of_a_family_is_found(name: str) -> None:
    model = tiny(name)
    # Some have no weight, or hold a norm and what gates it.
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm") and "weight" in m._parameters]
    assert norms
    assert use_lean_norms(model, None) == len(norms)


def test_another_formula_is_left_alone() -> None:
    class GemmaRMSNorm(DeepseekV3RMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) + hidden_states * 1e-3

    norm = GemmaRMSNorm(16)
    assert use_lean_norms(torch.nn.ModuleList([norm]), None) == 0
    assert "forward" not in vars(norm)
