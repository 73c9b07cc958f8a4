"""How the factors A and B of a LoRA begin (`adapter.init`).

PiSSA (Meng et al., arXiv:2404.02948) and OLoRA (Büyükakyüz, arXiv:2406.01775) begin at a leading part of W, which the
base then loses: W − s·B₀A₀ + s·B A.  The base's own weights are not touched here.  The LoRA has twice the rank instead,

    ΔW = s · [B, −B₀] · [A; A₀]    PiSSA: W ≈ U S Vᵀ, B₀ = U √(S/s), A₀ = √(S/s) Vᵀ    OLoRA: W = Q R, B₀ = Q, A₀ = R

and its second half is frozen.  So the residual base W − s·B₀A₀ is the same mathematics without its rounding (in
bfloat16 that would be an error of the size of an update), and what is saved is a plain LoRA of rank 2r on the base as
it is: PEFT loads it, engines serve it, `merge-absorb` merges it.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper

from mla_tune.adapter.placement import Placement
from mla_tune.model.attach import AttachedLora, attached_loras
from mla_tune.model.quantized_linear import quantized_weight_of

#: Up to this smaller side all singular values are computed; above it, the leading ones by subspace iteration.
EXACT = 1024
ITERATIONS = 16


def initialize(model: torch.nn.Module, placement: Placement, seed: int) -> None:
    """Set A and B of every LoRA as `placement.init` says; `default` is what PEFT did.  Same seed, same numbers."""
    if placement.init == "default":
        return
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for lora in attached_loras(model):
            _INITS[placement.init](lora)


def _factors(lora: AttachedLora) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    layer: Any = lora.layer
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def _weight(lora: AttachedLora) -> torch.Tensor:
    """The base's matrix (out, in), float32 on a CPU."""
    layer: Any = lora.layer
    base = layer.get_base_layer()
    name = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
    quantized = quantized_weight_of(base, name)
    weight = getattr(base, name).detach() if quantized is None else quantized.dequantize(torch.float32)
    return weight.float().cpu()


def _gaussian(lora: AttachedLora) -> None:
    a, b = _factors(lora)
    a.copy_(torch.randn(a.shape) / lora.rank)
    b.zero_()


def _orthogonal(lora: AttachedLora) -> None:
    """A and B both begin away from 0, in subspaces orthogonal to each other: B A = 0 (datta0.github.io,
    "Rethink LoRA initialization")."""
    a, b = _factors(lora)
    q = torch.linalg.qr(torch.randn(lora.rank, lora.rank))[0]
    a.copy_((torch.randn(a.shape[1], lora.rank // 2) @ q[0::2]).T / 10)
    b.copy_(torch.randn(b.shape[0], lora.rank // 2) @ q[1::2] / 10)


def _pissa(lora: AttachedLora) -> None:
    rank, weight = lora.rank // 2, _weight(lora)
    if min(weight.shape) <= EXACT:
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, q=min(2 * rank, *weight.shape), niter=ITERATIONS)
        vt = v.T
    root = (s[:rank] / lora.scale).sqrt()
    _halves(lora, root[:, None] * vt[:rank], u[:, :rank] * root)


def _olora(lora: AttachedLora) -> None:
    rank = lora.rank // 2
    q, r = torch.linalg.qr(_weight(lora))
    _halves(lora, r[:rank], q[:, :rank])


def _halves(lora: AttachedLora, a0: torch.Tensor, b0: torch.Tensor) -> None:
    """[A; A₀] and [B, −B₀], both begin equal; the second half gets no gradient and stays."""
    a, b = _factors(lora)
    rank = len(a0)
    a.copy_(torch.cat([a0, a0]))
    b.copy_(torch.cat([b0, -b0], dim=1))
    a.register_hook(lambda g: torch.cat([g[:rank], torch.zeros_like(g[rank:])]))
    b.register_hook(lambda g: torch.cat([g[:, :rank], torch.zeros_like(g[:, rank:])], dim=1))


_INITS = {"gaussian": _gaussian, "orthogonal": _orthogonal, "pissa": _pissa, "olora": _olora}
