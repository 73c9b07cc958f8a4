"""The KV up-projection split into W_UK and W_UV, and fused again, in torch.

    H heads   P qk_nope_head_dim   V v_head_dim   C kv_lora_rank (the latent)

W_UKV (H(P+V), C) has, for each head, P key rows and then V value rows (DeepSeek-V2, arXiv:2405.04434, section 2.1; the
row order is that of transformers' `kv_b_proj`).  Absorbed decoding multiplies by W_UK and W_UV separately:

    q̃[h] = W_UK[h] · q_nope[h]     (C) ← (C, P) (P)       once for each new token
    o[h]  = W_UV[h] · õ[h]          (V) ← (V, C) (C)

`split_kv_b` stores them as those products need them: W_UK (H, C, P), W_UV (H, V, C).  llama.cpp (`attn_k_b`,
`attn_v_b`), mlx-lm (`embed_q`, `unembed_out`) and MLC (`w_uk`, `w_uv`) use the same layouts.

The factor B (H(P+V), r) of a LoRA on W_UKV has the same rows and is split the same way, with r in place of C: it gives
B_Kᵀ (H, r, P) and B_V (H, V, r).
"""

from __future__ import annotations

import torch

from mla_tune.arch.dims import MLADims


def split_kv_b(weight: torch.Tensor, dims: MLADims) -> tuple[torch.Tensor, torch.Tensor]:
    """Split W_UKV (H(P+V), C) into W_UK (H, C, P) and W_UV (H, V, C), both contiguous, in the dtype of `weight`."""
    H, P, V = dims.H, dims.P, dims.V
    assert weight.shape[:-1] == (H * (P + V),), f"{tuple(weight.shape)} is not (H(P+V), C) of {dims}"
    per_head = weight.reshape(H, P + V, -1)
    return per_head[:, :P].transpose(1, 2).contiguous(), per_head[:, P:].contiguous()


def fuse_kv_b(W_UK: torch.Tensor, W_UV: torch.Tensor) -> torch.Tensor:
    """Fuse W_UK (H, C, P) and W_UV (H, V, C) to W_UKV (H(P+V), C): the inverse of `split_kv_b`, bit for bit."""
    assert W_UK.shape[:2] == (W_UV.shape[0], W_UV.shape[2]), f"{tuple(W_UK.shape)} and {tuple(W_UV.shape)} differ"
    return torch.cat((W_UK.transpose(1, 2), W_UV), dim=1).flatten(0, 1)
