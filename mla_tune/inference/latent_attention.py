"""`LatentAttention`: attention of one MLA module in the latent space, without expanding cached tokens.

    B batch   T queries   S keys   H heads   P qk_nope_head_dim   R qk_rope_head_dim   V v_head_dim   C kv_lora_rank

    q̃[h] = W_UK[h]ᵀ q_nope[h]  (C)     score = (q̃ · c + q_rope · k_rope) · scale
    õ[h] = Σ softmax(score) c   (C)     o[h] = W_UV[h] õ[h]  (V)          (DeepSeek-V2, arXiv:2405.04434, section 2.1)

A LoRA on W_UKV, with B split into B_K (H, P, r) and B_V (H, V, r), stays low-rank:

    q̃ += s · (q_nope B_K) A             o += s · (õ Aᵀ) B_Vᵀ

With DoRA, q_nope is multiplied by its part of g before, and o after (g: see `lora_tensors`).

W_UK and W_UV are views of kv_b_proj's weight, or come from absorbed.safetensors where it has no plain weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mla_tune.inference.absorbed_weights import AbsorbedWeights, base_layer
from mla_tune.inference.batched_lora import ensure_batched_forward
from mla_tune.inference.latent_sdpa import latent_sdpa
from mla_tune.inference.lora_tensors import BatchedLoraFactors, LayerLora, LoraFactors, is_adapted


@dataclass(frozen=True, slots=True)
class _BatchedHeadFactors:
    """The factors of W_UKV with an adapter for each row of the batch, split by head and into K and V."""

    source: BatchedLoraFactors
    """What the other fields were made from."""
    A: torch.Tensor
    """A (B, r, C)."""
    A_T: torch.Tensor
    """Aᵀ (B, C, r)."""
    B_K: torch.Tensor
    """s · B_K (B, H, P, r)."""
    B_V: torch.Tensor
    """s · B_Vᵀ (B, H, r, V)."""
    g_K: torch.Tensor | None
    """g of the keys (B, H, 1, P); None without DoRA."""
    g_V: torch.Tensor | None
    """g of the values (B, H, 1, V); None without DoRA."""


class LatentAttention:
    """The absorbed form of `module`, an attention module of transformers with `kv_b_proj` and `expand_kv`."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.P, self.V = module.qk_nope_head_dim, module.v_head_dim
        #: The model's own `expand_kv`: latent and rope key → keys (B, H, S, P+R) and values (B, H, S, V).
        self.expand = module.expand_kv
        self.mode = "auto"
        #: W_UK and W_UV from absorbed.safetensors, for a kv_b_proj without a plain weight.
        self.stored_weights: AbsorbedWeights | None = None
        #: Why there are none, where there are none.
        self.no_stored_weights_reason = ""
        #: Adapter name of each row of the current batch (`adapter_names` of PEFT); None: the active adapters apply.
        self.names: Sequence[str] | None = None
        #: LoRAs that apply to all rows in the current call.
        self._active: list[LoraFactors] = []
        #: LoRAs that differ by row in the current call.
        self._batched: _BatchedHeadFactors | None = None

    @property
    def lora(self) -> LayerLora | None:
        """The LoRA of kv_b_proj as it is now, because adapters may be added and removed; None without adapters."""
        layer = self.module.kv_b_proj
        return ensure_batched_forward(layer).lora if is_adapted(layer) else None

    def record_adapter_names(self, latent: torch.Tensor) -> None:
        """Find out which adapter PEFT gives to each row of the current batch; `latent` is (B, 1, S, C)."""
        layer = self.module.kv_b_proj
        self.names = ensure_batched_forward(layer).requested_adapter_names(latent) if is_adapted(layer) else None

    def unsupported_reason(self) -> str:
        """Return why the current call can't be computed absorbed, or "" where it can."""
        lora = self.lora
        base = base_layer(self.module)
        if lora and (reason := lora.unsupported_reason()):
            return reason
        if base._parameters.get("bias") is not None:
            return "kv_b_proj has a bias"
        if reason := no_plain_weight_reason(self.module):
            if self.stored_weights is None:
                return reason + (self.no_stored_weights_reason and f", and {self.no_stored_weights_reason}")
            if not self.stored_weights.matches(base.weight):
                return f"{reason}, and has changed since absorbed.safetensors was found to match it"
            if lora and (lora.layer.merged or lora.layer.lora_magnitude_vector):
                also = "adapters are merged into it" if lora.layer.merged else "a DoRA needs the norms of its rows"
                return f"{reason}, and {also}"
        if lora and self.names is None:
            active = lora.active()
            if len(active) > 1 and any(factors.g is not None for factors in active):
                return "a DoRA beside another adapter"
        return ""

    def clear_derived(self) -> None:
        """Drop tensors derived from the adapters' parameters, so that a prompt begins with fresh ones."""
        if (lora := self.lora) is not None:
            lora.clear_derived()

    def attend(
        self,
        query: torch.Tensor,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        *,
        sinks: torch.Tensor | None = None,
        return_weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute attention of `query` (B, H, T, P+R) over `latent` (B, 1, S, C) and `k_rope` (B, 1, S, R).

        `mask` (B or 1, 1, T, S) is true, or 0, where a query sees a key.  `sinks` (H) are scores in the softmax that
        have no value.  Returns the output (B, T, H, V), and the attention weights (B, H, T, S) if asked for.
        """
        self._update_adapters()
        W_UK, W_UV = self.up_projections(query)
        q_nope, q_rope = (query * scale).split([self.P, query.shape[-1] - self.P], dim=-1)
        latent, k_rope = latent.squeeze(1), k_rope.squeeze(1)
        q = self._absorb_query(q_nope, W_UK).transpose(1, 2)
        q_rope = q_rope.transpose(1, 2)
        output, weights = latent_sdpa(q, q_rope, latent, k_rope, mask, sinks, return_weights=return_weights)
        return self._expand_output(output.transpose(1, 2), W_UV).transpose(1, 2), weights

    def _absorb_query(self, q_nope: torch.Tensor, W_UK: torch.Tensor) -> torch.Tensor:
        """Return q̃ (B, H, T, C) for q_nope (B, H, T, P) and W_UK (H, P, C), with the adapters of this call."""
        active, batched = self._active, self._batched
        for lora in active:
            if lora.g is not None:
                q_nope = (q_nope * self._split_heads(lora.g, -1)[:, : self.P].unsqueeze(1)).to(q_nope.dtype)
        if batched is not None and batched.g_K is not None:
            q_nope = (q_nope * batched.g_K).to(q_nope.dtype)
        q = _multiply_by_head(q_nope, W_UK)
        for lora in active:
            B_K = self._split_heads(lora.B, -2)[:, : self.P]
            q = q + (_multiply_by_head(q_nope.to(B_K.dtype), B_K) @ (lora.A * lora.s)).to(q.dtype)
        if batched is not None:
            inner = _multiply_by_row_and_head(q_nope.to(batched.B_K.dtype), batched.B_K)
            q = q + _multiply_by_row(inner, batched.A).to(q.dtype)
        return q

    def _expand_output(self, latent_output: torch.Tensor, W_UV: torch.Tensor) -> torch.Tensor:
        """Return o (B, H, T, V) for õ (B, H, T, C) and W_UV (H, V, C), with the adapters of this call."""
        active, batched = self._active, self._batched
        o = _multiply_by_head(latent_output, W_UV.mT)
        for lora in active:
            B_V = self._split_heads(lora.B, -2)[:, self.P :]
            inner = latent_output.to(B_V.dtype) @ (lora.A.mT * lora.s)
            o = o + _multiply_by_head(inner, B_V.mT).to(o.dtype)
            if lora.g is not None:
                o = (o * self._split_heads(lora.g, -1)[:, self.P :].unsqueeze(1)).to(o.dtype)
        if batched is not None:
            inner = _multiply_by_row(latent_output.to(batched.B_V.dtype), batched.A_T)
            o = o + _multiply_by_row_and_head(inner, batched.B_V).to(o.dtype)
            if batched.g_V is not None:
                o = (o * batched.g_V).to(o.dtype)
        return o

    def _update_adapters(self) -> None:
        """Set `_active` and `_batched` to the adapters that apply in the current call."""
        lora = self.lora
        self._active = lora.active() if lora is not None and self.names is None else []
        factors = lora.batched(self.names) if lora is not None and self.names is not None else None
        if factors is None:
            self._batched = None
        elif self._batched is None or self._batched.source is not factors:
            self._batched = self._split_batched(factors)

    def _split_batched(self, factors: BatchedLoraFactors) -> _BatchedHeadFactors:
        """Split the factors of kv_b_proj by head and into K and V."""
        B_T = self._split_heads(factors.B_T, -1).transpose(1, 2)  # (B, H, r, P+V)
        g = None if factors.g is None else self._split_heads(factors.g, -1).unsqueeze(2)
        return _BatchedHeadFactors(
            source=factors,
            A=factors.A_T.mT.contiguous(),
            A_T=factors.A_T,
            B_K=B_T[..., : self.P].mT.contiguous(),
            B_V=B_T[..., self.P :].contiguous(),
            g_K=None if g is None else g[..., : self.P],
            g_V=None if g is None else g[..., self.P :],
        )

    def up_projections(self, query: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return W_UK (H, P, C) and W_UV (H, V, C).

        They are views of kv_b_proj's weight, or the stored ones, with the device and dtype of `query`.
        """
        if self.stored_weights is not None:
            return self.stored_weights.load_like(query)
        weight = base_layer(self.module).weight
        return weight.view(-1, self.P + self.V, weight.shape[1]).split((self.P, self.V), dim=1)

    def _split_heads(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Split dimension `dim`, of H(P+V) numbers, in two: (H, P+V)."""
        return x.unflatten(dim, (-1, self.P + self.V))


def no_plain_weight_reason(module: Any) -> str:
    """Return why W_UK and W_UV can't be views of the weight of this module's `kv_b_proj`, or "" where they can."""
    base = base_layer(module)
    weight = base._parameters.get("weight")
    if not isinstance(base, nn.Linear) or (weight is not None and not weight.is_floating_point()):
        return f"kv_b_proj is a {type(base).__name__}"
    if weight is None or weight.dim() != 2 or weight.element_size() < 2:  # None: torch's parametrize
        return "kv_b_proj has no plain weight"
    return "kv_b_proj is offloaded" if weight.is_meta else ""


def _multiply_by_head(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """Multiply x (B, H, T, n) with W (H, n, m), one matrix for each head; return (B, H, T, m)."""
    B, H, T, _ = x.shape
    flat = x.squeeze(0) if B == 1 else x.transpose(0, 1).reshape(H, B * T, -1)
    # On a CPU oneDNN multiplies 16-bit matrices, and copies a right factor that is a transposed view.  As a left
    # factor, W.mT has contiguous rows and is not copied, so compute (Wᵀ xᵀ)ᵀ instead.
    transposed = W.device.type == "cpu" and W.element_size() == 2 and W.stride(-1) != 1
    y = torch.bmm(W.mT, flat.mT).mT if transposed else torch.bmm(flat, W)
    return y.unsqueeze(0) if B == 1 else y.view(H, B, T, -1).transpose(0, 1)


def _multiply_by_row(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """Multiply x (B, H, T, n) with W (B, n, m), one matrix for each row of the batch; return (B, H, T, m)."""
    B, H, T, n = x.shape
    return torch.bmm(x.reshape(B, H * T, n), W).view(B, H, T, -1)


def _multiply_by_row_and_head(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """Multiply x (B, H, T, n) with W (B, H, n, m), one matrix for each row and head; return (B, H, T, m)."""
    return torch.bmm(x.flatten(0, 1), W.flatten(0, 1)).unflatten(0, W.shape[:2])
