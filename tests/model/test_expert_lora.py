"""A LoRA on quantized experts: the same as experts whose weights are W + s·B·A, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from mla_tune.model.quantized_linear import (
    ExpertLora,
    QuantizedWeight,
    attach_quantized_weight,
    clear_expert_lora,
    quantized_experts,
    set_expert_lora,
)
from tests.helpers.tiny_families import text_model, tiny

RANK, SCALE = 3, 0.7
#: Rounding of float64 sums of a few hundred products.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


class PlainWeight(QuantizedWeight):
    """Numbers that need no decoding, so that every difference comes from the LoRA."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.shape = tuple(weight.shape)
        self.register_buffer("codes", weight)

    def dequantize(self, dtype: torch.dtype, expert: int | None = None) -> torch.Tensor:
        codes: Any = self.codes
        return (codes if expert is None else codes[expert]).to(dtype)


@pytest.fixture
def stacks() -> tuple[Any, Any]:
    """The same routed experts twice: plain, and with quantized weights."""
    model = tiny("deepseek_v3", torch.float64)
    model.set_experts_implementation("eager")  # grouped_mm has no float64
    layer: Any = text_model(model).layers[-1]
    plain = layer.mlp.experts
    quantized = copy.deepcopy(plain)
    for name in ("gate_up_proj", "down_proj"):
        weight = PlainWeight(plain.get_parameter(name).detach().clone())
        attach_quantized_weight(quantized, name, weight, torch.float64)
    return plain, quantized


def random_lora(experts: Any, name: str) -> ExpertLora:
    count, out, inner = experts.get_parameter(name).shape
    generator = torch.Generator().manual_seed(len(name))
    A = torch.randn(count * RANK, inner, generator=generator, dtype=torch.float64)
    B = torch.randn(out, RANK * count, generator=generator, dtype=torch.float64)
    return ExpertLora(A, B, SCALE)


def tokens(experts: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    count, _, inner = experts.gate_up_proj.shape
    x = torch.randn(20, inner, generator=generator, dtype=torch.float64)
    index = torch.rand(20, count, generator=generator).topk(2).indices
    return x, index, torch.rand(20, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("names", [["gate_up_proj"], ["down_proj"], ["gate_up_proj", "down_proj"]], ids=" ".join)
def test_it_is_added_to_the_named_parameters(stacks: tuple[Any, Any], names: list[str]) -> None:
    plain, quantized = stacks
    inputs = tokens(plain)
    before = plain(*inputs)
    for name in names:
        lora, weight = random_lora(plain, name), plain.get_parameter(name)
        set_expert_lora(quantized, name, lora)
        for e in range(len(weight)):
            # Expert e: rows e·r to (e+1)·r of A, and every E-th column of B.
            weight.data[e] += SCALE * lora.B[:, e :: len(weight)] @ lora.A[e * RANK : (e + 1) * RANK]
    expected = plain(*inputs)
    assert not torch.allclose(expected, before)
    torch.testing.assert_close(quantized_experts(quantized, *inputs), expected, **CLOSE)


def test_it_ends_where_it_is_cleared(stacks: tuple[Any, Any]) -> None:
    plain, quantized = stacks
    inputs = tokens(plain)
    set_expert_lora(quantized, "down_proj", random_lora(plain, "down_proj"))
    clear_expert_lora(quantized, "down_proj")
    torch.testing.assert_close(quantized_experts(quantized, *inputs), plain(*inputs), **CLOSE)
