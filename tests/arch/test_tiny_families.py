"""The tiny models of `tests/helpers/tiny_families.py` have the properties that other tests rely on.

Only transformers is tested here, no code of mla-tune.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.helpers.marks import fast_families
from tests.helpers.tiny_families import FAMILIES, TOPK, WINDOW, mla_modules, text_model, tiny, vocabulary

LENGTH = 16
# MLA modules of each family.  longcat_flash has two in each layer; hybrid families have further layers without MLA.
MODULES = dict.fromkeys(FAMILIES, 3) | {
    "bailing_hybrid": 2,
    "dots3_note": 4,
    "dots3_note_towers": 4,
    "glm5_next": 4,
    "glm_moe_dsa": 4,
    "hy_v4": 4,
    "kimi_linear": 2,
    "longcat_flash": 4,
    "mistral_large4": 6,
}
# Layers with an indexer of their own.  Other layers of glm_moe_dsa, hy_v4, glm5_next and mistral_large4 use the tokens
# that an earlier layer's indexer chose.
INDEXERS = {
    "axk2": 3,
    "deepseek_v32": 3,
    "dots3_note": 2,
    "dots3_note_towers": 2,
    "glm5_next": 2,
    "glm_moe_dsa": 2,
    "hy_v4": 2,
    "mistral_large4": 4,
}
# Families that scale a query by its absolute position.  `generate` counts positions from the first real token; a plain
# forward pass of a left-padded row counts padding too, which changes the logits of these families.
ABSOLUTE = {"mistral4", "mistral3", "mistral_large4"}
SMALL = 1e-4
every = pytest.mark.parametrize("name", FAMILIES)


@cache
def model(name: str) -> PreTrainedModel:
    return tiny(name)


def tokens(name: str, length: int = LENGTH) -> Tensor:
    return torch.randint(0, vocabulary(name), (1, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(name: str, ids: Tensor | None = None, **inputs: Any) -> Tensor:
    return model(name)(input_ids=tokens(name) if ids is None else ids, **inputs).logits


def generated(name: str, ids: Tensor, count: int, **inputs: Any) -> Tensor:
    """The `count` tokens that greedy decoding adds."""
    network: Any = model(name)
    return network.generate(ids, max_new_tokens=count, do_sample=False, **inputs)[:, ids.shape[1] :]


def difference(a: Tensor, b: Tensor) -> float:
    """Return the largest relative difference between the logits of a and b, over all positions."""
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())


@contextmanager
def perturbed(tensor: Tensor, size: float = 0.1) -> Iterator[None]:
    kept = tensor.detach().clone()
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5))
    tensor.data.add_(size * noise)
    try:
        yield
    finally:
        tensor.data.copy_(kept)


def indexers(name: str) -> list[nn.Module]:
    return [m for n, m in model(name).named_modules() if n.endswith(".indexer")]


@every
def test_has_mla_modules(name: str) -> None:
    found = mla_modules(text_model(model(name)))
    assert len(found) == len(mla_modules(model(name))) == MODULES[name], "an MLA module lies outside of the decoder"
    assert len(indexers(name)) == INDEXERS.get(name, 0)


@every
def test_sizes_of_a_module_differ(name: str) -> None:
    module: Any
    for module in mla_modules(model(name)).values():
        p, r, v, c = module.qk_nope_head_dim, module.qk_rope_head_dim, module.v_head_dim, module.kv_lora_rank
        hidden, joined = module.o_proj.weight.shape
        heads = joined // v
        assert module.kv_b_proj.weight.shape == (heads * (p + v), c)
        sizes = [heads, p, v, c, hidden, p + v, heads * v, heads * (p + v), heads * (p + r)]
        sizes += [r, p + r, c + r] if r else []  # glm5_next has no rope at all
        assert len(set(sizes)) == len(sizes), sizes


@fast_families()
@every
def test_logits_depend_on_every_mla_module(name: str) -> None:
    before = logits(name)
    assert before.shape == (1, LENGTH, vocabulary(name))
    assert before.isfinite().all()
    assert before.std() > 0.5, "logits are almost equal"
    for path, module in mla_modules(model(name)).items():
        with perturbed(module.get_submodule("kv_b_proj").get_parameter("weight"), 0.05):
            assert difference(logits(name), before) > 100 * SMALL, path
    torch.testing.assert_close(logits(name), before, rtol=0, atol=0)


@fast_families()
@every
def test_every_weight_matters(name: str) -> None:
    """All weights of the decoder get a gradient, except for those that only select (indexers, correction biases of
    routers); changing one of these changes the logits."""
    network, ids = model(name), tokens(name, 48)
    network.zero_grad()
    before = network(input_ids=ids).logits
    (before * torch.randn(before.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    decoder = text_model(network)
    selecting = {n: b for n, b in decoder.named_buffers() if n.endswith("e_score_correction_bias")}
    for path, weight in decoder.named_parameters():
        if ".indexer." in path:
            selecting[path] = weight
        else:
            assert weight.grad is not None, path
            assert weight.grad.abs().max() > 1e-6, path
            if path.endswith("experts.down_proj"):
                assert weight.grad.abs().amax((1, 2)).min() > 1e-6, "an expert without tokens"
    network.zero_grad()
    for path, tensor in selecting.items():
        with perturbed(tensor, 1.0):
            assert difference(logits(name, ids), before.detach()) > 100 * SMALL, path


@fast_families()
@every
def test_cached_steps_are_a_full_forward(name: str) -> None:
    ids, network = tokens(name), model(name)
    for prompt in (1, 9):
        with torch.no_grad():
            out = network(input_ids=ids[:, :prompt], use_cache=True)
            steps = [out.logits]
            for i in range(prompt, LENGTH):
                out = network(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
                steps.append(out.logits)
        assert difference(torch.cat(steps, 1), logits(name)) < SMALL, prompt


@every
def test_the_cache_is_latent(name: str) -> None:
    """Each module caches C + R numbers a token, or none where it reads another layer's."""
    caches = model(name)(input_ids=tokens(name), use_cache=True).past_key_values.layers
    module: Any  # nn.Module hides the fields of its subclasses
    for module in mla_modules(model(name)).values():
        layer = caches[module.layer_idx]
        if getattr(module, "is_kv_shared_layer", False):
            assert getattr(layer, "keys", None) is None
        else:
            assert layer.keys.shape[1::2] == (1, module.kv_lora_rank)
            assert layer.values.shape[1::2] == (1, module.qk_rope_head_dim)


