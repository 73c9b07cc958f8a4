"""Absorbed attention against stock transformers, and unmerged adapters against PEFT's merge.

The oracles are the same models before `absorb`, and models that PEFT has merged.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import DynamicCache, StaticCache

import mla_tune
import mla_tune.inference.attention_interface as attention
from mla_tune.errors import InputError, NotMLAError
from mla_tune.inference.absorb import is_absorbed, mla_modules, unsupported_reasons
from mla_tune.inference.latent_attention import LatentAttention
from mla_tune.inference.lora_tensors import BASE, LayerLora
from tests.helpers.inference import (
    ATTENTION,
    CHANGES,
    NAMES,
    adapt,
    attention_outputs,
    build,
    generate,
    ids,
    logits,
    merged,
    near,
    stepped,
)
from tests.helpers.marks import fast_cases, fast_families
from tests.helpers.merging import FAMILIES
from tests.helpers.tiny_families import tiny

# Equal to stock -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_float64(family: str) -> None:
    model = build(family, torch.float64)
    (stock,) = attention_outputs(model, ids())
    with mla_tune.absorb(model, "absorbed"):
        (ours,) = attention_outputs(model, ids())
    assert ours is not stock
    assert 0 < (ours - stock).abs().max() <= 1e-12 * stock.abs().max()


@fast_cases("deepseek_v3-auto", "kimi_linear-absorbed", "longcat_flash-absorbed")
@pytest.mark.parametrize("mode", ["auto", "absorbed", "expanded"])
@pytest.mark.parametrize("family", NAMES)
def test_logits_and_tokens(family: str, mode: str) -> None:
    model = tiny(family)
    whole, steps, tokens = logits(model, ids()), stepped(model, ids()), generate(model, ids(), 64)
    beams = generate(model, ids(), 12, num_beams=3)
    with mla_tune.absorb(model, mode):
        assert not unsupported_reasons(model)
        assert near(logits(model, ids()), whole)
        assert near(stepped(model, ids()), steps)
        assert torch.equal(generate(model, ids(), 64), tokens)
        assert torch.equal(generate(model, ids(), 12, num_beams=3), beams)


@fast_families()
@pytest.mark.parametrize("family", NAMES)
def test_left_padding(family: str) -> None:
    model = tiny(family)
    tokens, mask = ids(), torch.ones(2, 14, dtype=torch.long)
    tokens[0, :6], mask[0, :6] = 0, 0
    stock = generate(model, tokens, attention_mask=mask)
    alone = generate(model, tokens[:1, 6:])
    for mode in ("auto", "absorbed"):
        with mla_tune.absorb(model, mode):
            padded = generate(model, tokens, attention_mask=mask)
        assert torch.equal(padded, stock)
        assert torch.equal(padded[:1, 14:], alone[:, 8:])


def test_static_cache_and_assisted_decoding() -> None:
    model = build()
    stock = generate(model, ids(1))
    draft = build(num_hidden_layers=2)
    with mla_tune.absorb(model, "absorbed"):
        assert torch.equal(generate(model, ids(1), cache_implementation="static", disable_compile=True), stock)
        assert torch.equal(generate(model, ids(1), assistant_model=draft), stock)
        cache = StaticCache(config=model.config, max_cache_len=20)
        assert near(stepped(model, ids(), cache=cache), stepped(build(), ids()))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.008)])
def test_sixteen_bits(dtype: torch.dtype, tolerance: float, implementation: str) -> None:
    """The error against float32 is at most twice that of stock."""
    exact = stepped(build(first_k_dense_replace=3), ids())
    model = build(first_k_dense_replace=3).to(dtype)
    model.set_attn_implementation(implementation)
    stock = stepped(model, ids()).float()
    with mla_tune.absorb(model, "absorbed"):
        ours = stepped(model, ids()).float()
    error = (ours - exact).abs().max()
    assert error <= tolerance * exact.abs().max()
    assert error <= 2 * (stock - exact).abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [(), ("x", "y")])
def test_compiled(adapters: tuple[str, ...]) -> None:
    """`torch.compile` makes one graph, without graph breaks."""
    model = build(first_k_dense_replace=3)
    model = adapt(model, *adapters) if adapters else model
    whole, steps = logits(model, ids()), stepped(model, ids())
    torch._dynamo.reset()
    with mla_tune.absorb(model, "absorbed"):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert near(logits(compiled, ids()), whole)
        cache = StaticCache(config=model.config, max_cache_len=20)
        assert near(stepped(compiled, ids(), cache=cache), steps)
    torch._dynamo.reset()


def test_eager_returns_attention_weights() -> None:
    model = build()
    model.set_attn_implementation("eager")
    stock = model(ids(), output_attentions=True)
    with mla_tune.absorb(model, "absorbed"):
        ours = model(ids(), output_attentions=True)
    for a, b in zip(ours.attentions, stock.attentions, strict=True):
        assert near(a, b)


def test_long_queries_are_computed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    whole = logits(model, ids())
    monkeypatch.setattr("mla_tune.inference.latent_sdpa._SCORES", 2 * 4 * 14 * 3)
    with mla_tune.absorb(model, "absorbed"):
        assert near(logits(model, ids()), whole)


# The choice -----------------------------------------------------------------------------------------------------------


def test_auto_expands_prompts_and_absorbs_steps(absorbed_calls: list[int]) -> None:
    model = build()
    with mla_tune.absorb(model):
        stepped(model, ids(count=40), prompt=36)
    assert set(absorbed_calls) == {1}
    assert len(absorbed_calls) == 4 * len(list(mla_modules(model)))
    with mla_tune.absorb(model, "expanded"):
        stepped(model, ids(count=40), prompt=36)
    assert len(absorbed_calls) == 4 * len(list(mla_modules(model)))


def test_choice_at_deepseek_v3_size() -> None:
    shape = nn.Module()
    sizes = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512, "num_heads": 128}
    for name, value in sizes.items():
        setattr(shape, name, value)
    shape.expand_kv = None  # type: ignore[assignment]
    latent = LatentAttention(shape)
    assert attention.prefers_absorbed(latent, 1, 1, 4096)
    assert attention.prefers_absorbed(latent, 1, 4, 4096), "drafted tokens"
    assert not attention.prefers_absorbed(latent, 1, 4096, 4096)
    assert not attention.prefers_absorbed(latent, 1, 512, 8192), "a chunk of a prompt"


# There and back -------------------------------------------------------------------------------------------------------


def test_expand_leaves_nothing_behind() -> None:
    model = adapt(build(), "x")
    before = logits(model, ids())
    attributes = {path: set(vars(m)) for path, m in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    mla_tune.absorb(model, "absorbed")
    assert is_absorbed(model)
    mla_tune.absorb(model, "auto")  # a change of mode
    assert mla_tune.expand(model) is model
    assert not is_absorbed(model)
    assert {path: set(vars(m)) for path, m in model.named_modules()} == attributes
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model, ids()), before)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    mla_tune.expand(model)


def test_set_attn_implementation_ends_absorption(absorbed_calls: list[int]) -> None:
    model = build()
    right = logits(model, ids())
    mla_tune.absorb(model, "absorbed")
    model.set_attn_implementation("eager")
    assert near(logits(model, ids()), right)
    assert not absorbed_calls
    mla_tune.absorb(model, "absorbed")
    assert near(logits(model, ids()), right)
    assert absorbed_calls
    mla_tune.expand(model)
    assert model.config._attn_implementation == "eager"
    assert near(logits(model, ids()), right)


def test_weights_are_not_copied() -> None:
    model = build()
    with mla_tune.absorb(model, "absorbed"):
        for module in mla_modules(model):
            state = getattr(module, attention.STATE)
            assert state.up_projections(module.kv_b_proj.weight)[0].data_ptr() == module.kv_b_proj.weight.data_ptr()


def test_a_copy_of_an_absorbed_model_is_independent() -> None:
    model = adapt(build(), "x")
    mla_tune.absorb(model, "absorbed")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.9)
    right = logits(mla_tune.expand(copy.deepcopy(twin)), ids())
    assert near(logits(twin, ids()), right)
    assert not near(logits(model, ids()), right)


def test_unknown_modes_and_models_without_mla_are_refused() -> None:
    with pytest.raises(NotMLAError, match="Linear has no Multi-head Latent Attention"):
        mla_tune.absorb(nn.Linear(2, 2))
    with pytest.raises(InputError, match="mode 'fast': allowed are auto, absorbed, expanded"):
        mla_tune.absorb(build(), "fast")


@pytest.mark.slow
def test_import_mla_tune_loads_no_torch() -> None:
    import subprocess
    import sys

    code = "import mla_tune, sys; assert 'torch' not in sys.modules; mla_tune.absorb; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Adapters -------------------------------------------------------------------------------------------------------------

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "only kv_b_proj": {"target_modules": ["kv_b_proj"]},
    "all but kv_b_proj": {"target_modules": [t for t in ATTENTION if t != "kv_b_proj"]},
    "dense MLP by parameter": {
        "target_modules": ["kv_b_proj", "o_proj"],
        "target_parameters": ["layers.0.mlp.up_proj.weight", "shared_experts.down_proj.weight"],
    },
}


@fast_families()
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("family", NAMES)
def test_one_adapter_on_every_family(family: str, method: str) -> None:
    model = adapt(tiny(family), "x", "y", target_modules=["kv_b_proj", "o_proj"], **METHODS[method])
    names = ["x", BASE, "y"]
    models = {name: merged(model, name) for name in names}
    right = torch.cat([logits(models[name], ids(3)[i : i + 1]) for i, name in enumerate(names)])
    with mla_tune.absorb(model, "absorbed"):
        assert not unsupported_reasons(model)
        assert near(logits(model, ids(3)[:1]), right[:1])
        assert near(logits(model, ids(3), adapter_names=names), right)


@pytest.mark.parametrize("method", METHODS)
def test_one_adapter(method: str) -> None:
    model = adapt(build(), "x", **METHODS[method])
    right = merged(model, "x")
    plain = logits(merged(model, BASE), ids())
    with mla_tune.absorb(model, "absorbed"):
        assert not unsupported_reasons(model)
        assert near(logits(model, ids()), logits(right, ids()))
        assert not near(logits(model, ids()), plain, 1e-3), "the adapter does something"
        assert torch.equal(generate(model, ids()), generate(right, ids()))


@fast_cases("auto-lora", "auto-dora")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["auto", "absorbed"])
def test_rows_of_a_batch(mode: str, method: str) -> None:
    """Each row equals the merged model of its adapter; ranks 3 and 4 and rows of the base are in one batch."""
    model = adapt(build(), "x", "y", **METHODS[method])
    names = ["x", BASE, "y", "x"]
    models = {name: merged(model, name) for name in dict.fromkeys(names)}
    tokens = ids(4)
    right = torch.cat([logits(models[name], tokens[i : i + 1]) for i, name in enumerate(names)])
    text = [generate(models[name], tokens[i : i + 1]) for i, name in enumerate(names)]
    with mla_tune.absorb(model, mode):
        assert near(logits(model, tokens, adapter_names=names), right)
        assert torch.equal(generate(model, tokens, adapter_names=names), torch.cat(text))
        other = names[::-1]
        turned = logits(model, tokens.flip(0), adapter_names=other)
        assert near(turned.flip(0), right), "the stack of the first batch is not used again"


def test_rows_with_beams() -> None:
    model = adapt(build(), "x", "y")
    right = [generate(merged(model, n), ids()[i : i + 1], 10, num_beams=2) for i, n in enumerate("xy")]
    with mla_tune.absorb(model, "absorbed"):
        found = generate(model, ids(), 10, num_beams=2, adapter_names=["x", "y"])
    assert torch.equal(found, torch.cat(right))


@fast_families()
@pytest.mark.parametrize("family", [name for name in NAMES if name not in ("minicpm3", "youtu")])
def test_routed_experts_by_their_factors(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equals PEFT, which computes W + s·B A of all experts in every forward."""
    stacks = ["experts.gate_up_proj", "experts.down_proj"]
    settings = {"target_modules": ["kv_b_proj"], "target_parameters": stacks}
    model = adapt(tiny(family), "x", "y", **settings, r=3)
    right = logits(model, ids())
    model.set_adapter("y")
    other = logits(model, ids())
    with model.disable_adapter():
        plain = logits(model, ids())
    with mla_tune.absorb(model, "absorbed"), monkeypatch.context() as patch:
        patch.setattr(ParamWrapper, "_activate_lora", None)
        assert near(logits(model, ids()), other)
        model.set_adapter("x")
        assert near(logits(model, ids()), right)
        with model.disable_adapter():
            assert near(logits(model, ids()), plain)
    assert not near(right, other, 1e-3)
    assert not near(right, plain, 1e-3)
    assert torch.equal(logits(model, ids()), right)


