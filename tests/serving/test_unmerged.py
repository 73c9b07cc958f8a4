"""The notes of `plan` on serving an adapter unmerged come from engines.json, and agree with serve-check."""

from __future__ import annotations

import pytest

from mla_tune.adapter.placement import place
from mla_tune.arch.build import architecture
from mla_tune.recipe.load import load_recipe
from mla_tune.recipe.model_source import load_config
from mla_tune.serving.unmerged import unmerged_notes


def notes(recipe: str, *sets: str, model: str = "deepseek-v3") -> list[str]:
    arch = architecture(load_config(model)[0])
    return unmerged_notes(arch, place(arch, load_recipe(recipe, list(sets)).adapter))


def test_safe_is_served_by_every_engine_that_takes_adapters() -> None:
    assert notes("safe") == []


def test_dropped_and_refused_are_told_apart() -> None:
    (line,) = [line for line in notes("W_UKV-priority") if line.startswith("W_UKV, served unmerged")]
    assert "vLLM would leave it out without an error" in line
    assert "llama.cpp would refuse it" in line
    assert "mlx" not in " ".join(notes("W_UKV-priority")), "it takes no adapter of these models at all"


@pytest.mark.parametrize(
    ("sets", "subject"),
    [
        (["adapter.method=dora"], "dora"),
        (["adapter.roles={W_O: {rank: 4}}"], "rank_pattern"),
        (["adapter.roles={W_O: {alpha: 4}}"], "alpha_pattern"),
    ],
)
def test_settings_are_judged_too(sets: list[str], subject: str) -> None:
    assert any(line.startswith(f"{subject}, served unmerged") for line in notes("attention-only", *sets))


def test_without_an_adapter_nothing_is_said() -> None:
    assert notes("full") == []
