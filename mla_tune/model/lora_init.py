"""Initialize the factors A and B of a LoRA (`adapter.init`).

PiSSA (Meng et al., arXiv:2404.02948) and OLoRA (Büyükakyüz, arXiv:2406.01775) start from a leading part of W and
subtract it from the base: W − s·B₀A₀ + s·B A.  Here the base's weights do not change, and the LoRA has twice the rank:

    ΔW = s · [B, −B₀] · [A; A₀]    PiSSA: W ≈ U S Vᵀ, B₀ = U √(S/s), A₀ = √(S/s) Vᵀ    OLoRA: W = Q R, B₀ = Q, A₀ = R

Its second half is frozen.  This computes the same without rounding a residual base W − s·B₀A₀, which in bfloat16 would
be an error of the size of an update.  The saved adapter is a plain LoRA of rank 2r on the unchanged base: PEFT loads
it, engines serve it, `merge-absorb` merges it.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper

from mla_tune.adapter.placement import Placement
from mla_tune.model.attach import AttachedLora, attached_loras
from mla_tune.model.quantized_linear import quantized_weight_of

#: PiSSA: up to this smaller side of W all singular values are computed; above it, the leading ones by iteration.
EXACT_SVD_SIZE = 1024
#: Subspace iterations for the leading singular values.
SVD_ITERATIONS = 16


def initialize(model: torch.nn.Module, placement: Placement, seed: int) -> None:
    """Set A and B of every LoRA as `placement.init` says, drawn from `seed`; `default` keeps PEFT's numbers."""
    if placement.init == "default":
        return
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for lora in attached_loras(model):
            _INITS[placement.init](lora)


def _factors(lora: AttachedLora) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """A (r, in) and B (out, r)."""
    layer: Any = lora.layer
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def _weight(lora: AttachedLora) -> torch.Tensor:
    """The base's matrix (out, in), in float32 on the CPU."""
    layer: Any = lora.layer
    base = layer.get_base_layer()
    name = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
    quantized = quantized_weight_of(base, name)
    weight = getattr(base, name).detach() if quantized is None else quantized.dequantize(torch.float32)
    return weight.float().cpu()


def _gaussian(lora: AttachedLora) -> None:
    """A is normal with the standard deviation 1/r, B is zero."""
    a, b = _factors(lora)
    a.copy_(torch.randn(a.shape) / lora.rank)
    b.zero_()


def _orthogonal(lora: AttachedLora) -> None:
    """A and B are both different from zero, in orthogonal subspaces, so that B A = 0 (datta0.github.io, "Rethink LoRA
    initialization")."""
    a, b = _factors(lora)
    q = torch.linalg.qr(torch.randn(lora.rank, lora.rank))[0]
    a.copy_((torch.randn(a.shape[1], lora.rank // 2) @ q[0::2]).T / 10)
    b.copy_(torch.randn(b.shape[0], lora.rank // 2) @ q[1::2] / 10)


def _pissa(lora: AttachedLora) -> None:
    """B₀ A₀ is the part of W with the largest singular values."""
    rank, weight = lora.rank // 2, _weight(lora)
    if min(weight.shape) <= EXACT_SVD_SIZE:
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, q=min(2 * rank, *weight.shape), niter=SVD_ITERATIONS)
        vt = v.T
    root = (s[:rank] / lora.scale).sqrt()
    _set_halves(lora, root[:, None] * vt[:rank], u[:, :rank] * root)


def _olora(lora: AttachedLora) -> None:
    """B₀ A₀ is the leading part of the QR decomposition of W."""
    rank = lora.rank // 2
    q, r = torch.linalg.qr(_weight(lora))
    _set_halves(lora, r[:rank], q[:, :rank])


def _set_halves(lora: AttachedLora, a0: torch.Tensor, b0: torch.Tensor) -> None:
    """Set the factors to [A; A₀] and [B, −B₀] with A = A₀ and B = B₀; a hook keeps gradients from the second halves."""
    a, b = _factors(lora)
    rank = len(a0)
    a.copy_(torch.cat([a0, a0]))
    b.copy_(torch.cat([b0, -b0], dim=1))
    a.register_hook(lambda g: torch.cat([g[:rank], torch.zeros_like(g[rank:])]))
    b.register_hook(lambda g: torch.cat([g[:, :rank], torch.zeros_like(g[:, rank:])], dim=1))


_INITS = {"gaussian": _gaussian, "orthogonal": _orthogonal, "pissa": _pissa, "olora": _olora}