def test_routed_experts_one_parameter_and_gradients() -> None:
    grads = []
    for absorbed in (False, True):
        model = adapt(build(), "x", target_modules=["o_proj"], target_parameters=["experts.down_proj"])
        if absorbed:
            mla_tune.absorb(model, "absorbed")
        model(input_ids=ids(), labels=ids()).loss.backward()
        grads.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    assert any("experts" in key for key in grads[0])
    assert grads[0].keys() == grads[1].keys()
    for key, grad in grads[0].items():
        assert near(grads[1][key], grad, 1e-3), key


def test_several_active_adapters() -> None:
    model = adapt(build(), "x", "y")
    model.base_model.set_adapter(["x", "y"])
    right = logits(model, ids())
    with mla_tune.absorb(model, "absorbed"):
        assert near(logits(model, ids()), right)


@pytest.mark.parametrize("dora", [False, True])
def test_switching_is_bitwise_reproducible(dora: bool) -> None:
    model = adapt(build(), "x", use_dora=dora)
    with mla_tune.absorb(model, "absorbed"):
        with model.disable_adapter():
            base = logits(model, ids())
        a = logits(model, ids())
        model.add_adapter("y", LoraConfig(r=5, target_modules=["kv_b_proj"], init_lora_weights=False, use_dora=dora))
        model.set_adapter("y")
        model.eval()
        b = logits(model, ids())
        assert not near(a, base, 1e-3)
        assert not near(b, a, 1e-3)
        model.set_adapter("x")
        assert torch.equal(logits(model, ids()), a)
        model.set_adapter("y")
        assert torch.equal(logits(model, ids()), b)
        with model.disable_adapter():
            assert torch.equal(logits(model, ids()), base)
        model.delete_adapter("y")
        model.set_adapter("x")
        assert torch.equal(logits(model, ids()), a)
        unloaded = model.unload()
        assert torch.equal(logits(unloaded, ids()), base)


