"""Low-rank deltas: LoRA, rsLoRA, DoRA, and LoRA on a stack of experts.

r LoRA rank   E experts   in, out: widths of the adapted matrix W (out, in)   s scale

LoRA    W' = W + s·B·A,  A (r, in), B (out, r), s = alpha/r       Hu et al., arXiv:2106.09685, section 4.1
rsLoRA  the same with s = alpha/√r                                Kalajdzievski, arXiv:2312.03732, section 3
DoRA    W' = m ⊙ (W + s·B·A) / ‖W + s·B·A‖, m (out), one norm     Liu et al., arXiv:2402.09353, section 4.1; one norm
        for each output row                                       a row as in PEFT (`peft/tuners/lora/dora.py`)
"""

from __future__ import annotations

import torch


def delta(A: torch.Tensor, B: torch.Tensor, scale: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """s·B·A (out, in), computed in `dtype` whatever the dtype of the factors A (r, in) and B (out, r)."""
    return (B.to(dtype) @ A.to(dtype)) * scale


def dora_merge(
    W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float, magnitude: torch.Tensor
) -> torch.Tensor:
    """W' (out, in) of a DoRA with `magnitude` (out), computed in the dtype of W."""
    direction = W + delta(A, B, scale, W.dtype)
    return (magnitude.to(W.dtype) / torch.linalg.vector_norm(direction, dim=1)).unsqueeze(1) * direction


def expert_factors(A: torch.Tensor, B: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's stacked factors A (E·r, in) and B (out, r·E) → A (E, r, in) and B (E, out, r).

    A is expert-major.  B is rank-major: its columns count the experts fastest (`ParamWrapper.get_delta_weight` of
    `peft/tuners/lora/layer.py`).  Reading B expert-major gives the right norms and the wrong numbers.
    """
    assert A.shape[0] == B.shape[1], f"A {tuple(A.shape)} and B {tuple(B.shape)} differ in E·r"
    return A.reshape(experts, -1, A.shape[1]), B.reshape(B.shape[0], -1, experts).permute(2, 0, 1)


def expert_delta(
    A: torch.Tensor, B: torch.Tensor, scale: float, experts: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The deltas (E, out, in) of all experts from PEFT's stacked factors A (E·r, in) and B (out, r·E)."""
    A_e, B_e = expert_factors(A, B, experts)
    return torch.bmm(B_e.to(dtype), A_e.to(dtype)) * scale
