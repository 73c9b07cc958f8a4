"""`plan --gpus --memory`: the arithmetic against models of transformers without numbers, and by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mla_tune.errors import InputError
from mla_tune.model.load import load_model
from mla_tune.preflight import gpu_fit as fit_module
from mla_tune.preflight.gpu_fit import parse_memory
from mla_tune.preflight.memory import base_bytes
from mla_tune.recipe.load import load_recipe
from mla_tune.recipe.model_source import architecture_of, load_config
from mla_tune.recipe.schema import ModelSection
from mla_tune.resources import EMBEDDED_MODEL
from mla_tune.training.resolve import resolve
from tests.helpers.fp8 import make_fp8

MODELS = {"deepseek-v3": 671, "deepseek-v2": 236, "deepseek-v2-lite": 16}


def gpu_fit(recipe: Any, gpus: int, memory: int) -> dict[str, Any]:
    r = resolve(recipe)
    return fit_module.gpu_fit(r.recipe, r.arch, r.placement, r.quantized, gpus=gpus, memory=memory)


def on_meta(name: str) -> Any:
    config, _, _ = load_config(name)
    config.pop("quantization_config", None)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)


def by_config(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["config"], row["base"]): row for row in document["configs"]}


@pytest.mark.parametrize("name", MODELS)
def test_shards_and_gathered_layers_are_those_of_the_real_model(name: str) -> None:
    recipe = load_recipe("safe", [f"model.base={name}"])
    rows = by_config(gpu_fit(recipe, 8, 80 * 10**9))
    model = on_meta(name)
    numbers = sum(p.numel() for p in model.parameters())
    assert round(numbers / 1e9) == MODELS[name]
    assert rows["ddp", "bfloat16"]["weights"] == pytest.approx(2 * numbers, rel=1e-6)
    assert rows["fsdp2", "bfloat16"]["weights"] == pytest.approx(2 * numbers / 8, rel=1e-6)
    largest = max(sum(p.numel() for p in layer.parameters()) for layer in model.model.layers)
    # Norms and the router's correction are not in the table of sites.
    assert rows["fsdp2", "bfloat16"]["gathered"] == pytest.approx(2 * 2 * largest, rel=1e-4)
    experts = max(sum(p.numel() for p in layer.mlp.parameters()) for layer in model.model.layers)
    live = max(1e9, experts)
    assert rows["zero3", "bfloat16"]["gathered"] == pytest.approx(2 * (live + 5e7 + 5e8), rel=1e-4)


def test_gathered_codes_by_hand() -> None:
    """DeepSeek-V3's MoE layer: 256 routed experts and a shared one of 3 × 7168 × 2048, attention; a plain router."""
    recipe = load_recipe("safe", ["model.base=deepseek-v3"])
    rows = by_config(gpu_fit(recipe, 8, 80 * 10**9))
    experts = 257 * 3 * 7168 * 2048
    attention = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    codes, router = experts + attention, 256 * 7168
    nf4, fp8 = 0.5 + 1 / 64 + 4 / 16384, 1 + 4 / 16384
    assert rows["fsdp2", "nf4"]["gathered"] == pytest.approx(2 * (nf4 * codes + 2 * router), rel=1e-6)
    assert rows["fsdp2", "fp8"]["gathered"] == pytest.approx(2 * (fp8 * codes + 2 * router), rel=1e-6)
    assert rows["fsdp2", "nf4"]["weights"] == pytest.approx(671.03e9 * nf4 / 8, rel=0.01)


def test_trained_numbers_by_hand() -> None:
    """LoRA of rank 16 on W_O of 27 layers of V2-Lite: A (16, 2048), B (2048, 16), float32, with gradient and two
    moments: 16 bytes a number; DDP's buckets 4 more."""
    recipe = load_recipe("safe", ["model.base=deepseek-v2-lite", "adapter.targets=[W_O]"])
    rows = by_config(gpu_fit(recipe, 4, 80 * 10**9))
    numbers = 27 * 16 * (2048 + 2048)
    assert rows["ddp", "bfloat16"]["trained"] == 20 * numbers
    assert rows["fsdp2", "bfloat16"]["trained"] == 16 * numbers / 4
    assert by_config(gpu_fit(recipe, 1, 80 * 10**9))["ddp", "bfloat16"]["trained"] == 16 * numbers


def test_total_is_the_sum_and_decides() -> None:
    document = gpu_fit(load_recipe("safe", ["model.base=deepseek-v2-lite"]), 8, 40 * 10**9)
    parts = ("weights", "trained", "gathered", "activations", "working", "reserve")
    for row in document["configs"]:
        assert row["total"] == sum(row[p] for p in parts)
        assert row["fits"] == (row["total"] <= 40 * 10**9)
    rows = by_config(document)
    assert not rows["ddp", "bfloat16"]["fits"]
    assert rows["ddp", "bfloat16"]["fits_with"] == "full"
    assert rows["ddp", "nf4"]["fits"]
    assert document["advice"] == "mla-tune train --processes 8 --launch fsdp2"


