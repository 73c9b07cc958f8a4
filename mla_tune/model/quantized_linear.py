"""Layers whose frozen weights stay quantized in memory: `QuantizedLinear`, and routed experts.

A matrix is dequantized when it is used, and the numbers are freed at once.  The backward pass dequantizes it again:

    y = x Wᵀ        dL/dx = dL/dy W        (W is frozen: it has no gradient)

So a step keeps only the codes of W, and at most one matrix (of one expert) is dequantized at a time.

PEFT, transformers and the rest of mla-tune read shape, dtype and device of a layer from its `weight`.  Such a parameter
stays as a placeholder: one NaN, expanded to the full shape, which takes no memory.  Code that computes with it instead
of calling the layer gets NaN rather than a wrong model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from mla_tune.errors import InputError

#: Name of `quantized_experts` in transformers' table of implementations of the routed experts.
EXPERTS = "mla_tune_frozen"


class QuantizedWeight(nn.Module):
    """A quantized weight in memory: its codes and scales are buffers of this module.

    (`checkpoint.quantized.base.QuantizedTensor` is a weight in a file, by reference.)
    """

    shape: tuple[int, ...]
    """(out, in) or, for stacked experts, (E, out, in)."""
    large_buffers: tuple[str, ...] = ()
    """Names of the buffers that grow with the weight: in a sharded model each process has a part of them."""

    def dequantize(self, dtype: torch.dtype, expert: int | None = None) -> torch.Tensor:
        """The numbers (out, in) of the weight, or of one `expert` of stacked ones, each rounded once to `dtype`."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales in this process."""
        return sum(b.nbytes for b in [*self.buffers(), *self.parameters()])


class _Linear(torch.autograd.Function):
    """x (…, in) → x Wᵀ (…, out), with a gradient for x only."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: QuantizedWeight, expert: int | None) -> torch.Tensor:
        ctx.weight, ctx.expert = weight, expert
        return F.linear(x, weight.dequantize(x.dtype, expert))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (dy,) = grads
        return dy @ ctx.weight.dequantize(dy.dtype, ctx.expert), None, None


def linear(x: torch.Tensor, weight: QuantizedWeight, expert: int | None = None) -> torch.Tensor:
    """Multiply x (…, in) by a quantized weight: (…, out), in the dtype of x or, where autocast is on, in autocast's."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _Linear.apply(x, weight, expert)  # type: ignore[no-any-return]


class QuantizedLinear(nn.Linear):
    """A linear layer whose `weight` is a placeholder; the codes are in `weight_matrix`."""

    weight_matrix: QuantizedWeight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input (…, in) → (…, out), with the bias and with the ΔW that PEFT adds to the weight as a parametrization."""
        out = linear(input, self.weight_matrix)
        delta = _parametrized_delta(self, "weight")
        if delta is not None:
            out = out + F.linear(input, delta)
        return out if self.bias is None else out + self.bias


def attach_quantized_weight(module: nn.Module, name: str, weight: QuantizedWeight, dtype: torch.dtype) -> None:
    """Replace the parameter `name` of a linear layer or of stacked experts by a quantized weight.

    The parameter becomes a placeholder of this `dtype`, and the weight is the submodule `{name}_matrix`.
    """
    if name == "weight":
        module.__class__ = QuantizedLinear
    device = next(weight.buffers()).device
    if device.type == "meta":  # PEFT creates its factors on the device of the placeholder, and they need numbers
        device = torch.device("cpu")
    setattr(module, name, nn.Parameter(placeholder(weight.shape, dtype, device), requires_grad=False))
    setattr(module, f"{name}_matrix", weight)
    if name != "weight":
        module.__dict__.setdefault("_expert_lora", {})  # `set_expert_lora` fills it


def prepare_for_fsdp(model: nn.Module) -> None:
    """Make large buffers frozen parameters, which fully_shard shards, and hide placeholders, which it would fill."""
    for module in model.modules():
        for name, weight in list(module._modules.items()):
            if isinstance(weight, QuantizedWeight):
                parameter = name.removesuffix("_matrix")
                module.__dict__[parameter] = module._parameters.pop(parameter)
                for part in weight.large_buffers:
                    codes = weight._buffers.pop(part)
                    assert codes is not None
                    # As bytes, because communication libraries don't know float8.  fully_shard splits the first
                    # dimension, so a first dimension of 1 is flattened: each process should get a part.
                    flat = codes.view(torch.uint8).flatten() if len(codes) == 1 else codes.view(torch.uint8)
                    setattr(weight, part, nn.Parameter(flat, requires_grad=False))


def placeholder(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """One NaN expanded to `shape`, without memory: for the parameter whose numbers are in a `QuantizedWeight`."""
    return torch.full((), float("nan"), dtype=dtype, device=device).expand(shape)


def check_experts(module: Any, parameter: str) -> None:
    """Raise `InputError` for routed experts that `quantized_experts` can't replace."""
    plain = getattr(module, "has_gate", False) and getattr(module, "is_concatenated", False)
    other = [n for n in ("is_transposed", "has_bias", "has_post_expert_norm") if getattr(module, n, False)]
    if not plain or other:
        raise InputError(
            f"{parameter}: the routed experts of this family have a forward pass of their own, which can't read "
            "quantized weights; train on the bfloat16 checkpoint with model.quantize: none"
        )


