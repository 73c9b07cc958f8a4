"""Cross-entropy without the logits of all tokens: only trained tokens are scored, a chunk at a time.

With a frozen output head without adapter, the gradient is computed in the forward pass.  With z = (W h + b)/d, capped
to c·tanh(z/c) in some families, and p = softmax(z),

    loss = Σ log Σ exp z − z_target          ∂loss/∂h = Wᵀ (p − 1[target]) / d

so a chunk takes two matrix products, one tile of logits is in memory at a time, and nothing of the head is saved for
the backward pass (as in Liger's fused linear cross entropy, arXiv:2410.10989, section 3.2).  Any other head (trained,
with an adapter, sharded) is called as a module for each chunk, and again in the backward pass.

    N  trained tokens      D  hidden size      K  vocabulary
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mla_tune.data.row_kinds import IGNORED
from mla_tune.tiling import LOGITS_TILE, LOGITS_TILE_MIN_TOKENS
from mla_tune.training.distributed.deepspeed import is_handle

#: Keyword argument that asks a patched model for the loss instead of logits.
KEYWORD = "token_loss"


def use_chunked_loss(model: Any) -> None:
    """Let `model(…, labels=labels, token_loss=True)` return the loss summed over the trained tokens, float32, in nats.

    `model` is a causal LM.  Without the keyword its forward stays as it is.  The forward itself is patched, so that
    wrappers for data-parallel training see an ordinary forward pass.
    """
    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not kwargs.pop(KEYWORD, False):
            return original(*args, **kwargs)
        labels, kwargs["use_cache"] = kwargs.pop("labels"), False
        # Base model and head are looked up at each call, because PEFT and FSDP replace them later.
        hidden = model.base_model(*args, **kwargs).last_hidden_state
        return token_loss(model.get_output_embeddings(), hidden, labels, *scale_and_cap(model))

    model.forward = forward


def scale_and_cap(model: Any) -> tuple[float, float | None]:
    """Return (divisor of the head's input, as MiniCPM3 has; cap of the logits, as Mistral Large has, or None)."""
    config = model.config.get_text_config()
    divisor = getattr(config, "logits_scaling", None)
    return 1.0 if divisor is None else float(divisor), getattr(config, "final_logit_softcapping", None)


def token_loss(
    head: torch.nn.Module,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    divisor: float = 1.0,
    cap: float | None = None,
) -> torch.Tensor:
    """Cross entropy summed over trained tokens: hidden (B, T, D), labels (B, T) with -100 where nothing is trained.

    Token i is predicted from the hidden state of token i - 1; labels[:, 0] is never used.
    """
    is_trained = labels[:, 1:] != IGNORED
    chosen, targets = hidden[:, :-1][is_trained], labels[:, 1:][is_trained]
    if divisor != 1.0:
        chosen = chosen / divisor
    tile = LOGITS_TILE.get(hidden.device.type, LOGITS_TILE["cuda"])
    if _is_frozen(head):
        step = max(LOGITS_TILE_MIN_TOKENS, tile // head.weight.shape[0])  # type: ignore[union-attr, arg-type, index]
        weight, bias = head.weight, head.bias
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            chosen = chosen.to(torch.get_autocast_dtype(device))
        return _FrozenHead.apply(chosen, weight, bias, targets, cap, step)  # type: ignore[no-any-return]
    step = max(LOGITS_TILE_MIN_TOKENS, tile // int(getattr(head, "out_features", 1 << 15)))
    # Depends on the model even without trained tokens, so that the gradient of such a batch is zero and not missing.
    total = chosen.float().sum() * 0.0
    # Without trained tokens the head is called with an empty chunk: all processes gather a sharded head together.
    tiles = list(zip(chosen.split(step), targets.split(step), strict=True))
    if is_handle(next(head.parameters())):
        # ZeRO-3 gathers the head at every call, so all processes must call it equally often.
        tiles += [(chosen[:0], targets[:0])] * (_maximum_of_processes(len(tiles), hidden.device) - len(tiles))
    for h, y in tiles:
        total = total + checkpoint(_through_module, head, h, y, cap, use_reentrant=False)
    return total


def _maximum_of_processes(count: int, device: torch.device) -> int:
    """Return the largest `count` of all processes."""
    box = torch.tensor(count, device=device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box)


def _through_module(head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor, cap: float | None) -> Any:
    """Summed loss of one chunk, with the head called as a module."""
    logits = head(hidden).float()
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return F.cross_entropy(logits, targets, reduction="sum")


def _is_frozen(head: Any) -> bool:
    """Return whether the head is a plain linear layer that is not trained and whose weight is in this process.

    A layer with hooks does not count, because a hook may gather its weight.
    """
    return (
        type(head) is torch.nn.Linear
        and type(head.weight) is torch.nn.Parameter
        and head.weight.numel() > 0
        and head.weight.is_floating_point()
        and not any(p.requires_grad for p in head.parameters())
        and not head._forward_pre_hooks
        and not head._forward_hooks
    )


class _FrozenHead(torch.autograd.Function):
    """hidden (N, D), weight (K, D), bias (K) or None, targets (N) → summed loss, float32; `step` tokens at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, bias: Any, targets: Any, cap: float | None, step: int) -> Any:
        needs_grad = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grads = torch.empty_like(hidden) if needs_grad else None
        weight = weight.to(hidden.dtype)
        for start in range(0, len(hidden), step):
            h, y = hidden[start : start + step], targets[start : start + step, None]
            z = F.linear(h, weight, None if bias is None else bias.to(h.dtype)).float()
            slope = None
            if cap is not None:
                z = z.div_(cap).tanh_()
                if needs_grad:
                    slope = 1 - z * z
                z.mul_(cap)
            log_p = torch.log_softmax(z, -1)
            del z
            total -= log_p.gather(-1, y).sum()
            if grads is not None:
                p = log_p.exp_()
                p.scatter_add_(-1, y, torch.full_like(y, -1, dtype=p.dtype))
                if slope is not None:
                    p.mul_(slope)
                torch.mm(p.to(h.dtype), weight, out=grads[start : start + step])
        ctx.grads = grads
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        grads, ctx.grads = ctx.grads, None
        return grads.mul_(grad.to(grads.dtype)), None, None, None, None, None