@fast_families()
@every
def test_generate_is_greedy(name: str) -> None:
    ids = tokens(name)
    new = generated(name, ids, 4)
    assert new.shape == (1, 4)
    assert new.equal(logits(name, torch.cat([ids, new[:, :-1]], 1))[:, LENGTH - 1 :].argmax(-1))


@fast_families()
@every
def test_left_padding(name: str) -> None:
    long = tokens(name)
    short = long[:, 2:13]
    pad = LENGTH - short.shape[1]
    batch = torch.cat([long, nn.functional.pad(short, (pad, 0), value=7)])
    mask = torch.ones_like(batch)
    mask[1, :pad] = 0
    alone = torch.cat([logits(name, long)[:, -1], logits(name, short)[:, -1]])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    assert difference(logits(name, batch, attention_mask=mask, position_ids=positions)[:, -1], alone) < SMALL
    without = difference(logits(name, batch, attention_mask=mask)[:, -1], alone)
    assert without > 100 * SMALL if name in ABSOLUTE else without < SMALL
    rows = torch.cat([generated(name, long, 3), generated(name, short, 3)])
    assert generated(name, batch, 3, attention_mask=mask).equal(rows)


@pytest.mark.parametrize("name", INDEXERS)
def test_indexers_cut_keys_off(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = logits(name)
    for indexer in indexers(name):
        monkeypatch.setattr(indexer, "index_topk", 2 * LENGTH)
    after = logits(name)
    assert difference(after[:, :TOPK], before[:, :TOPK]) < SMALL, "nothing to cut off yet"
    assert difference(after[:, TOPK + 2 :], before[:, TOPK + 2 :]) > 100 * SMALL


def test_sliding_windows_cut_keys_off(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "dots3_note"
    modules = mla_modules(model(name)).values()
    assert [getattr(m, "sliding_window", None) for m in modules] == [None, WINDOW, WINDOW, None]
    shapes = {m.get_submodule("kv_b_proj").get_parameter("weight").shape for m in modules}
    assert len(shapes) == 2, "sliding layers have sizes of their own"
    narrow = logits(name)
    monkeypatch.setattr(model(name).config, "sliding_window", LENGTH)
    wide = logits(name)
    assert difference(wide[:, :WINDOW], narrow[:, :WINDOW]) < SMALL
    assert difference(wide[:, WINDOW:], narrow[:, WINDOW:]) > 100 * SMALL


@fast_families()
@every
def test_seed_and_dtype(name: str) -> None:
    weights, again = model(name).state_dict(), tiny(name).state_dict()
    assert all(w.equal(again[n]) for n, w in weights.items())
    other = tiny(name, seed=1).state_dict()
    assert not any(w.equal(other[n]) for n, w in weights.items())
    low = tiny(name, torch.bfloat16)
    assert all(w.equal(weights[n].to(w.dtype)) for n, w in low.state_dict().items())
    assert {w.dtype for w in low.state_dict().values()} <= {torch.bfloat16, torch.float32}
    with torch.no_grad():
        assert low(input_ids=tokens(name)).logits.isfinite().all()