def test_from_how_many_gpus() -> None:
    """One fewer of the numbers that are tried does not hold it."""
    recipe = load_recipe("safe", ["model.base=deepseek-v3", "train.activation_checkpointing=full"])
    least = by_config(gpu_fit(recipe, 8, 80 * 10**9))["zero3", "bfloat16"]["from_gpus"]
    assert least % 8 == 0
    assert by_config(gpu_fit(recipe, least, 80 * 10**9))["zero3", "bfloat16"]["fits"]
    assert not by_config(gpu_fit(recipe, least - 8, 80 * 10**9))["zero3", "bfloat16"]["fits"]


def test_quantized_bases_take_what_is_measured(tmp_path: Path) -> None:
    fp8 = make_fp8(EMBEDDED_MODEL, tmp_path / "fp8", block=(128, 128))
    for section in (ModelSection(base=str(fp8)), ModelSection(base="embedded", quantize="nf4")):
        loaded = load_model(section, allow_quantized=True)
        assert loaded.quantized is not None
        others = sum(p.numel() * p.element_size() for p in loaded.model.parameters() if not p.isnan().all())
        kind = "nf4" if section.quantize == "nf4" else "fp8"
        # Tables of NF4 and scales of matrices that are no whole blocks come on top in so small a model.
        found = base_bytes(architecture_of(section), kind, 4)
        assert found == pytest.approx(loaded.quantized["bytes"] + others, rel=0.03)


def test_the_issues_command_and_its_json(cli: Callable[..., Any]) -> None:
    done = cli("plan", "--gpus", "8", "--memory", "80GB")
    assert done.code == 0
    assert done.out.count("published in FP8") == 1
    for name, size in (("deepseek-v3", "671.03 B"), ("deepseek-v2", "235.74 B"), ("deepseek-v2-lite", "15.71 B")):
        assert f"{name} ({size} parameters" in done.out
    assert done.out.count("→") == 3
    documents = json.loads(cli("plan", "--gpus", "8", "--memory", "80GB", "--json").out)
    assert [d["params_total"] // 10**9 for d in documents] == [671, 235, 15]
    one = json.loads(cli("plan", "--recipe", "safe", "--gpus", "2", "--memory", "8GB", "--json").out)
    assert one["model"] == "embedded"


def test_sizes() -> None:
    assert parse_memory("80GB") == parse_memory("80") == parse_memory(" 80 g") == 80 * 10**9
    assert parse_memory("79.5GiB") == round(79.5 * 2**30)
    for text in ("eighty", "-3GB", "0", "80MB", ""):
        with pytest.raises(InputError, match="--memory"):
            parse_memory(text)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--gpus", "8"], "--gpus and --memory belong together"),
        (["--memory", "80GB"], "--gpus and --memory belong together"),
        (["--gpus", "0", "--memory", "80GB"], "--gpus: 0 is not in 1 to 1024"),
        ([], "--recipe is missing"),
    ],
)
def test_what_does_not_fit_together(arguments: list[str], says: str, cli: Callable[..., Any]) -> None:
    done = cli("plan", *arguments)
    assert done.code == 2
    assert says in done.err


def test_modules_that_are_trained_whole_count(cli: Callable[..., Any]) -> None:
    """A head of 102,400 × 2,048: 16 bytes a number on each GPU, DDP's buckets 4 more."""
    common = ["plan", "--recipe", "safe", "--gpus", "8", "--memory", "80GB", "--json"]
    base = ["--set", "model.base=deepseek-v2-lite"]
    plain = by_config(json.loads(cli(*common, *base).out))
    whole = by_config(json.loads(cli(*common, *base, "--set", "adapter.modules_to_save=[lm_head]").out))
    assert whole["ddp", "bfloat16"]["trained"] - plain["ddp", "bfloat16"]["trained"] == 20 * 102400 * 2048


@pytest.mark.parametrize(
    ("sets", "left_out"),
    [
        (["adapter.method=dora"], {"fsdp2", "zero3"}),
        (["adapter.init=pissa"], {"fsdp2", "zero3"}),
        (["train.compile=true"], {"fsdp2", "zero3"}),
        ([], set()),
    ],
)
def test_what_train_refuses_is_not_offered(sets: list[str], left_out: set[str]) -> None:
    recipe = load_recipe("attention-only", ["model.base=deepseek-v2-lite", *sets])
    found = gpu_fit(recipe, 8, 80 * 10**9)
    assert set(found["left_out"]) == left_out
    assert {row["config"] for row in found["configs"]} == {"ddp", "fsdp2", "zero3"} - left_out
    for wrong in found["left_out"].values():
        assert sets[0].replace("=", ": ") in wrong[0]