@fast_cases("False-None", "True-names1")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("names", [None, ["x", "y"]])
@pytest.mark.parametrize("dora", [False, True])
def test_weights_that_change_are_seen(dora: bool, names: list[str] | None, change: str) -> None:
    """Weights of the adapter or of the base change between two prompts."""
    model = adapt(build(), "x", "y", use_dora=dora)
    with mla_tune.absorb(model, "absorbed"):
        before = logits(model, ids(), adapter_names=names)
        with torch.no_grad():
            for key, p in model.named_parameters():
                if "kv_b_proj.lora_B.x" in key:
                    CHANGES[change](p, 1.5)
                elif "kv_b_proj.base_layer" in key:
                    CHANGES[change](p, 0.8)
        ours = logits(model, ids(), adapter_names=names)
    models = [merged(model, name) for name in (names or ["x", "x"])]
    right = torch.cat([logits(m, ids()[i : i + 1]) for i, m in enumerate(models)])
    assert near(ours, right)
    assert not near(ours, before, 1e-3)


def _scaled(layer: Any) -> None:
    layer.scaling["x"] *= 2


def _replaced(layer: Any) -> None:
    """Replace the module by another one with twice the weight."""
    layer.lora_B["x"] = copy.deepcopy(layer.lora_B["x"])
    layer.lora_B["x"].weight.mul_(2)


