"""LoRA, rsLoRA, DoRA and stacked experts: float64 identities, with numpy and PEFT's own layers as oracles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from mla_tune.mla.lora import delta, dora_merge, expert_delta, expert_factors, scaling

OUT, IN, RANK, EXPERTS = 7, 11, 3, 5


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


GENERATOR = torch.Generator().manual_seed(0)


def test_scaling() -> None:
    assert scaling(16, 8, rslora=False) == 2
    assert scaling(16, 8, rslora=True) == pytest.approx(16 / math.sqrt(8))


def test_delta_is_exact_in_float64_and_float32_whatever_the_factors_dtype() -> None:
    A, B = draw(RANK, IN), draw(OUT, RANK)
    np.testing.assert_allclose(delta(A, B, 0.7, torch.float64), 0.7 * (B.numpy() @ A.numpy()), rtol=1e-12)
    low = delta(A.bfloat16(), B.bfloat16(), 0.7)
    assert low.dtype == torch.float32
    exact = 0.7 * (B.bfloat16().double() @ A.bfloat16().double())
    assert (low - exact).abs().max() < 1e-6  # bfloat16 arithmetic would be off by 1e-2


def test_dora_gives_every_row_its_magnitude() -> None:
    W, A, B, m = draw(OUT, IN), draw(RANK, IN), draw(OUT, RANK), draw(OUT).abs()
    merged = dora_merge(W, A, B, 0.7, m).numpy()
    direction = W.numpy() + 0.7 * B.numpy() @ A.numpy()
    np.testing.assert_allclose(np.linalg.norm(merged, axis=1), m.numpy(), rtol=1e-12)
    expected = m.numpy()[:, None] * direction / np.linalg.norm(direction, axis=1)[:, None]
    np.testing.assert_allclose(merged, expected, rtol=1e-12)


def test_dora_with_the_initial_magnitude_and_no_lora_is_the_weight() -> None:
    W = draw(OUT, IN)
    merged = dora_merge(W, draw(RANK, IN), torch.zeros(OUT, RANK), 2.0, W.norm(dim=1))
    np.testing.assert_allclose(merged, W, rtol=1e-12)


def test_expert_delta_reads_A_expert_major_and_B_rank_major() -> None:
    A, B = draw(EXPERTS * RANK, IN), draw(OUT, RANK * EXPERTS)
    stacked = expert_delta(A, B, 0.7, EXPERTS, torch.float64)
    assert stacked.shape == (EXPERTS, OUT, IN)
    A_e, B_e = expert_factors(A, B, EXPERTS)
    for e in range(EXPERTS):
        expected = sum(np.outer(B[:, i * EXPERTS + e], A[e * RANK + i]) for i in range(RANK))
        np.testing.assert_allclose(stacked[e], 0.7 * expected, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(delta(A_e[e], B_e[e], 0.7, torch.float64), stacked[e], rtol=1e-12)


def test_expert_delta_is_pefts() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = nn.Parameter(torch.zeros(EXPERTS, OUT, IN))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Experts()

    config = LoraConfig(r=RANK, lora_alpha=5, target_modules=[], target_parameters=["experts.down_proj"])
    layer = get_peft_model(Model(), config).base_model.model.experts
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        B.normal_()
        torch.testing.assert_close(expert_delta(A, B, 5 / RANK, EXPERTS), layer.get_delta_weight("default"))
