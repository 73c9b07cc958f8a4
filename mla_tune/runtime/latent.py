"""Attention of one module in the latent space: scores and values without expanding a cached token.

    B batch   T queries   S keys   H heads   P qk_nope_head_dim   R qk_rope_head_dim   V v_head_dim   C kv_lora_rank

    q̃[h] = W_UK[h]ᵀ q_nope[h]  (C)     score = (q̃ · c + q_rope · k_rope) · scale
    õ[h] = Σ softmax(score) c   (C)     o[h] = W_UV[h] õ[h]  (V)          (DeepSeek-V2, arXiv:2405.04434, section 2.1)

An adapter on W_UKV, B split into B_K (H, P, r) and B_V (H, V, r), stays low-rank:

    q̃ += s · (q_nope B_K) A             o += s · (õ Aᵀ) B_Vᵀ             DoRA: q_nope and o times g before and after

W_UK and W_UV are views of kv_b_proj's own memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mla_tune.runtime.lora import LoraTensors, Rows, Update, is_adapted
from mla_tune.runtime.rows import row_forward

#: Numbers of a block of scores: queries are taken a few at a time beyond it.
_SCORES = 1 << 22


@dataclass(frozen=True, slots=True)
class _HeadRows:
    """`of` with the heads apart: A (B, r, C) and its transpose, B_K (B, H, P, r), B_V (B, H, r, V), g_K (B, H, 1, P)
    and g_V (B, H, 1, V)."""

    of: Rows
    A: torch.Tensor
    A_T: torch.Tensor
    B_K: torch.Tensor
    B_V: torch.Tensor
    g_K: torch.Tensor | None
    g_V: torch.Tensor | None


class Latent:
    """The absorbed form of `module`, an attention module of transformers with `kv_b_proj` and `expand_kv`."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.P, self.V = module.qk_nope_head_dim, module.v_head_dim
        #: The model's own: keys (B, H, S, P+R) and values (B, H, S, V) of latent and rope key.
        self.expand = module.expand_kv
        self.mode = "auto"
        #: One adapter name for each row of the batch at hand, as PEFT was told; None: those that are active.
        self.names: Sequence[str] | None = None
        self._updates: list[Update] = []
        self._rows: _HeadRows | None = None

    @property
    def lora(self) -> LoraTensors | None:
        """Of kv_b_proj as it is now: adapters may come and go."""
        layer = self.module.kv_b_proj
        return row_forward(layer).tensors if is_adapted(layer) else None

    def listen(self, latent: torch.Tensor) -> None:
        """Ask PEFT which rows have which adapters; latent (B, 1, S, C)."""
        layer = self.module.kv_b_proj
        self.names = row_forward(layer).listen(latent) if is_adapted(layer) else None

    def obstacle(self) -> str:
        """Why this call can't be computed absorbed; empty where it can."""
        lora = self.lora
        base: Any = lora.layer.get_base_layer() if lora else self.module.kv_b_proj
        if lora and (why := lora.obstacle()):
            return why
        if not isinstance(base, nn.Linear) or not base.weight.is_floating_point() or base.weight.dim() != 2:
            return f"kv_b_proj is a {type(base).__name__}"
        if base.weight.element_size() < 2 or hasattr(base, "parametrizations"):
            return "kv_b_proj has no plain weight"
        if base.weight.is_meta:
            return "kv_b_proj is offloaded"
        if base.bias is not None:
            return "kv_b_proj has a bias"
        if lora and self.names is None:
            active = lora.active()
            if len(active) > 1 and any(update.g is not None for update in active):
                return "a DoRA beside another adapter"
        return ""

    def forget(self) -> None:
        """A prompt begins: what is derived from parameters is made anew."""
        if (lora := self.lora) is not None:
            lora.forget()

    def attend(
        self,
        query: torch.Tensor,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        sinks: torch.Tensor | None = None,
        keep_weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(values (B, T, H, V), weights (B, H, T, S) if kept) of query (B, H, T, P+R), latent (B, 1, S, C), k_rope
        (B, 1, S, R), mask (B or 1, 1, T, S): true, or 0, where a key is seen.  `sinks` (H) are scores without a value.
        """
        B, H, T, _ = query.shape
        S = latent.shape[2]
        self._take_adapters()
        q_nope, q_rope = query.split([self.P, query.shape[-1] - self.P], dim=-1)
        latent, k_rope = latent[:, 0], k_rope[:, 0]
        # Of each row and query the H heads are rows of one product: (B, T·H, C) × (B, C, S).
        q = (self.query(q_nope) * scale).transpose(1, 2)
        q_rope = (q_rope * scale).transpose(1, 2)
        step = max(1, _SCORES // (B * H * S))
        parts, kept = [], []
        for first in range(0, T, step):
            last = min(first + step, T)
            scores = torch.bmm(q[:, first:last].reshape(B, -1, q.shape[-1]), latent.mT)
            if k_rope.shape[-1]:
                rope = q_rope[:, first:last].reshape(B, -1, k_rope.shape[-1])
                scores = torch.baddbmm(scores, rope, k_rope.mT)
            scores = scores.view(B, last - first, H, S)
            if mask is not None:
                part = mask[:, :, first:last].transpose(1, 2)
                if part.dtype == torch.bool:  # not by infinity: a row that sees nothing must not be NaN
                    scores = scores.masked_fill(~part, torch.finfo(scores.dtype).min)
                else:
                    scores = scores + part
            weights = _softmax(scores, sinks)
            parts.append(torch.bmm(weights.view(B, -1, S), latent).view(B, last - first, H, -1))
            if keep_weights:
                kept.append(weights)
        summed = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        values = self.value(summed.transpose(1, 2)).transpose(1, 2)
        return values, torch.cat(kept, dim=1).transpose(1, 2) if keep_weights else None

    def query(self, q_nope: torch.Tensor) -> torch.Tensor:
        """q̃ (B, H, T, C) of q_nope (B, H, T, P)."""
        W, updates, rows = self._weight()[:, : self.P], self._updates, self._rows
        for update in updates:
            if update.g is not None:
                q_nope = (q_nope * self._heads(update.g)[:, : self.P].unsqueeze(1)).to(q_nope.dtype)
        if rows is not None and rows.g_K is not None:
            q_nope = (q_nope * rows.g_K).to(q_nope.dtype)
        q = _by_head(q_nope, W)
        for update in updates:
            B_K = self._ranks(update.B)[:, : self.P]
            q = q + (_by_head(q_nope.to(B_K.dtype), B_K) @ (update.A * update.s)).to(q.dtype)
        if rows is not None:
            q = q + _by_row(q_nope.to(rows.B_K.dtype) @ rows.B_K, rows.A).to(q.dtype)
        return q

    def value(self, summed: torch.Tensor) -> torch.Tensor:
        """o (B, H, T, V) of õ (B, H, T, C)."""
        W, updates, rows = self._weight()[:, self.P :], self._updates, self._rows
        o = _by_head(summed, W.mT)
        for update in updates:
            B_V = self._ranks(update.B)[:, self.P :]
            o = o + _by_head(summed.to(B_V.dtype) @ (update.A.mT * update.s), B_V.mT).to(o.dtype)
            if update.g is not None:
                o = (o * self._heads(update.g)[:, self.P :].unsqueeze(1)).to(o.dtype)
        if rows is not None:
            o = o + (_by_row(summed.to(rows.B_V.dtype), rows.A_T) @ rows.B_V).to(o.dtype)
            if rows.g_V is not None:
                o = (o * rows.g_V).to(o.dtype)
        return o

    def _take_adapters(self) -> None:
        """Those that act in this call."""
        lora = self.lora
        self._updates = lora.active() if lora is not None and self.names is None else []
        rows = lora.rows(self.names) if lora is not None and self.names is not None else None
        if rows is None:
            self._rows = None
        elif self._rows is None or self._rows.of is not rows:
            self._rows = self._by_rows(rows)

    def _by_rows(self, rows: Rows) -> _HeadRows:
        B_T = rows.B_T.unflatten(-1, (-1, self.P + self.V)).transpose(1, 2)  # (B, H, r, P+V)
        g = None if rows.g is None else self._heads(rows.g).unsqueeze(2)
        return _HeadRows(
            of=rows,
            A=rows.A_T.mT.contiguous(),
            A_T=rows.A_T,
            B_K=B_T[..., : self.P].mT.contiguous(),
            B_V=B_T[..., self.P :].contiguous(),
            g_K=None if g is None else g[..., : self.P],
            g_V=None if g is None else g[..., self.P :],
        )

    def _weight(self) -> torch.Tensor:
        """W_UKV (H, P+V, C), a view."""
        layer = self.module.kv_b_proj
        weight = (layer.get_base_layer() if is_adapted(layer) else layer).weight
        return weight.view(-1, self.P + self.V, weight.shape[1])

    def _heads(self, g: torch.Tensor) -> torch.Tensor:
        """g (…, H(P+V)) → (…, H, P+V)."""
        return g.unflatten(-1, (-1, self.P + self.V))

    def _ranks(self, B: torch.Tensor) -> torch.Tensor:
        """B (…, H(P+V), r) → (…, H, P+V, r)."""
        return B.unflatten(-2, (-1, self.P + self.V))


def _by_head(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """x (B, H, T, n) times W (H, n, m), each head by its own: (B, H, T, m)."""
    B, H, T, _ = x.shape
    if B == 1:
        return torch.bmm(x[0], W).unsqueeze(0)
    flat = x.transpose(0, 1).reshape(H, B * T, -1)
    return torch.bmm(flat, W).view(H, B, T, -1).transpose(0, 1)


def _by_row(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """x (B, H, T, n) times W (B, n, m), each row of the batch by its own: (B, H, T, m)."""
    B, H, T, n = x.shape
    return torch.bmm(x.reshape(B, H * T, n), W).view(B, H, T, -1)


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Over the keys of scores (B, T, H, S), in float32 at least."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    if sinks is None:
        return torch.softmax(scores, dim=-1, dtype=wide).to(scores.dtype)
    column = sinks.to(wide).view(1, 1, -1, 1).expand(*scores.shape[:3], 1)
    return torch.softmax(torch.cat((scores.to(wide), column), dim=-1), dim=-1)[..., :-1].to(scores.dtype)