@pytest.mark.parametrize("change", [lambda layer: layer.lora_B["x"].weight.mul_(2), _scaled, _replaced])
def test_between_two_steps_of_one_prompt(change: Any) -> None:
    """A change of scale, module or parameter between two tokens takes effect, because each token checks them."""
    model = adapt(build(), "x", "y", use_dora=True)
    names = ["x", "y"]

    def changed(absorbed: bool) -> torch.Tensor:
        twin = copy.deepcopy(model)
        if absorbed:
            mla_tune.absorb(twin, "absorbed")
        cache = DynamicCache(config=twin.config)
        logits(twin, ids(), past_key_values=cache, adapter_names=names)
        with torch.no_grad():
            for module in twin.modules():
                if "x" in getattr(module, "lora_B", ()):
                    change(module)
        return logits(twin, ids(2, 1), past_key_values=cache, adapter_names=names)

    mla_tune.absorb(model, "expanded")
    assert near(changed(True), changed(False))


def test_adapters_that_come_after_absorb() -> None:
    model = build()
    mla_tune.absorb(model, "absorbed")
    wrapped = adapt(model, "x", "y")
    assert near(logits(wrapped, ids()), logits(merged(wrapped, "x"), ids()))
    rows = torch.cat([logits(merged(wrapped, n), ids()[i : i + 1]) for i, n in enumerate("xy")])
    assert near(logits(wrapped, ids(), adapter_names=["x", "y"]), rows)


