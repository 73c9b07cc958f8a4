"""Scaled dot-product attention in which all heads share the cached latent as their key and value."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mla_tune.inference.latent_cache import joined_rows

#: Most scores that are in memory at a time, on a CPU and on a GPU; more queries than that are computed in blocks.
_SCORES, _SCORES_GPU = 1 << 22, 1 << 25


def latent_sdpa(
    q: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    *,
    return_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute the softmax-weighted sums of latents, õ (B, T, H, C).

    q (B, T, H, C) and q_rope (B, T, H, R) are scaled queries, latent (B, S, C) and k_rope (B, S, R) cached tokens; mask
    (B or 1, 1 or H, T, S) is true, or 0, where a query sees a key; sinks (H) are scores without a value.  Returns õ,
    and the attention weights (B, H, T, S) if asked for.
    """
    B, T, H, C = q.shape
    S = latent.shape[1]
    # For each row of the batch, queries and heads together are the rows of one product: (B, T·H, C+R) × (B, C+R, S).
    rows = None if torch.compiler.is_compiling() else joined_rows(latent, k_rope)
    if rows is not None:
        q = torch.cat((q, q_rope), dim=-1)
        if sinks is None and not return_weights and _is_fused_faster(q, mask):
            return _fused_sdpa(q, rows, mask)[..., :C], None
    # On a CPU oneDNN multiplies 16-bit matrices, and would copy the latents out of the joined rows.  Multiplying with
    # the joined rows, and dropping the last R columns of the result, avoids the copy.
    values = rows if rows is not None and q.is_cpu and q.element_size() == 2 else latent
    step = max(1, (_SCORES if q.is_cpu else _SCORES_GPU) // (B * H * S))
    outputs, all_weights = [], []
    for first in range(0, T, step):
        last = min(first + step, T)
        block = q[:, first:last].reshape(B, -1, q.shape[-1])
        if rows is not None:
            scores = torch.bmm(block, rows.mT)
        else:
            scores = torch.bmm(block, latent.mT)
            if k_rope.shape[-1]:
                scores.baddbmm_(q_rope[:, first:last].reshape(B, -1, k_rope.shape[-1]), k_rope.mT)
        scores = scores.view(B, last - first, H, S)
        if mask is not None:
            block_mask = mask[:, :, first:last].transpose(1, 2)
            if block_mask.dtype == torch.bool:  # not -inf, with which a query that sees no key would become NaN
                scores.masked_fill_(~block_mask, torch.finfo(scores.dtype).min)
            else:
                scores += block_mask
        weights = _softmax(scores, sinks)
        outputs.append(torch.bmm(weights.view(B, -1, S), values).view(B, last - first, H, -1)[..., :C])
        if return_weights:
            all_weights.append(weights)
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return output, torch.cat(all_weights, dim=1).transpose(1, 2) if return_weights else None


def _is_fused_faster(q: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether torch's fused attention for CPUs is faster than two products for q (B, T, H, C+R).

    It gives work to one thread for each row, query and 32 heads: with fewer of these, it leaves threads idle.
    """
    B, T, H, _ = q.shape
    if not q.is_cpu or (mask is not None and mask.shape[1] != 1):
        return False
    return torch.get_num_threads() <= 2 * B * T * -(-H // 32)


def _fused_sdpa(q: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Run SDPA with the head and query axes of q (B, T, H, C+R) swapped, so that all heads share one K = V.

    rows (B, S, C+R) are cached latents with their rope keys.  Returns (B, T, H, C+R); the last R columns are unused.
    """
    keys = rows.unsqueeze(1).expand(-1, q.shape[1], -1, -1)
    mask = None if mask is None else mask.transpose(1, 2)
    return F.scaled_dot_product_attention(q, keys, keys, attn_mask=mask, scale=1.0)


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Return the softmax over the keys of scores (B, T, H, S), summed in float32 at least.

    Torch itself sums 16-bit numbers in float32.  `sinks` (H) add one score for each head that gets no column.
    """
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    column = sinks.to(wide).view(1, 1, -1, 1).expand(*scores.shape[:3], 1)
    return torch.softmax(torch.cat((scores.to(wide), column), dim=-1), dim=-1)[..., :-1].to(scores.dtype)
