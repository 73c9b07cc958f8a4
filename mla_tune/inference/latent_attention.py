"""Attention of one module in the latent space: scores and values without expanding a cached token.

    B batch   T queries   S keys   H heads   P qk_nope_head_dim   R qk_rope_head_dim   V v_head_dim   C kv_lora_rank

    q̃[h] = W_UK[h]ᵀ q_nope[h]  (C)     score = (q̃ · c + q_rope · k_rope) · scale
    õ[h] = Σ softmax(score) c   (C)     o[h] = W_UV[h] õ[h]  (V)          (DeepSeek-V2, arXiv:2405.04434, section 2.1)

An adapter on W_UKV, B split into B_K (H, P, r) and B_V (H, V, r), stays low-rank:

    q̃ += s · (q_nope B_K) A             o += s · (õ Aᵀ) B_Vᵀ             DoRA: q_nope and o times g before and after

W_UK and W_UV are views of kv_b_proj's own memory, or `stored` ones where it has no plain weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mla_tune.inference.absorbed_weights import AbsorbedWeights, base_layer
from mla_tune.inference.batched_lora import batched_lora_forward
from mla_tune.inference.latent_sdpa import latent_sdpa
from mla_tune.inference.lora_tensors import BatchedLoraFactors, LayerLora, LoraFactors, is_adapted


@dataclass(frozen=True, slots=True)
class _HeadRows:
    """`of` with the heads apart: A (B, r, C) and its transpose, B_K (B, H, P, r), B_V (B, H, r, V), g_K (B, H, 1, P)
    and g_V (B, H, 1, V)."""

    of: BatchedLoraFactors
    A: torch.Tensor
    A_T: torch.Tensor
    B_K: torch.Tensor
    B_V: torch.Tensor
    g_K: torch.Tensor | None
    g_V: torch.Tensor | None


class LatentAttention:
    """The absorbed form of `module`, an attention module of transformers with `kv_b_proj` and `expand_kv`."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.P, self.V = module.qk_nope_head_dim, module.v_head_dim
        #: The model's own: keys (B, H, S, P+R) and values (B, H, S, V) of latent and rope key.
        self.expand = module.expand_kv
        self.mode = "auto"
        #: W_UK and W_UV from a file, for a kv_b_proj without a plain weight; or why there are none.
        self.stored: AbsorbedWeights | None = None
        self.not_stored = ""
        #: One adapter name for each row of the batch at hand, as PEFT was told; None: those that are active.
        self.names: Sequence[str] | None = None
        self._updates: list[LoraFactors] = []
        self._rows: _HeadRows | None = None

    @property
    def lora(self) -> LayerLora | None:
        """Of kv_b_proj as it is now: adapters may come and go."""
        layer = self.module.kv_b_proj
        return batched_lora_forward(layer).tensors if is_adapted(layer) else None

    def listen(self, latent: torch.Tensor) -> None:
        """Ask PEFT which rows have which adapters; latent (B, 1, S, C)."""
        layer = self.module.kv_b_proj
        self.names = batched_lora_forward(layer).listen(latent) if is_adapted(layer) else None

    def unsupported_reason(self) -> str:
        """Why this call can't be computed absorbed; empty where it can."""
        lora = self.lora
        base = base_layer(self.module)
        if lora and (why := lora.unsupported_reason()):
            return why
        if base._parameters.get("bias") is not None:
            return "kv_b_proj has a bias"
        if why := no_plain_weight(self.module):
            if self.stored is None:
                return why + (self.not_stored and f", and {self.not_stored}")
            if not self.stored.matches(base.weight):
                return f"{why}, and has changed since absorbed.safetensors was found to fit"
            if lora and (lora.layer.merged or lora.layer.lora_magnitude_vector):
                what = "adapters are merged into it" if lora.layer.merged else "a DoRA needs the norms of its rows"
                return f"{why}, and {what}"
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
        self._take_adapters()
        W_UK, W_UV = self.weights(query)
        q_nope, q_rope = (query * scale).split([self.P, query.shape[-1] - self.P], dim=-1)
        latent, k_rope = latent.squeeze(1), k_rope.squeeze(1)
        q = self.query(q_nope, W_UK).transpose(1, 2)
        q_rope = q_rope.transpose(1, 2)
        summed, weights = latent_sdpa(q, q_rope, latent, k_rope, mask, sinks, keep_weights)
        return self.value(summed.transpose(1, 2), W_UV).transpose(1, 2), weights

    def query(self, q_nope: torch.Tensor, W_UK: torch.Tensor) -> torch.Tensor:
        """q̃ (B, H, T, C) of q_nope (B, H, T, P) and W_UK (H, P, C)."""
        updates, rows = self._updates, self._rows
        for update in updates:
            if update.g is not None:
                q_nope = (q_nope * self._heads(update.g)[:, : self.P].unsqueeze(1)).to(q_nope.dtype)
        if rows is not None and rows.g_K is not None:
            q_nope = (q_nope * rows.g_K).to(q_nope.dtype)
        q = _by_head(q_nope, W_UK)
        for update in updates:
            B_K = self._ranks(update.B)[:, : self.P]
            q = q + (_by_head(q_nope.to(B_K.dtype), B_K) @ (update.A * update.s)).to(q.dtype)
        if rows is not None:
            q = q + _by_row(_by_both(q_nope.to(rows.B_K.dtype), rows.B_K), rows.A).to(q.dtype)
        return q

    def value(self, summed: torch.Tensor, W_UV: torch.Tensor) -> torch.Tensor:
        """o (B, H, T, V) of õ (B, H, T, C) and W_UV (H, V, C)."""
        updates, rows = self._updates, self._rows
        o = _by_head(summed, W_UV.mT)
        for update in updates:
            B_V = self._ranks(update.B)[:, self.P :]
            o = o + _by_head(summed.to(B_V.dtype) @ (update.A.mT * update.s), B_V.mT).to(o.dtype)
            if update.g is not None:
                o = (o * self._heads(update.g)[:, self.P :].unsqueeze(1)).to(o.dtype)
        if rows is not None:
            o = o + _by_both(_by_row(summed.to(rows.B_V.dtype), rows.A_T), rows.B_V).to(o.dtype)
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

    def _by_rows(self, rows: BatchedLoraFactors) -> _HeadRows:
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

    def weights(self, like: torch.Tensor) -> Sequence[torch.Tensor]:
        """W_UK (H, P, C) and W_UV (H, V, C) to multiply with `like`: views of kv_b_proj's memory, or stored ones."""
        if self.stored is not None:
            return self.stored.take(like)
        weight = base_layer(self.module).weight
        return weight.view(-1, self.P + self.V, weight.shape[1]).split((self.P, self.V), dim=1)

    def _heads(self, g: torch.Tensor) -> torch.Tensor:
        """g (…, H(P+V)) → (…, H, P+V)."""
        return g.unflatten(-1, (-1, self.P + self.V))

    def _ranks(self, B: torch.Tensor) -> torch.Tensor:
        """B (…, H(P+V), r) → (…, H, P+V, r)."""
        return B.unflatten(-2, (-1, self.P + self.V))


