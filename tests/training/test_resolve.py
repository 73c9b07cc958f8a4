"""`resolve`: what one verb refuses or changes, all of them do, with the same words."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mla_tune.errors import InputError, MlaTuneError
from mla_tune.recipe.load import load_recipe
from mla_tune.training.distributed.launch import Worker
from mla_tune.training.resolve import resolve
from tests.helpers.families import checkpoint, rows
from tests.helpers.marks import fast_cases
from tests.helpers.tiny_families import FAMILIES

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [8, 8]}
FP8_CHANNELS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "all": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
    },
}
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"all": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group"}}},
}
#: Name → (family, changes to its config.json, overrides, words of the error).
REFUSED: dict[str, tuple[str | None, dict[str, Any], list[str], str]] = {
    "nf4 and dora": (
        None,
        {},
        ["model.quantize=nf4", "adapter.method=dora", "adapter.targets=attention-only"],
        "adapter.method: dora does not go with a quantized base",
    ),
    "nf4 and compile": (None, {}, ["model.quantize=nf4", "train.compile=true"], "train.compile does not go with"),
    "nf4 and experts": (None, {}, ["model.quantize=nf4", "model.experts=eager"], "model.experts: eager does not go"),
    "nf4 on fp8": ("deepseek_v3", {"quantization_config": FP8}, ["model.quantize=nf4"], "quantized already (fp8)"),
    "fp8 and none": (
        "deepseek_v3",
        {"quantization_config": FP8},
        ["adapter.method=none"],
        "adapter.method: none trains the weights themselves",
    ),
    "fp8 and dora": (
        "deepseek_v3",
        {"quantization_config": FP8},
        ["adapter.method=dora", "adapter.targets=attention-only"],
        "adapter.method: dora does not go with a quantized base",
    ),
    "compression_config and compile": (
        "deepseek_v3",
        {"compression_config": FP8_CHANNELS},
        ["train.compile=true"],
        "are quantized (fp8)",
    ),
    "a format that nobody claims": (
        "deepseek_v3",
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        [],
        "quant_method is 'awq'; understood are",
    ),
    "a width that the format can't decode": (
        "deepseek_v3",
        {"quantization_config": INT4},
        [],
        "config_groups.all: format is 'pack-quantized'; understood are",
    ),
    "fp8 and a whole head": (
        "deepseek_v3",
        {"quantization_config": FP8},
        ["adapter.modules_to_save=[gate_proj]", "adapter.targets=[W_O]"],
        "is quantized in this base",
    ),
    "init and experts": (None, {}, ["adapter.init=pissa", "adapter.experts=true"], "is defined for single matrices"),
    "init and a rank beyond the matrix": (
        "deepseek_v3",
        {},
        ["adapter.init=olora", "adapter.rank=40", "adapter.targets=attention-only"],
        "directions of",
    ),
    "orthogonal and an odd rank": (
        None,
        {},
        ["adapter.init=orthogonal", "adapter.rank=3", "adapter.targets=[W_O]"],
        "has to be even",
    ),
    "dropout through parameters": (None, {}, ["adapter.dropout=0.1"], "adapter.dropout: 0.1: PEFT can't do that"),
    "dora through parameters": (None, {}, ["adapter.method=dora"], "adapter.method: dora: PEFT can't do that"),
    "a role that is not there": (None, {}, ["adapter.targets=[W_Q]"], "has no W_Q"),
    "an override of nothing": (None, {}, ["adapter.roles={W_UKV: {rank: 2}}"], "none of its roles is adapted"),
    "adapters lost on reload": ("mistral_large4", {}, [], "don't survive saving"),
    "packed attention and linear attention": (
        "kimi_linear",
        {},
        ["model.attention=packed", "adapter.targets=attention-only"],
        "model.attention: packed",
    ),
    "sdpa where only eager is": (
        "hy_v4",
        {},
        ["model.attention=sdpa", "adapter.targets=attention-only"],
        "has eager attention only",
    ),
    "a module that is not there": (None, {}, ["adapter.modules_to_save=[lm_haed]"], "has no module 'lm_haed'"),
    "a module with a LoRA": (None, {}, ["adapter.modules_to_save=[o_proj]"], "has a LoRA already"),
    "embeddings of a tied model": ("youtu", {}, ["adapter.modules_to_save=[embed_tokens]"], "are one matrix"),
    "rows beyond the window": (None, {}, ["train.max_length=4096"], "this model's window is 1024 tokens"),
    "a tracker that is not installed": (None, {}, ["output.report_to=[trackio]"], "trackio is not installed"),
    "a model without MLA": ("deepseek_v3", {"model_type": "llama", "kv_lora_rank": None}, [], "llama"),
}


def overrides(tmp_path: Path, family: str | None, changes: dict[str, Any], sets: list[str]) -> list[str]:
    """The overrides, with a config.json of that family as the model."""
    if family is None:
        return [f"output.dir={tmp_path / 'run'}", *sets]
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(FAMILIES[family] | changes))
    return [f"output.dir={tmp_path / 'run'}", "train.max_length=64", f"model.base={folder}", *sets]


def failure(work: Any) -> str:
    with pytest.raises(MlaTuneError) as error:
        work()
    assert isinstance(error.value, InputError)
    return str(error.value)


@pytest.mark.parametrize("case", REFUSED)
def test_every_verb_refuses_with_the_same_words(
    cli, monkeypatch: pytest.MonkeyPatch, case: str, tmp_path: Path
) -> None:
    from mla_tune.training import run

    family, changes, sets, words = REFUSED[case]
    sets = overrides(tmp_path, family, changes, sets)
    if "tracker" in case:
        monkeypatch.setattr("mla_tune.training.resolve.find_spec", lambda name: None)
    # What follows the checks in `train` must not be reached.
    monkeypatch.setattr(run, "init_distributed", lambda recipe: pytest.fail("train went on"))
    said = failure(lambda: resolve(load_recipe("safe", sets)))
    assert words in said
    assert failure(lambda: run.train(load_recipe("safe", sets))) == said
    options = [x for s in sets for x in ("--set", s)]
    commands = [("train",), ("plan",), ("plan", "--no-data"), ("plan", "--gpus", "2", "--memory", "80GB"), ("data",)]
    for verb, *more in commands:
        done = cli(verb, "--recipe", "safe", *options, *more)
        assert (done.code, done.err) == (2, f"error: {said}\n"), (verb, more)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "sharding, sets, words",
    [
        ("fsdp2", ["train.compile=true"], "FSDP2 is not tried together with train.compile: true"),
        ("fsdp2", ["model.dtype=float16"], "model.dtype: float16"),
        ("fsdp2", ["adapter.init=pissa", "adapter.targets=[W_O]"], "adapter.init: pissa"),
        ("zero3", ["adapter.modules_to_save=[lm_head]"], "ZeRO-3 is not tried together with adapter.modules_to_save"),
        ("zero3", ["adapter.method=dora", "adapter.targets=attention-only"], "adapter.method: dora"),
        ("zero3", ["model.quantize=nf4"], "a quantized base (nf4)"),
    ],
)
def test_what_was_not_tried_sharded_is_refused_before_processes_start(
    cli, sharding: str, sets: list[str], words: str, tmp_path: Path
) -> None:
    said = failure(
        lambda: resolve(load_recipe("safe", sets), Worker(world_size=2, local_world_size=2, sharding=sharding))
    )
    assert words in said
    options = [x for s in [*sets, f"output.dir={tmp_path / 'run'}"] for x in ("--set", s)]
    done = cli("train", "--recipe", "safe", "--launch", sharding, "--processes", "2", *options)
    assert (done.code, done.err) == (2, f"error: {said}\n")
    assert resolve(load_recipe("safe", sets), Worker(world_size=2, local_world_size=2)).recipe == load_recipe(
        "safe", sets
    )


@fast_cases("kimi_linear")
@pytest.mark.parametrize("family", ["kimi_linear", "bailing_hybrid", "deepseek_v3"])
def test_packing_is_off_for_linear_attention_in_every_verb(cli, family: str, tmp_path: Path) -> None:
    base, data = checkpoint(family, tmp_path / "base"), rows(tmp_path / "rows.jsonl")
    sets = [f"model.base={base}", f"data.path={data}", "train.max_length=120", "data.eval_fraction=0"]
    sets += ["train.max_steps=1", "output.samples=0", f"output.dir={tmp_path / 'run'}", "adapter.targets=[W_O]"]
    resolved = resolve(load_recipe("safe", sets))
    packs = family == "deepseek_v3"
    assert resolved.recipe.train.packing == packs
    options = ["--recipe", "safe", "--json", *(x for s in sets for x in ("--set", s))]
    shown = cli("data", *options)
    planned = cli("plan", *options)
    trained = cli("train", *options)
    assert (shown.code, planned.code, trained.code) == (0, 0, 0), (shown.err, planned.err, trained.err)
    assert json.loads(shown.out)["packing"]["on"] == packs
    counts = [json.loads(done.out) for done in (planned, trained)]
    assert json.loads(shown.out)["train"] == counts[0]["data"]["train"] == counts[1]["data"]["train"]
    assert packs == (counts[0]["data"]["train"]["rows"] < counts[0]["data"]["train"]["samples"])
    for note in resolved.notes:
        assert note in " ".join(shown.err.split())
        assert note in " ".join(trained.err.split())
        assert note in counts[0]["warnings"]
    assert bool(resolved.notes) != packs


def test_resolving_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from mla_tune.recipe.load import load_recipe\n"
        "from mla_tune.training.resolve import resolve\n"
        "resolve(load_recipe('all-linear', ['model.base=deepseek-v3']))\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_resolved_recipe_is_resolved_again_to_itself() -> None:
    """`train` resolves what a command has resolved already."""
    first = resolve(load_recipe("safe", ["model.base=kimi-linear-48b-a3b"]))
    second = resolve(first.recipe)
    assert second.recipe == first.recipe
    assert second.placement == first.placement
    assert re.search("train.packing: off", " ".join(first.notes))