def quantized_weight_of(module: nn.Module, name: str) -> QuantizedWeight | None:
    """The quantized weight behind the parameter `name` of a module; None for a plain parameter."""
    return getattr(module, f"{name}_matrix", None)


class ExpertLora(NamedTuple):
    """The LoRA of one parameter of E stacked experts: expert e adds scale·B_e(A_e x) to W_e x."""

    A: torch.Tensor
    """(E·r, in): the r rows of expert 0, then those of expert 1, and so on."""
    B: torch.Tensor
    """(out, r·E), rank-major: column j·E + e is column j of expert e."""
    scale: float
    """s = alpha/r."""


def set_expert_lora(experts: nn.Module, name: str, lora: ExpertLora) -> None:
    """Let `quantized_experts` add a LoRA to the quantized parameter `name` of `experts`, until `clear_expert_lora`.

    The caller hands the factors over for one forward pass, so that no ΔW of all experts is made.  `experts` must hold
    a quantized weight under this name (`attach_quantized_weight`).
    """
    module: Any = experts
    module._expert_lora[name] = lora


def clear_expert_lora(experts: nn.Module, name: str) -> None:
    """Take away the LoRA that `set_expert_lora` gave to the parameter `name` of `experts`."""
    module: Any = experts
    del module._expert_lora[name]


def _parametrized_delta(module: nn.Module, name: str) -> torch.Tensor | None:
    """The ΔW that torch's parametrizations add to a parameter, in the parameter's shape; None without any.

    PEFT adapts a parameter by them (`target_parameters`).
    """
    parametrizations: Any = getattr(module, "parametrizations", None)
    if parametrizations is None or name not in parametrizations:
        return None
    original = parametrizations[name].original
    delta = torch.zeros((), dtype=original.dtype, device=original.device).expand(original.shape)
    for parametrization in parametrizations[name]:
        delta = parametrization(delta)
    return delta


def quantized_experts(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Run transformers' routed experts with quantized weights, an expert at a time.

    `hidden_states` (T, D), `top_k_index` and `top_k_weights` (T, K) → (T, D).  A LoRA that `set_expert_lora` gave to a
    parameter is added as s·B(A x): no ΔW of all experts is built.
    """
    tokens, top_k = top_k_index.shape
    ids, order = top_k_index.reshape(-1).sort(stable=True)
    # A number above the last expert's stands for no expert.
    counts = ids.clamp(max=self.num_experts).bincount(minlength=self.num_experts + 1).tolist()[:-1]
    x = hidden_states[order // top_k]
    up, down = _by_expert(self, "gate_up_proj"), _by_expert(self, "down_proj")
    outputs, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            outputs.append(down(self._apply_gate(up(x[start : start + count], expert)), expert))
            start += count
    if start < len(x):
        outputs.append(x[start:] * 0)
    weighted = torch.cat(outputs) * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return weighted[back].view(tokens, top_k, -1).sum(dim=1).to(hidden_states.dtype)


def _by_expert(experts: Any, name: str) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Return a function (x (n, in), expert) → x Wᵀ (n, out) of the experts' parameter `name`, with its adapters."""
    weight = quantized_weight_of(experts, name)
    if weight is None:
        plain = getattr(experts, name).unbind(0)
        return lambda x, expert: F.linear(x, plain[expert])
    lora: ExpertLora | None = experts._expert_lora.get(name)
    if lora is not None:
        a, b, scale = lora
        # Unbound once for all experts: the gradient of an indexed slice would be as large as all of A.
        rows = a.view(len(experts.gate_up_proj), -1, a.shape[-1]).unbind(0)
        columns = b.view(b.shape[0], -1, len(rows)).unbind(2)

        def adapted(x: torch.Tensor, expert: int) -> torch.Tensor:
            out = linear(x, weight, expert)
            low = F.linear(F.linear(x.to(a.dtype), rows[expert]), columns[expert])
            return out + scale * low.to(out.dtype)

        return adapted
    delta = _parametrized_delta(experts, name)
    if delta is not None:
        deltas = delta.unbind(0)
        return lambda x, expert: linear(x, weight, expert) + F.linear(x, deltas[expert])
    return lambda x, expert: linear(x, weight, expert)


def register_experts() -> None:
    """Register `quantized_experts` in transformers' table of implementations of the routed experts."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if EXPERTS not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(EXPERTS, quantized_experts)