@pytest.mark.parametrize(
    "settings, reason",
    [({"lora_bias": True}, "a bias on B"), ({"lora_dropout": 0.5}, "dropout while training")],
)
def test_unsupported_adapters_are_expanded_with_a_reason(settings: dict[str, Any], reason: str) -> None:
    model = adapt(build(), "x", **settings)
    if reason == "a bias on B":
        right = logits(model, ids())
        with mla_tune.absorb(model, "absorbed"):
            assert set(unsupported_reasons(model).values()) == {reason}
            assert near(logits(model, ids()), right)
    else:
        with mla_tune.absorb(model.train(), "absorbed"):
            assert set(unsupported_reasons(model).values()) == {reason}


@pytest.mark.parametrize("dora", [False, True])
def test_training_through_absorbed_attention(dora: bool) -> None:
    """Gradients equal those of stock attention."""
    grads = []
    for mode in ("expanded", "absorbed"):
        model = adapt(build(), "x", use_dora=dora)
        mla_tune.absorb(model, mode)
        model(input_ids=ids(), labels=ids()).loss.backward()
        grads.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for key, grad in grads[0].items():
        assert near(grads[1][key], grad, 1e-3), key


# Negative controls: what these tests must not pass --------------------------------------------------------------------


def test_control_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    right = logits(build(), ids())
    monkeypatch.setattr(LatentAttention, "attend", _without_mask(LatentAttention.attend))
    model = build()
    with mla_tune.absorb(model, "absorbed"):
        assert not near(logits(model, ids()), right, 1e-3)


def test_control_sinks_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("hy_v4")
    right = logits(model, ids())
    monkeypatch.setattr("mla_tune.inference.latent_sdpa._softmax", lambda scores, _: torch.softmax(scores, dim=-1))
    with mla_tune.absorb(model, "absorbed"):
        assert not near(logits(model, ids()), right, 1e-3)


@pytest.mark.parametrize("family", ["deepseek_v32", "hy_v4", "dots3_note", "mistral_large4"])
def test_control_indices_ignored(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    model = tiny(family)
    right = logits(model, ids())
    monkeypatch.setattr(attention, "_mask_by_indices", lambda mask, *_: mask)
    with mla_tune.absorb(model, "absorbed"):
        assert not near(logits(model, ids()), right, 1e-3)


def _without_mask(attend: Any) -> Any:
    def blind(self: LatentAttention, query: Any, latent: Any, k_rope: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        return attend(self, query, latent, k_rope, None, *args, **kwargs)

    return blind


def test_control_adapter_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapt(build(), "x", target_modules=["kv_b_proj"])
    right = logits(merged(model, "x"), ids())
    monkeypatch.setattr(LayerLora, "active", lambda _: [])
    with mla_tune.absorb(model, "absorbed"):
        assert not near(logits(model, ids()), right, 1e-3)


def test_control_stale_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the version guard and `clear_derived` disabled, a change of weights has no effect."""
    model = adapt(build(), "x", "y", target_modules=["kv_b_proj"])
    monkeypatch.setattr("mla_tune.inference.lora_tensors.VersionGuard.is_unchanged", lambda _: True)
    monkeypatch.setattr(LayerLora, "clear_derived", lambda _: None)
    with mla_tune.absorb(model, "absorbed"):
        before = logits(model, ids(), adapter_names=["x", "y"])
        with torch.no_grad():
            for key, p in model.named_parameters():
                if "lora_B.x" in key:
                    p.mul_(2)
        assert torch.equal(logits(model, ids(), adapter_names=["x", "y"]), before)


def test_a_peft_model_is_a_model() -> None:
    """`absorb` on a PeftModel and on the model inside it give the same logits."""
    model = adapt(build(), "x")
    assert isinstance(model, PeftModel)
    with mla_tune.absorb(model.get_base_model(), "absorbed"):
        one = logits(model, ids())
    with mla_tune.absorb(model, "absorbed"):
        assert torch.equal(logits(model, ids()), one)
