"""PEFT attaches exactly the plan, saves it, and plain PEFT loads it; any difference from the plan is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from mla_tune.adapter.peft_config import peft_config
from mla_tune.adapter.placement import Placement, place
from mla_tune.arch.build import architecture
from mla_tune.errors import CheckError
from mla_tune.model.attach import attach, attached_loras, check_attached
from mla_tune.recipe.load import load_recipe
from mla_tune.recipe.schema import AdapterSection
from mla_tune.resources import EMBEDDED_MODEL
from mla_tune.training.gradients import gradient_problems
from mla_tune.training.optimizer import param_groups
from tests.helpers.arch_configs import TINY
from tests.helpers.marks import fast_cases
from tests.helpers.placements import BY_HAND

ADAPTER_RECIPES = ["safe", "all-linear", "W_UKV-priority", "attention-only", "bottleneck"]
MODELS = ["deepseek_v2 without query compression", "deepseek_v3", "glm4_moe_lite", "minicpm3"]


def build(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    # grouped_mm needs rows of a multiple of 16 bytes, which these sizes are not.
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY[name]), experts_implementation="eager")
    for p in model.parameters():  # norms of one and biases of zero would hide mistakes
        torch.nn.init.normal_(p, std=0.2)
    return model


def planned(name: str, **adapter: Any) -> tuple[Any, Any, Placement]:
    arch = architecture(TINY[name])
    return build(name), arch, place(arch, AdapterSection.model_validate(adapter))


IDS = torch.tensor([[5, 9, 33, 2, 71, 8], [4, 4, 90, 17, 3, 1]])


@fast_cases("deepseek_v3", "minicpm3-all-linear")
@pytest.mark.parametrize("recipe", ADAPTER_RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_attached_is_planned_and_survives_save_and_load(name: str, recipe: str, tmp_path: Path) -> None:
    arch = architecture(TINY[name])
    placement = place(arch, load_recipe(recipe).adapter)
    model = attach(build(name), arch, placement, seed=1)
    assert {a.parameter for a in attached_loras(model)} == {p.site.parameter for p in placement.sites}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == placement.trainable_params
    for a in attached_loras(model):
        torch.nn.init.normal_(a.layer.lora_B["default"].weight, std=0.1)
    model.eval()
    with torch.no_grad():
        want = model(input_ids=IDS).logits
        base = build(name).eval()(input_ids=IDS).logits
    assert (want - base).abs().max() > 1e-3, "the adapter must have an effect"
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(name), str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, want)


@pytest.mark.parametrize("recipe", ADAPTER_RECIPES)
def test_the_embedded_model_is_adapted_as_written_by_hand(recipe: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)
    arch = architecture(json.loads((EMBEDDED_MODEL / "config.json").read_text()))
    net = attach(model, arch, place(arch, load_recipe(recipe).adapter), seed=0)
    assert sorted(a.parameter for a in attached_loras(net)) == sorted(BY_HAND[recipe])
    # Counted independently of `attached_loras`: two trainable tensors for each matrix, inside one of these modules.
    trainable = [n for n, p in net.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * len(BY_HAND[recipe])


def test_dora_and_rslora_scales() -> None:
    model, arch, placement = planned("deepseek_v3", method="dora", targets="attention", rank=4, alpha=8)
    attach(model, arch, placement, 0)
    model, arch, placement = planned("deepseek_v3", method="rslora", targets="safe", rank=4, alpha=8)
    attached_model = attach(model, arch, placement, 0)
    assert {a.scale for a in attached_loras(attached_model)} == {4.0}  # 8 / √4


def test_peft_by_bare_names_trains_something_else_and_is_caught() -> None:
    """PEFT rewrites names of MLPs to the routed experts in these families, which placement has to avoid."""
    model, _, placement = planned("deepseek_v3", targets="safe", rank=4, alpha=8)
    naive = LoraConfig(r=4, lora_alpha=8, target_modules=["o_proj", "gate_proj", "up_proj", "down_proj"])
    wrong = get_peft_model(model, naive)
    with pytest.raises(CheckError) as error:
        check_attached(wrong, placement)
    text = str(error.value)
    assert "planned, but PEFT attached nothing: model.layers.0.mlp.gate_proj.weight" in text
    assert "attached, but not planned: model.layers.1.mlp.experts.gate_up_proj" in text


def test_wrong_rank_and_stray_trainables_are_caught() -> None:
    model, arch, placement = planned("minicpm3", targets=["W_O"], rank=4, alpha=8)
    config = peft_config(arch, placement)
    config.rank_pattern = {"1.self_attn.o_proj": 2}
    with pytest.raises(CheckError, match="planned rank 4, scale 2; got 2, 4"):
        check_attached(get_peft_model(model, config), placement)
    model, arch, placement = planned("minicpm3", targets=["W_O"])
    good = attach(model, arch, placement, 0)
    good.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(CheckError, match=r"trainable, but not part of an adapter: .*norm\.weight"):
        check_attached(good, placement)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", ADAPTER_RECIPES)
def test_every_adapter_gets_a_gradient(name: str, recipe: str) -> None:
    arch = architecture(TINY[name])
    model = attach(build(name), arch, place(arch, load_recipe(recipe).adapter), seed=1)
    ids = torch.randint(3, 100, (4, 20))
    model(input_ids=ids, labels=ids).loss.backward()
    assert gradient_problems(model) == []


def test_dead_and_broken_gradients_are_named() -> None:
    model, arch, placement = planned("deepseek_v3", targets=["W_O"])
    model = attach(model, arch, placement, 0)
    assert len(gradient_problems(model)) == 3  # before any backward pass
    model(input_ids=IDS, labels=IDS).loss.backward()
    dead, broken, _ = (a.layer for a in attached_loras(model))
    for p in dead.parameters():
        if p.grad is not None:
            p.grad.zero_()
    broken.lora_B["default"].weight.grad[0, 0] = float("nan")
    assert gradient_problems(model) == [
        "model.layers.0.self_attn.o_proj.weight: its gradient is zero",
        "model.layers.1.self_attn.o_proj.weight: its gradient is not finite",
    ]


def test_learning_rates_reach_the_right_parameters() -> None:
    roles = "{W_UKV: {lr_scale: 2.0}, experts_down: {lr_scale: 0.1}}"
    sets = ["optimizer.learning_rate=1e-3", "optimizer.weight_decay=0.1", f"adapter.roles={roles}"]
    recipe = load_recipe("all-linear", sets)
    arch = architecture(TINY["deepseek_v3"])
    placement = place(arch, recipe.adapter)
    model = attach(build("deepseek_v3"), arch, placement, 0)
    rate = {id(p): (g["lr"], g["weight_decay"]) for g in param_groups(model, placement, recipe) for p in g["params"]}
    names = {n: rate.pop(id(p)) for n, p in model.named_parameters() if p.requires_grad}
    assert not rate
    outer = model.base_model.model.model.layers[1].mlp.experts
    inner = outer.base_layer
    scale = {outer.parameter_name: "mlp.experts.lora_", inner.parameter_name: "mlp.experts.base_layer.lora_"}
    for name, (lr, decay) in names.items():
        if "kv_b_proj" in name:
            want = 1e-3 * 0.65 * 2.0
        elif scale["down_proj"] in name:
            want = 1e-3 * 0.65 * 0.1
        else:
            want = 1e-3 * 0.65
        assert lr == pytest.approx(want), name
        assert decay == 0.1
