"""Rows of one batch with different adapters on the routed experts.

The oracle of every row is the model that PEFT has merged its adapter into, in a copy, through stock attention and
transformers' own experts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import mla_tune
from mla_tune.errors import CheckError, InputError
from mla_tune.inference.batched_expert_lora import GroupedExpertWeights, SortedPairs
from mla_tune.inference.batched_lora import drop_stale_adapter_names
from mla_tune.inference.lora_tensors import BASE
from tests.helpers import tiny_families
from tests.helpers.inference import CHANGES, adapt, build, generate, ids, logits, merged, near, stepped
from tests.helpers.marks import fast_cases
from tests.helpers.tiny_families import tiny

GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
BOTH: dict[str, Any] = {"target_modules": ["kv_b_proj"], "target_parameters": [GATE_UP, DOWN]}
FAMILIES = sorted(set(tiny_families.FAMILIES) - {"minicpm3", "youtu"})
NAMES = ["x", BASE, "y"]


def by_row(model: Any, names: list[str], tokens: torch.Tensor, ask: Any = logits, **kwargs: Any) -> torch.Tensor:
    """The logits of each row from the merged model of its adapter."""
    models = {name: merged(model, name) for name in dict.fromkeys(names)}
    rows = []
    for i, name in enumerate(names):
        own = {key: value[i : i + 1] if torch.is_tensor(value) else value for key, value in kwargs.items()}
        rows.append(ask(models[name], tokens[i : i + 1], **own))
    return torch.cat(rows)


# Each row its own -----------------------------------------------------------------------------------------------------


@fast_cases("deepseek_v3", "kimi_linear", "longcat_flash")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    """Ranks 3 and 4 on both parameters; a prompt, steps, and a row that begins with padding."""
    model = adapt(tiny(family), "x", "y", **BOTH)
    tokens, mask = ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    right = by_row(model, NAMES, tokens)
    text = by_row(model, NAMES, tokens, generate, count=8)
    with mla_tune.absorb(model):
        assert near(logits(model, tokens, adapter_names=NAMES), right)
        assert torch.equal(generate(model, tokens, 8, adapter_names=NAMES), text)
    tokens[0, :4], mask[0, :4] = 0, 0
    padded = by_row(model, NAMES, tokens, generate, count=8, attention_mask=mask)
    with mla_tune.absorb(model):
        assert torch.equal(generate(model, tokens, 8, adapter_names=NAMES, attention_mask=mask), padded)
    assert not near(right[:1], logits(merged(model, "y"), ids(3, 9)[:1]), 1e-3), "the adapters differ"
    assert not near(right[:1], logits(merged(model, BASE), ids(3, 9)[:1]), 1e-3)


@pytest.mark.parametrize("parameter", [GATE_UP, DOWN])
@pytest.mark.parametrize("family", ["deepseek_v3", "longcat_flash"])
def test_one_parameter(family: str, parameter: str) -> None:
    model = adapt(tiny(family), "x", "y", target_modules=["o_proj"], target_parameters=[parameter])
    right = by_row(model, NAMES, ids(3), stepped)
    with mla_tune.absorb(model):
        assert near(stepped(model, ids(3), adapter_names=NAMES), right)


def test_adapters_that_are_elsewhere() -> None:
    """`e` adapts only experts and `y` only attention; batches of both with the base, and of `y` with the base."""
    model = adapt(build(), "y")
    parameters = ["mlp.experts.gate_up_proj"]
    model.add_adapter("e", LoraConfig(r=2, target_modules=[], target_parameters=parameters, init_lora_weights=False))
    model.set_adapter("y")
    for names in (["y", "e", BASE, "e"], ["y", BASE, BASE, "y"]):
        right = by_row(model, names, ids(4), stepped)
        with mla_tune.absorb(model):
            assert near(stepped(model, ids(4), adapter_names=names), right)


@pytest.mark.parametrize("names", [["y", "x"], ["x", "x"], ["y", BASE]])
def test_beams(names: list[str]) -> None:
    model = adapt(build(), "x", "y", **BOTH)
    right = by_row(model, names, ids(2), generate, count=8, num_beams=3)
    with mla_tune.absorb(model):
        assert torch.equal(generate(model, ids(2), 8, num_beams=3, adapter_names=names), right)


def test_eight_adapters() -> None:
    """More adapters than experts, in another order than they were added in."""
    names = [f"n{i}" for i in (7, 2, 0, 6, 1, 5, 4, 3)]
    model = adapt(build(), *sorted(names), **BOTH, use_rslora=True)
    right = by_row(model, names, ids(8), stepped)
    with mla_tune.absorb(model):
        assert near(stepped(model, ids(8), adapter_names=names), right)


def test_factors_of_another_dtype() -> None:
    """PEFT keeps adapters in float32 beside a model in bfloat16; here float64 beside float32."""
    model = adapt(build(), "x", "y", **BOTH)
    right = by_row(model, NAMES, ids(3))
    for key, p in model.named_parameters():
        if "lora_" in key and "experts" in key:
            p.data = p.data.double()
    with mla_tune.absorb(model):
        assert near(logits(model, ids(3), adapter_names=NAMES), right)


class _Largest(TorchDispatchMode):
    """Records the size of the largest new tensor that any operation allocates."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if torch.is_tensor(out) and not out._is_view():
            self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.parametrize("parameters", [[GATE_UP, DOWN], [DOWN]])
