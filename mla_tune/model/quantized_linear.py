"""Frozen weights that stay quantized in memory: `QuantizedLinear`, and routed experts that read such weights.

A matrix is turned into numbers where it is needed, used, and forgotten.  The backward pass makes the numbers again:

    y = x Wᵀ        dL/dx = dL/dy W        (W is frozen: it has no gradient)

so what a step keeps of W are its codes, and no more than one matrix (of one expert) is in numbers at a time.

PEFT, transformers and the rest of mla-tune know a layer by the shape, dtype and device of its `weight`.  So a parameter
of that name stays: one NaN, expanded to the whole shape (no memory).  Code that reads it instead of calling the layer
gets NaN, and not a wrong model.
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

    Not `checkpoint.quantized.base.QuantizedTensor`, which says where a weight lies in a file and holds no numbers.
    """

    #: (out, in) or, for stacked experts, (E, out, in).
    shape: tuple[int, ...]
    #: Names of the buffers that grow with the weight: of a sharded model each process has a part of them.
    large: tuple[str, ...] = ()

    def dequantize(self, dtype: torch.dtype, expert: int | None = None) -> torch.Tensor:
        """The weight (out, in), of one expert where there are several, rounded once to `dtype`."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales in this process."""
        return sum(b.nbytes for b in [*self.buffers(), *self.parameters()])


class _Linear(torch.autograd.Function):
    """x (…, in) → x Wᵀ (…, out), with the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, matrix: QuantizedWeight, expert: int | None) -> torch.Tensor:
        ctx.matrix, ctx.expert = matrix, expert
        return F.linear(x, matrix.dequantize(x.dtype, expert))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (dy,) = grads
        return dy @ ctx.matrix.dequantize(dy.dtype, ctx.expert), None, None


def linear(x: torch.Tensor, matrix: QuantizedWeight, expert: int | None = None) -> torch.Tensor:
    """x (…, in) → (…, out) in the dtype of x, or in that of autocast where it is on."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _Linear.apply(x, matrix, expert)  # type: ignore[no-any-return]


class QuantizedLinear(nn.Linear):
    """A linear layer whose `weight` is a placeholder and whose numbers are in `weight_matrix`."""

    weight_matrix: QuantizedWeight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input (…, in) → (…, out), with what PEFT adds to the weight and with the bias."""
        out = linear(input, self.weight_matrix)
        change = _change(self, "weight")
        if change is not None:
            out = out + F.linear(input, change)
        return out if self.bias is None else out + self.bias


def attach_quantized_weight(module: nn.Module, name: str, matrix: QuantizedWeight, dtype: torch.dtype) -> None:
    """Give the parameter `name` of a linear layer or of stacked experts its numbers from `matrix`, computed with in
    `dtype`."""
    if name == "weight":
        module.__class__ = QuantizedLinear
    device = next(matrix.buffers()).device
    if device.type == "meta":  # PEFT makes its factors where this is, and theirs are real
        device = torch.device("cpu")
    setattr(module, name, nn.Parameter(placeholder(matrix.shape, dtype, device), requires_grad=False))
    setattr(module, f"{name}_matrix", matrix)
    if name != "weight":
        module.__dict__.setdefault("_expert_lora", {})  # `set_expert_lora` fills it


def prepare_for_fsdp(model: nn.Module) -> None:
    """Make frozen parameters of the codes, which fully_shard shards, and hide the placeholders, which it would fill."""
    for module in model.modules():
        for name, matrix in list(module._modules.items()):
            if isinstance(matrix, QuantizedWeight):
                parameter = name.removesuffix("_matrix")
                module.__dict__[parameter] = module._parameters.pop(parameter)
                for part in matrix.large:
                    codes = matrix._buffers.pop(part)
                    assert codes is not None
                    # Bytes: communication libraries don't know float8; and each process should get some of them.
                    flat = codes.view(torch.uint8).flatten() if len(codes) == 1 else codes.view(torch.uint8)
                    setattr(matrix, part, nn.Parameter(flat, requires_grad=False))


def placeholder(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """One NaN expanded to `shape`: what code that reads the weight instead of calling the layer gets."""
    return torch.full((), float("nan"), dtype=dtype, device=device).expand(shape)


def check_experts(module: Any, parameter: str) -> None:
    """Raises `InputError` for routed experts that `quantized_experts` can't stand for."""
    plain = getattr(module, "has_gate", False) and getattr(module, "is_concatenated", False)
    other = [n for n in ("is_transposed", "has_bias", "has_post_expert_norm") if getattr(module, n, False)]
    if not plain or other:
        raise InputError(
            f"{parameter}: the routed experts of this family have a forward pass of their own, which quantized weights "
            f"can't be put under; train on the bfloat16 checkpoint with model.quantize: none"
        )


def quantized_weight_of(module: nn.Module, name: str) -> QuantizedWeight | None:
    """The quantized weight behind a parameter; None where it is a plain one."""
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


def _change(module: nn.Module, name: str) -> torch.Tensor | None:
    """What torch's parametrizations add to a parameter: PEFT's way to adapt one (`target_parameters`)."""
    added: Any = getattr(module, "parametrizations", None)
    if added is None or name not in added:
        return None
    original = added[name].original
    change = torch.zeros((), dtype=original.dtype, device=original.device).expand(original.shape)
    for parametrization in added[name]:
        change = parametrization(change)
    return change


def quantized_experts(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """transformers' routed experts with quantized weights, an expert at a time.

    `hidden_states` (T, D), `top_k_index` and `top_k_weights` (T, K) → (T, D).  A LoRA
    that `set_expert_lora` gave to a parameter is added as s·B(A x), so that no ΔW of all experts is made.
    """
    tokens, top_k = top_k_index.shape
    ids, order = top_k_index.reshape(-1).sort(stable=True)
    # A number above the last expert means that the token goes to none.
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
    """(x (n, in), expert) → x Wᵀ (n, out), with what adapters add."""
    matrix = quantized_weight_of(experts, name)
    if matrix is None:
        plain = getattr(experts, name).unbind(0)
        return lambda x, expert: F.linear(x, plain[expert])
    lora: ExpertLora | None = experts._expert_lora.get(name)
    if lora is not None:
        a, b, scale = lora
        # Unbound once: the gradient of one slice would be as large as all of A.
        rows = a.view(len(experts.gate_up_proj), -1, a.shape[-1]).unbind(0)
        columns = b.view(b.shape[0], -1, len(rows)).unbind(2)

        def adapted(x: torch.Tensor, expert: int) -> torch.Tensor:
            out = linear(x, matrix, expert)
            low = F.linear(F.linear(x.to(a.dtype), rows[expert]), columns[expert])
            return out + scale * low.to(out.dtype)

        return adapted
    change = _change(experts, name)
    if change is not None:
        changes = change.unbind(0)
        return lambda x, expert: linear(x, matrix, expert) + F.linear(x, changes[expert])
    return lambda x, expert: linear(x, matrix, expert)


def register_experts() -> None:
    """Enter `quantized_experts` into transformers' table of implementations of the routed experts."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if EXPERTS not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(EXPERTS, quantized_experts)
