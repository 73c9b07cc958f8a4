"""The tables of `inspect`: they fit, break no word, and add up."""

from __future__ import annotations

import io
import re
from collections import Counter
from typing import Any, get_args

import pytest
from rich.cells import cell_len
from rich.console import Console

from mla_tune.adapter.placement import place
from mla_tune.arch.build import architecture
from mla_tune.console import human_count
from mla_tune.preflight.inspect import inspect_architecture
from mla_tune.recipe.model_source import load_config
from mla_tune.recipe.schema import AdapterSection
from mla_tune.report.inspect_table import WIDE, Depth, render
from mla_tune.resources import model_names
from tests.helpers.arch_configs import TINY
from tests.helpers.marks import fast_cases

DEPTHS = get_args(Depth)


def document(model: str, targets: str | None = None, rank: int = 16) -> dict[str, Any]:
    arch = architecture(load_config(model)[0], model)
    placement = place(arch, AdapterSection(targets=targets, rank=rank)) if targets else None
    return {"model": model, **inspect_architecture(arch, rank, placement=placement)}


def show(doc: dict[str, Any], depth: Depth = "roles", width: int = 80) -> str:
    stream = io.StringIO()
    render(doc, depth, Console(file=stream, width=width, highlight=False, color_system=None))
    return stream.getvalue()


@fast_cases("deepseek-v3", "dots3-note-preview")
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("model", model_names())
def test_it_fits_80_columns_and_cuts_nothing(model: str, targets: str | None, depth: Depth) -> None:
    if targets and model == "mistral-large-4":
        targets = "attention-only"  # the others are refused there
    text = show(document(model, targets, rank=4096), depth)
    assert max(cell_len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "…" not in text


@pytest.mark.parametrize("depth", DEPTHS)
def test_no_word_is_broken(depth: Depth) -> None:
    def words(width: int) -> Counter[str]:
        return Counter(w for w in show(document("deepseek-v3", "safe"), depth, width).split() if set(w) != {"─"})

    assert words(80) == words(WIDE - 1)


def test_roles_one_row_each_with_sums() -> None:
    doc = document("deepseek-v3")
    text = show(doc)
    for role in {layer["role"] for layer in doc["layers"]}:
        [row] = re.findall(rf"^{role} +\d.*$", text, flags=re.MULTILINE)
        sites = [layer for layer in doc["layers"] if layer["role"] == role]
        assert row.split()[1].split("×")[0] == str(len(sites))
        assert human_count(sum(s["params"] for s in sites)) in row
    assert "alters cache" in text
    assert "a cached prefix can't be shared" in " ".join(text.split())
    assert "linear_kv_up_proj" in text


def test_wide_tables_have_the_names_of_nemo_in_their_rows() -> None:
    text = show(document("deepseek-v3"), width=120)
    assert re.search(r"^W_UKV .* linear_kv_up_proj *$", text, flags=re.MULTILINE)
    assert "In NeMo and Megatron" not in text


def test_repeated_layers_are_collapsed() -> None:
    text = show(document("deepseek-v3"), "layers")
    assert "layers 0–2 × 3" in text
    assert "layers 3–60 × 58" in text
    assert "layer 61 of MTP" in text
    assert text.count("kv_b_proj") == 3


def test_layers_that_a_recipe_treats_apart_are_not_collapsed() -> None:
    doc = document("deepseek-v3", "safe")
    doc["layers"] = [
        {**layer, "selected": layer["selected"] and layer["layer"] != 10} for layer in doc["layers"]
    ]  # fmt: skip
    text = show(doc, "layers")
    assert "layers 3–9 × 7" in text
    assert "layer 10\n" in re.sub(r" +\n", "\n", text)
    assert "layers 11–60 × 50" in text


def test_layers_of_different_kinds_stay_in_order() -> None:
    arch = architecture(TINY["glm4_moe_lite by layer types"])
    text = show(inspect_architecture(arch), "layers")
    assert [t for t in re.findall(r"^layers? \d.*$", text, flags=re.MULTILINE) if t] == [
        line for line in text.splitlines() if re.match(r"layers? \d", line)
    ]
    assert [w.rstrip() for w in re.findall(r"^layers? [\d–× ]+", text, flags=re.MULTILINE)] == [
        "layer 0", "layer 1", "layer 2",
    ]  # fmt: skip


def test_all_has_a_row_for_each_module() -> None:
    doc = document("tiny")
    rows = [line for line in show(doc, "all").splitlines() if re.search(r"\d×\d", line)]
    assert len(rows) == len(doc["layers"])


def test_marks_and_totals_of_a_recipe() -> None:
    doc = document("deepseek-v3", "safe", rank=8)
    text = show(doc)
    marked = set(re.findall(r"^● (\w+)", text, flags=re.MULTILINE)) - {"adapted"}
    assert marked == {layer["role"] for layer in doc["layers"] if layer["selected"]}
    total = human_count(sum(layer["lora_params"] for layer in doc["layers"] if layer["selected"]))
    assert f"{total} parameters to train" in " ".join(text.split())
    assert re.search(r"^  W_UKV .* – medium", text, flags=re.MULTILINE), "what is not adapted has no LoRA parameters"


def test_a_recipe_without_adapter_says_so() -> None:
    arch = architecture(TINY["minicpm3"])
    text = show({"recipe": "full", **inspect_architecture(arch, placement=place(arch, AdapterSection(method="none")))})
    assert "full has no adapter (method none): every weight is trained." in text


def test_models_without_query_compression_and_with_two_attentions() -> None:
    assert "L none" in show(document("deepseek-v2-lite"))
    assert "28 layers, 56 attentions" in show(document("longcat-flash"))