def no_plain_weight(module: Any) -> str:
    """Why W_UK and W_UV can't be views of the weight of this module's `kv_b_proj`; empty where they can."""
    base = base_layer(module)
    weight = base._parameters.get("weight")
    if not isinstance(base, nn.Linear) or (weight is not None and not weight.is_floating_point()):
        return f"kv_b_proj is a {type(base).__name__}"
    if weight is None or weight.dim() != 2 or weight.element_size() < 2:  # None: it is computed (parametrized)
        return "kv_b_proj has no plain weight"
    return "kv_b_proj is offloaded" if weight.is_meta else ""


def _by_head(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """x (B, H, T, n) times W (H, n, m), each head by its own: (B, H, T, m)."""
    B, H, T, _ = x.shape
    flat = x.squeeze(0) if B == 1 else x.transpose(0, 1).reshape(H, B * T, -1)
    # oneDNN, which multiplies 16 bits on a CPU, copies a matrix whose rows are not its memory's: W.mT stands first.
    turned = W.device.type == "cpu" and W.element_size() == 2 and W.stride(-1) != 1
    y = torch.bmm(W.mT, flat.mT).mT if turned else torch.bmm(flat, W)
    return y.unsqueeze(0) if B == 1 else y.view(H, B, T, -1).transpose(0, 1)


def _by_row(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """x (B, H, T, n) times W (B, n, m), each row of the batch by its own: (B, H, T, m)."""
    B, H, T, n = x.shape
    return torch.bmm(x.reshape(B, H * T, n), W).view(B, H, T, -1)


def _by_both(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """x (B, H, T, n) times W (B, H, n, m): (B, H, T, m)."""
    return torch.bmm(x.flatten(0, 1), W.flatten(0, 1)).unflatten(0, W.shape[:2])
