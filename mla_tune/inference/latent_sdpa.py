"""Scaled dot-product attention in which all heads share the cached latent as their key and value."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mla_tune.inference.latent_cache import joined_rows

#: Numbers of a block of scores, on a CPU and elsewhere: queries are taken a few at a time beyond it.
_SCORES, _SCORES_GPU = 1 << 22, 1 << 25


def latent_sdpa(
    q: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    keep_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """õ (B, T, H, C), and the weights (B, H, T, S) if kept, of q (B, T, H, C), q_rope (B, T, H, R), latent (B, S, C),
    k_rope (B, S, R), mask (B or 1, 1 or H, T, S)."""
    B, T, H, C = q.shape
    S = latent.shape[1]
    # Of each row of the batch, queries and heads are rows of one product: (B, T·H, C+R) × (B, C+R, S).
    rows = None if torch.compiler.is_compiling() else joined_rows(latent, k_rope)
    if rows is not None:
        q = torch.cat((q, q_rope), dim=-1)
        if sinks is None and not keep_weights and _fits_fused(q, mask):
            return _fused(q, rows, mask)[..., :C], None
    # oneDNN, which multiplies 16 bits on a CPU, would copy the latents out of their rows: it takes whole ones.
    summed_up = rows if rows is not None and q.is_cpu and q.element_size() == 2 else latent
    step = max(1, (_SCORES if q.is_cpu else _SCORES_GPU) // (B * H * S))
    parts, kept = [], []
    for first in range(0, T, step):
        last = min(first + step, T)
        part = q[:, first:last].reshape(B, -1, q.shape[-1])
        if rows is not None:
            scores = torch.bmm(part, rows.mT)
        else:
            scores = torch.bmm(part, latent.mT)
            if k_rope.shape[-1]:
                scores.baddbmm_(q_rope[:, first:last].reshape(B, -1, k_rope.shape[-1]), k_rope.mT)
        scores = scores.view(B, last - first, H, S)
        if mask is not None:
            seen = mask[:, :, first:last].transpose(1, 2)
            if seen.dtype == torch.bool:  # not by infinity: a row that sees nothing must not be NaN
                scores.masked_fill_(~seen, torch.finfo(scores.dtype).min)
            else:
                scores += seen
        weights = _softmax(scores, sinks)
        parts.append(torch.bmm(weights.view(B, -1, S), summed_up).view(B, last - first, H, -1)[..., :C])
        if keep_weights:
            kept.append(weights)
    summed = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return summed, torch.cat(kept, dim=1).transpose(1, 2) if keep_weights else None


def _fits_fused(q: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether torch's fused attention for CPUs is the faster way for q (B, T, H, C+R): it has a thread for each row,
    query and 32 heads."""
    B, T, H, _ = q.shape
    if not q.is_cpu or (mask is not None and mask.shape[1] != 1):
        return False
    return torch.get_num_threads() <= 2 * B * T * -(-H // 32)


def _fused(q: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """õ and, behind it, sums of rope keys for nobody (B, T, H, C+R): queries stand where heads are and heads where
    queries are, and one row of the cache is key and value of all of them."""
    keys = rows.unsqueeze(1).expand(-1, q.shape[1], -1, -1)
    seen = None if mask is None else mask.transpose(1, 2)
    return F.scaled_dot_product_attention(q, keys, keys, attn_mask=seen, scale=1.0)


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Over the keys of scores (B, T, H, S), in float32 at least: torch sums 16 bits in float32 by itself."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    column = sinks.to(wide).view(1, 1, -1, 1).expand(*scores.shape[:3], 1)
    return torch.softmax(torch.cat((scores.to(wide), column), dim=-1), dim=-1)[..., :-1].to(scores.dtype)
