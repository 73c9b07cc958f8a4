"""The loss by chunks against stock logits and stock cross entropy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mla_tune.training.kernels import chunked_loss as token_loss_module
from mla_tune.training.kernels.chunked_loss import token_loss, use_chunked_loss
from tests.helpers.marks import fast_families
from tests.helpers.tiny_families import FAMILIES, tiny, vocabulary


def batch_of(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary(name), (3, 40), generator=generator)
    labels = ids.clone()
    labels[torch.rand(ids.shape, generator=generator) < 0.4] = -100
    return ids, labels


def stock_loss(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, and a last one that is shorter."""
    monkeypatch.setattr(token_loss_module, "LOGITS_TILE", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(token_loss_module, "LOGITS_TILE_MIN_TOKENS", 13)


@fast_families()
@pytest.mark.parametrize("head", ["frozen", "trained", "adapted"])
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_the_stock_ones(name: str, head: str) -> None:
    model: Any = tiny(name).train()
    if head == "adapted":
        config = LoraConfig(r=3, target_modules=["lm_head", "o_proj"], init_lora_weights=False)
        model = get_peft_model(model, config)
    inner = model.get_base_model() if head == "adapted" else model
    if head == "frozen":
        inner.get_output_embeddings().requires_grad_(False)
    ids, labels = batch_of(name)
    wanted = stock_loss(model, ids, labels)
    wanted.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    here = [n for n in grads if "lm_head" in n or (n == "model.embed_tokens.weight" and name in ("minicpm3", "youtu"))]
    assert bool(here) == (head != "frozen")
    model.zero_grad()
    use_chunked_loss(inner)
    found = model(input_ids=ids, labels=labels, token_loss=True)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    (found * 0.5).backward()  # a loss scale must reach the gradients
    named = dict(model.named_parameters())
    for n, g in grads.items():
        scale = g.abs().max().clamp(min=1e-3)
        assert (2 * named[n].grad - g).abs().max() <= 1e-4 * scale, n


def test_logits_are_what_they_were_without_the_keyword() -> None:
    model = tiny("deepseek_v3")
    ids, _ = batch_of("deepseek_v3")
    before = model(input_ids=ids).logits
    use_chunked_loss(model)
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("cap, divisor", [(None, 1.0), (2.0, 1.0), (3.0, 2.5)])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_caps_and_divisors_in_float64(cap: float | None, divisor: float, frozen: bool, bias: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    head = torch.nn.Linear(16, 50, bias=bias).double().requires_grad_(not frozen)
    hidden = torch.randn(2, 30, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 50, (2, 30), generator=generator)
    labels[0, 5:9] = -100
    logits = head(hidden / divisor)
    logits = cap * torch.tanh(logits / cap) if cap else logits
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    (grad,) = torch.autograd.grad(wanted, hidden)
    found = token_loss(head, hidden, labels, divisor, cap)
    (ours,) = torch.autograd.grad(found, hidden)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    torch.testing.assert_close(ours, grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_batch_without_trained_tokens_has_a_gradient_of_zero(frozen: bool) -> None:
    head = torch.nn.Linear(8, 20, bias=False).requires_grad_(not frozen)
    hidden = torch.randn(1, 5, 8, requires_grad=True)
    loss = token_loss(head, hidden, torch.full((1, 5), -100))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_no_tensor_of_all_logits_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The widest tensor of forward and backward is a tile."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Widest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor) and t.ndim == 2 and t.shape[-1] == 4000:
                    Widest.seen = max(Widest.seen, t.shape[0])
            return out

    head = torch.nn.Linear(8, 4000, bias=False).requires_grad_(False)
    hidden = torch.randn(1, 500, 8, requires_grad=True)
    labels = torch.randint(0, 4000, (1, 500))
    with Widest():
        token_loss(head, hidden, labels).backward()
    assert 0 < Widest.seen <= 13
