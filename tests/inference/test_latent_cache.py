"""`LatentCache` against transformers' `DynamicCache`: the same tensors after the same calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import mla_tune
from mla_tune.inference import latent_sdpa as latent
from mla_tune.inference.absorb import mla_modules
from mla_tune.inference.latent_cache import LatentCache, PreallocatedLayer, joined_rows
from mla_tune.inference.lora_tensors import BASE
from tests.helpers.inference import NAMES, adapt, build, generate, ids, logits, merged, near, stepped
from tests.helpers.marks import fast_families
from tests.helpers.tiny_families import tiny


def tokens(count: int, seed: int, rows: int = 2, R: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 1, count, 8, generator=numbers), torch.randn(rows, 1, count, R, generator=numbers)


def same(a: Any, b: Any) -> bool:
    return all(
        torch.equal(x.keys, y.keys) and torch.equal(x.values, y.values) for x, y in zip(a.layers, b.layers, strict=True)
    )


def more(cache: Any, count: int, seed: int) -> None:
    layer = cache.layers[0]
    cache.update(*tokens(count, seed, layer.keys.shape[0], layer.values.shape[-1]), 0)


def narrow(cache: Any) -> None:
    """Keep only the first row, as a view."""
    layer = cache.layers[0]
    layer.keys, layer.values = layer.keys[:1], layer.values[:1]


STEPS: dict[str, Callable[[Any], object]] = {
    "one": lambda c: more(c, 1, 1),
    "many": lambda c: more(c, 90, 2),
    "crop": lambda c: c.crop(-3),
    "beams": lambda c: c.reorder_cache(torch.arange(c.layers[0].keys.shape[0]).flip(0)),
    "repeat": lambda c: c.batch_repeat_interleave(2),
    "choose": lambda c: c.batch_select_indices(torch.tensor([0])),
    "narrow": narrow,
}


@torch.no_grad()
@pytest.mark.parametrize("first", STEPS)
@pytest.mark.parametrize("second", STEPS)
@pytest.mark.parametrize("R", [4, 0])
def test_the_same_tensors(R: int, first: str, second: str) -> None:
    config = build().config
    config.num_hidden_layers = 1
    ours, stock = LatentCache(config=config), DynamicCache(config=config)
    for cache in (ours, stock):
        cache.update(*tokens(7, 0, R=R), 0)
        for name in ("one", first, "one", second, "one", "many", "crop", "one"):
            STEPS[name](cache)
    assert same(ours, stock)
    assert ours.get_seq_length() == stock.get_seq_length()


@torch.no_grad()
@pytest.mark.parametrize("R", [4, 0])
def test_a_new_token_does_not_copy_the_cached_ones(R: int) -> None:
    """R = 0 is a model without rope keys (glm5_next)."""
    layer = PreallocatedLayer()
    keys, values = layer.update(*tokens(100, 0, R=R))
    place = keys.data_ptr()
    for i in range(64):
        keys, values = layer.update(*tokens(1, i, R=R))
    assert keys.data_ptr() == place
    assert keys.untyped_storage().nbytes() == 2 * (8 + R) * 4 * (100 + 64)
    assert keys.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()
    keys, values = layer.update(*tokens(1, 99, R=R))
    assert keys.data_ptr() != place
    assert (keys.shape, values.shape) == ((2, 1, 165, 8), (2, 1, 165, R))


@torch.no_grad()
def test_a_copy_is_independent() -> None:
    """A copied prefix can be continued in several ways."""
    config = build().config
    prefix = LatentCache(config=config)
    for i in range(len(prefix.layers)):
        prefix.update(*tokens(9, i), i)
    one, other = copy.deepcopy(prefix), copy.deepcopy(prefix)
    for i in range(len(prefix.layers)):
        one.update(*tokens(2, 50 + i), i)
        other.update(*tokens(2, 70 + i), i)
        assert torch.equal(one.layers[i].keys[..., -2:, :], tokens(2, 50 + i)[0])
        assert torch.equal(other.layers[i].keys[..., -2:, :], tokens(2, 70 + i)[0])
    assert prefix.get_seq_length() == 9


@torch.no_grad()
def test_reset_and_use_again() -> None:
    layer = PreallocatedLayer()
    layer.update(*tokens(5, 0))
    layer.reset()
    keys, _ = layer.update(*tokens(3, 1, rows=4))
    assert torch.equal(keys, tokens(3, 1, rows=4)[0])


@fast_families()
@pytest.mark.parametrize("family", NAMES)
def test_decoding(family: str) -> None:
    """Cached steps, greedy decoding and beams give the same, also in families that cache something else too."""
    model = tiny(family)
    steps, text, beams = stepped(model, ids()), generate(model, ids()), generate(model, ids(), 8, num_beams=3)
    with mla_tune.absorb(model, "absorbed"):
        assert near(stepped(model, ids(), cache=LatentCache(config=model.config)), steps)
        assert torch.equal(generate(model, ids(), past_key_values=LatentCache(config=model.config)), text)
        found = generate(model, ids(), 8, num_beams=3, past_key_values=LatentCache(config=model.config))
        assert torch.equal(found, beams)


@pytest.mark.parametrize("threads", [1, 64])
@pytest.mark.parametrize("family", ["deepseek_v3", "longcat_flash", "minicpm3"])
def test_float64(family: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention over rows of the cache, fused and (with more threads than that has use for) by products: one prompt,
    one token, a few."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    model = build(family, torch.float64)
    first = next(mla_modules(model))
    found: list[torch.Tensor] = []
    first.register_forward_hook(lambda _m, _a, out: found.append(out[0]))

    def steps(cache: Any) -> list[torch.Tensor]:
        found.clear()
        for part in ids().split((7, 1, 4, 2), dim=1):
            logits(model, part, past_key_values=cache)
        return list(found)

    right = steps(DynamicCache(config=model.config))
    fused: list[int] = []
    real = latent._fused_sdpa
    monkeypatch.setattr(latent, "_fused_sdpa", lambda q, *rest: fused.append(q.shape[1]) or real(q, *rest))
    with mla_tune.absorb(model, "absorbed"):
        ours = steps(LatentCache(config=model.config))
    for a, b in zip(ours, right, strict=True):
        assert 0 < (a - b).abs().max() <= 1e-12 * b.abs().max()
    assert bool(fused) == (threads == 1)


def test_rows_of_left_padding() -> None:
    """Fused attention with a mask in which some queries see no key."""
    model = build()
    tokens, mask = ids(), torch.ones(2, 14, dtype=torch.long)
    tokens[0, :6], mask[0, :6] = 0, 0
    right = generate(model, tokens, attention_mask=mask)
    with mla_tune.absorb(model, "absorbed"):
        cache = LatentCache(config=model.config)
        assert torch.equal(generate(model, tokens, attention_mask=mask, past_key_values=cache), right)


def test_joined_rows() -> None:
    """`joined_rows` returns a view only where latent and rope key lie side by side."""
    memory = torch.arange(2 * 9 * 7.0).view(2, 9, 7)
    latent_, k_rope = memory[:, :5, :4], memory[:, :5, 4:]
    rows = joined_rows(latent_, k_rope)
    assert rows is not None
    assert torch.equal(rows, memory[:, :5])
    assert joined_rows(latent_.contiguous(), k_rope.contiguous()) is None
    assert joined_rows(memory[:, :5, :4], memory[:, 1:6, 4:]) is None
    assert joined_rows(memory[:, :5, :3], memory[:, :5, 4:]) is None
    assert joined_rows(latent_, k_rope[..., :0]) is latent_


@pytest.mark.parametrize("kind", [LatentCache, DynamicCache])
def test_a_cached_prefix_and_a_cold_one(kind: Any) -> None:
    """Rows with adapters of their own: a prefix that was read once gives the text of one that is read each time, and
    each row that of its own merged model."""
    model = adapt(build(), "x", "y")
    names, tokens = ["x", BASE, "y"], ids(3)
    right = torch.cat([generate(merged(model, n), tokens[i : i + 1], 12) for i, n in enumerate(names)])
    with mla_tune.absorb(model, "absorbed"):
        prefix = kind(config=model.config)
        logits(model, tokens[:, :9], past_key_values=prefix, adapter_names=names)
        for _ in range(2):
            cache = copy.deepcopy(prefix)
            warm = generate(model, tokens, 12, past_key_values=cache, adapter_names=names)
            cold = generate(model, tokens, 12, past_key_values=kind(config=model.config), adapter_names=names)
            assert torch.equal(warm, right)
            assert torch.equal(cold, right)


def test_assisted_decoding_crops() -> None:
    model, draft = build(), build(num_hidden_layers=2)
    right = generate(model, ids(1))
    with mla_tune.absorb(model):
        cache = LatentCache(config=model.config)
        assert torch.equal(generate(model, ids(1), assistant_model=draft, past_key_values=cache), right)


def test_gradients() -> None:
    """Through a cache that grows while gradients are recorded: those of `DynamicCache`.  Of queries alone, too: then
    no key asks for a gradient, and all are needed."""
    grads = []
    for kind in (LatentCache, DynamicCache):
        model = build(num_hidden_layers=1).requires_grad_(False)
        model.model.layers[0].self_attn.q_b_proj.requires_grad_(True)
        mla_tune.absorb(model, "absorbed")
        cache = kind(config=model.config)
        first = model(input_ids=ids()[:, :6], past_key_values=cache).logits
        second = model(input_ids=ids()[:, 6:], past_key_values=cache).logits
        (first.square().mean() + second.square().mean()).backward()
        grads.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    assert len(grads[1]) == 1
    for key, grad in grads[1].items():
        assert torch.equal(grads[0][key], grad), key


def test_inference_mode_then_not() -> None:
    model = build()
    right = stepped(model, ids())
    cache = LatentCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=ids()[:, :5], past_key_values=cache)
    rest = torch.cat([logits(model, t, past_key_values=cache) for t in ids()[:, 5:].split(1, dim=1)], dim=1)
    assert near(rest, right[:, 5:])
