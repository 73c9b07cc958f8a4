"""The matrices that a recipe adapts are those of lists written by hand; what can't be placed is refused."""

from __future__ import annotations

import json

import pytest

from mla_tune.adapter.placement import place
from mla_tune.arch.build import architecture
from mla_tune.arch.site import Architecture
from mla_tune.errors import PlacementError
from mla_tune.recipe.load import load_recipe
from mla_tune.recipe.schema import AdapterSection
from mla_tune.resources import CONFIGS
from tests.helpers.arch_configs import TINY
from tests.helpers.placements import BY_HAND, EXPERTS, MLP, W_O

L0, L1, L2, L3 = (f"model.layers.{i}" for i in range(4))


@pytest.fixture(scope="module")
def embedded() -> Architecture:
    return architecture(json.loads((CONFIGS / "presets" / "embedded.json").read_text()))


@pytest.mark.parametrize("recipe", BY_HAND)
def test_recipes_adapt_the_matrices_of_the_lists(embedded: Architecture, recipe: str) -> None:
    planned = [p.site.parameter for p in place(embedded, load_recipe(recipe).adapter).sites]
    assert sorted(planned) == sorted(BY_HAND[recipe])
    assert len(planned) == len(set(planned))


def test_experts_true_adds_the_routed_experts(embedded: Architecture) -> None:
    adapter = load_recipe("safe", ["adapter.experts=true"]).adapter
    assert sorted(p.site.parameter for p in place(embedded, adapter).sites) == sorted([*W_O, *MLP, *EXPERTS])


def test_w_ukv_priority_gives_w_ukv_the_larger_rank_and_rate(embedded: Architecture) -> None:
    placement = place(embedded, load_recipe("W_UKV-priority").adapter)
    for p in placement.sites:
        if p.site.role == "W_UKV":
            assert (p.rank, p.alpha, p.lr_scale) == (32, 64, 1.0)
        else:
            assert (p.rank, p.alpha, p.lr_scale) == (16, 32, 0.5)


def test_the_smallest_group_wins_field_by_field(embedded: Architecture) -> None:
    adapter = AdapterSection.model_validate(
        {
            "targets": "attention",
            "roles": {"W_UQ": {"rank": 4}, "attention": {"lr_scale": 0.3, "rank": 6}, "query": {"alpha": 1.0}},
        }
    )
    by = {p.site.role: p for p in place(embedded, adapter).sites}
    assert (by["W_UQ"].rank, by["W_UQ"].alpha, by["W_UQ"].lr_scale) == (4, 1.0, 0.3)
    assert (by["W_DQ"].rank, by["W_DQ"].alpha, by["W_DQ"].lr_scale) == (6, 1.0, 0.3)
    assert (by["W_O"].rank, by["W_O"].alpha, by["W_O"].lr_scale) == (6, 12.0, 0.3)


def test_groups_mean_those_of_their_roles_that_the_model_has() -> None:
    dense = architecture(TINY["minicpm3"])
    roles = {p.site.role for p in place(dense, AdapterSection(targets="all-linear")).sites}
    assert roles == {"W_DQ", "W_UQ", "W_DKV", "W_UKV", "W_O", "gate", "up", "down"}
    plain_query = architecture(TINY["deepseek_v2 without query compression"])
    roles = {p.site.role for p in place(plain_query, AdapterSection(targets="W_UKV-priority")).sites}
    assert "W_Q" in roles
    assert "W_DQ" not in roles


@pytest.mark.parametrize(
    "model, adapter, words",
    [
        (
            "deepseek_v2 without query compression",
            {"targets": ["W_DQ"]},
            "no W_DQ (it has no query compression: its query projection is W_Q). Roles of this model: W_Q, W_DKV",
        ),
        ("deepseek_v3", {"targets": ["W_Q"]}, "has no W_Q (its query is compressed: W_DQ and W_UQ)"),
        ("minicpm3", {"targets": ["W_O", "experts"]}, "nothing in the group 'experts'"),
        ("minicpm3", {"targets": "safe", "experts": True}, "nothing in the group 'experts'"),
        ("minicpm3", {"targets": ["shared_up"]}, "has no shared_up"),
        ("deepseek_v3", {"targets": ["W_O"], "roles": {"W_UKV": {"rank": 2}}}, "the override would do nothing"),
        ("deepseek_v3", {"method": "dora"}, "method: dora: PEFT can't do that for gate, up, down, shared_gate"),
        (
            "deepseek_v3",
            {"dropout": 0.1, "targets": ["experts"]},
            "dropout: 0.1: PEFT can't do that for experts_gate_up, experts_down of DeepSeek-V3",
        ),
    ],
)
def test_what_can_not_be_placed_is_refused_by_name(model: str, adapter: dict, words: str) -> None:
    with pytest.raises(PlacementError) as error:
        place(architecture(TINY[model]), AdapterSection.model_validate(adapter))
    assert words in str(error.value)


def test_dora_is_allowed_where_peft_can_do_it() -> None:
    placement = place(architecture(TINY["minicpm3"]), AdapterSection(method="dora", targets="all-linear", dropout=0.1))
    plain = sum(p.lora_params for p in placement.sites)
    assert placement.trainable_params == plain + sum(p.site.shape[0] for p in placement.sites)
    place(architecture(TINY["deepseek_v3"]), AdapterSection(method="dora", targets="attention"))