@pytest.mark.parametrize("names", [None, ["x", "y"]])
def test_no_tensor_as_large_as_the_weights_is_allocated(
    names: list[str] | None, parameters: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither W + s·B A of a layer, nor a copy of W for each pair of a token and an expert, is computed."""
    model = adapt(build(), "x", "y", target_modules=["o_proj"], target_parameters=parameters)
    sizes = [p.numel() for key, p in model.named_parameters() if "experts.base_layer" in key and p.dim() == 3]
    monkeypatch.setattr(ParamWrapper, "_activate_lora", None)
    monkeypatch.setattr(ParamWrapper, "get_delta_weight", None)
    with mla_tune.absorb(model), _Largest() as made:
        logits(model, ids(2), adapter_names=names)
    assert 0 < made.numbers < min(sizes)


# Adapters come, go and change -----------------------------------------------------------------------------------------


def test_switching_and_later_adapters() -> None:
    model = adapt(build(), "x", "y", **BOTH)
    base = logits(merged(model, BASE), ids(3))
    single = logits(merged(model, "x"), ids(3))
    with mla_tune.absorb(model):
        mixed = logits(model, ids(3), adapter_names=NAMES)
        assert near(logits(model, ids(3)), single)
        with model.disable_adapter():
            assert near(logits(model, ids(3)), base)
        model.base_model.disable_adapter_layers()  # under which, unlike above, PEFT hands on names
        assert near(logits(model, ids(3), adapter_names=NAMES), base)
        model.base_model.enable_adapter_layers()
        assert torch.equal(logits(model, ids(3), adapter_names=NAMES), mixed)
        model.add_adapter("z", LoraConfig(r=5, init_lora_weights=False, **BOTH))
        assert torch.equal(logits(model, ids(3), adapter_names=NAMES), mixed)
        names = ["z", "x", BASE]
        assert near(logits(model, ids(3), adapter_names=names), by_row(mla_tune.expand(model), names, ids(3)))
    mla_tune.absorb(model)
    model.delete_adapter("z")
    assert torch.equal(logits(model, ids(3), adapter_names=NAMES), mixed)
    with pytest.raises(ValueError, match="non-existing adapter"):
        logits(model, ids(3), adapter_names=["z", "x", BASE])


def test_adapters_that_come_after_absorb() -> None:
    """Layers adapted after `absorb` have PEFT's forward, which refuses; calling `absorb` again includes them."""
    model = build()
    mla_tune.absorb(model)
    wrapped = adapt(model, "x", "y", **BOTH)
    with pytest.raises(ValueError, match="does not support mixed"):
        logits(wrapped, ids(3), adapter_names=NAMES)
    drop_stale_adapter_names(wrapped)
    mla_tune.absorb(wrapped)
    ours = logits(wrapped, ids(3), adapter_names=NAMES)
    assert near(ours, by_row(mla_tune.expand(wrapped), NAMES, ids(3)))


@pytest.mark.parametrize(
    "settings",
    [{}, BOTH, BOTH | {"target_modules": []}, {"target_parameters": ["layers.0.mlp.up_proj.weight"]}],
)
def test_merged_layers(settings: dict[str, Any]) -> None:
    model = adapt(build(), "x", **{"target_modules": ["kv_b_proj", "o_proj"]} | settings)
    right, base = (logits(merged(model, name), ids()) for name in ("x", BASE))
    with mla_tune.absorb(model, "absorbed"):
        model.merge_adapter()
        assert near(logits(model, ids()), right)
        with pytest.raises(InputError, match="merged into the base weights: x; unmerge them"):
            logits(model, ids(), adapter_names=["x", BASE])
        drop_stale_adapter_names(model)
        with model.disable_adapter():
            assert near(logits(model, ids()), base), "PEFT unmerges a layer that is run without adapters"
        assert near(logits(model, ids()), right)
        assert near(logits(model, ids(), adapter_names=["x", BASE]), torch.cat((right[:1], base[1:])))


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_are_seen(change: str) -> None:
    """Weights of an adapter or of the experts change between two prompts."""
    model = adapt(build(), "x", "y", **BOTH)
    with mla_tune.absorb(model):
        before = stepped(model, ids(3), adapter_names=NAMES)
        with torch.no_grad():
            for key, p in model.named_parameters():
                if "experts" in key and ("lora_B.x" in key or "base_layer.down_proj" in key):
                    CHANGES[change](p, 1.5)
        ours = stepped(model, ids(3), adapter_names=NAMES)
    assert near(ours, by_row(model, NAMES, ids(3), stepped))
    assert not near(ours, before, 1e-3)


def test_between_two_steps_of_one_prompt() -> None:
    """B is kept in another order for the steps of a prompt; versions are looked at for each.  The oracle is PEFT's
    forward of one adapter."""
    names = ["x", "y", "x"]
    model = adapt(build(), "x", "y", **BOTH)

    def changed(tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        logits(model, tokens, past_key_values=cache, **kwargs)
        logits(model, tokens[:, :1], past_key_values=cache, **kwargs)
        with torch.no_grad():
            factors = [p for key, p in model.named_parameters() if "lora_B.x" in key]
            for p in factors:
                p.mul_(2)
            found = logits(model, tokens[:, 1:2], past_key_values=cache, **kwargs)
            for p in factors:
                p.mul_(0.5)
        return found

    right = []
    for i, name in enumerate(names):
        model.set_adapter(name)
        right.append(changed(ids(3)[i : i + 1]))
    with mla_tune.absorb(model):
        assert near(changed(ids(3), adapter_names=names), torch.cat(right))


@pytest.mark.parametrize("family", ["deepseek_v3", "longcat_flash"])
def test_gradients_of_rows(family: str) -> None:
    """Of each adapter's factors: those of its row alone, by PEFT.  Of one token: what an earlier call without
    gradients has kept has none."""
    tokens = ids(3, 1)
    model = adapt(tiny(family), "x", "y", target_modules=["o_proj"], target_parameters=[GATE_UP, DOWN])
    wanted = {}
    for i, name in ((0, "x"), (2, "y")):
        model.set_adapter(name)
        model.zero_grad()
        model(input_ids=tokens[i : i + 1]).logits.square().sum().backward()
        wanted |= {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None and f".{name}." in k}
    model.zero_grad()
    for key, p in model.named_parameters():
        p.requires_grad_("lora_" in key)
    with mla_tune.absorb(model):
        logits(model, tokens, adapter_names=NAMES)
        model(input_ids=tokens, adapter_names=NAMES).logits.square().sum().backward()
    found = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for key, grad in found.items():
        assert near(grad, wanted[key], 1e-3), key


# What is refused ------------------------------------------------------------------------------------------------------


def test_a_router() -> None:
    """A router's weight belongs to neither a linear layer nor experts; the error names it, unlike PEFT's."""
    model = adapt(build(), "x", "y", target_modules=["o_proj"])
    model.add_adapter("router", LoraConfig(r=2, target_modules=[], target_parameters=["gate.weight"]))
    right = by_row(model, NAMES, ids(3))
    with mla_tune.absorb(model):
        assert near(logits(model, ids(3), adapter_names=NAMES), right)
        with pytest.raises(InputError, match="router adapts weight of a DeepseekV3TopkRouter: rows of one batch can't"):
            logits(model, ids(3), adapter_names=["x", "router", BASE])


def test_experts_outside_the_text_decoder_are_refused() -> None:
    """Tokens of a vision tower are image patches, which belong to no row of the batch."""
    model = build()
    text = model.model.layers[1].mlp.experts
    model.vision = torch.nn.ModuleDict({"experts": type(text)(model.config)})
    torch.nn.init.zeros_(model.vision.experts.gate_up_proj)
    torch.nn.init.zeros_(model.vision.experts.down_proj)
    model = adapt(model, "x", "y", **BOTH)
    index, weights = torch.zeros(6, 2, dtype=torch.long), torch.ones(6, 2)
    patches = torch.randn(6, model.config.hidden_size)
    mla_tune.absorb(model)
    layer = model.vision.experts
    assert layer(patches, index, weights, adapter_names=[BASE] * 3).abs().max() == 0
    with pytest.raises(InputError, match="y adapts down_proj of a DeepseekV3Experts: rows of one batch can't"):
        layer(patches, index, weights, adapter_names=[BASE, "y", BASE])


@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48)])
def test_a_number_of_tokens_that_does_not_match_the_rows(shape: tuple[int, ...]) -> None:
    model = adapt(build(), "x", "y", **BOTH)
    mla_tune.absorb(model)
    layer = model.base_model.model.model.layers[1].mlp.experts
    index = torch.zeros(*shape[:-1], 2, dtype=torch.long)
    with pytest.raises(InputError, match="adapter_names has 2 names, but experts got an input"):
        layer(torch.randn(shape), index, torch.ones(index.shape), adapter_names=["x", "y"])


def test_another_order_of_pairs_is_an_error() -> None:
    """A later transformers may order pairs differently; the result would be wrong without this error."""
    index = torch.tensor([[0, 1], [2, 0]])
    stack = GroupedExpertWeights(torch.randn(3, 5, 4), [[]], SortedPairs.sort(index, None, 1))
    with pytest.raises(CheckError, match="no longer orders pairs by token"):
        stack[index.T.reshape(-1)]
