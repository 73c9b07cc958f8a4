"""`plan`: what it prints is what train then does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mla_tune.preflight.plan import plan
from mla_tune.recipe.load import load_recipe
from mla_tune.training.resolve import resolve
from tests.helpers.runs import options


def document(cli, *args: str) -> dict:
    done = cli("plan", *args, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def planned(recipe: str, sets: list[str]) -> dict:
    r = resolve(load_recipe(recipe, sets))
    return plan(r.recipe, r.arch, r.placement, r.quantized, data=None, steps=None, gpu=False, dtype="float32")


@pytest.mark.slow
def test_plan_and_run_agree(cli, rows_file: Path, tmp_path: Path) -> None:
    sets = options(rows_file, tmp_path / "run", "adapter.roles={W_O: {rank: 4, lr_scale: 0.5}}")[2:]
    planned = document(cli, "--recipe", "all-linear", *sets)
    done = cli("train", "--recipe", "all-linear", "--output", str(tmp_path / "run"), *sets)
    assert done.code == 0, done.err
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["adapter"]["trainable_params"] == planned["trainable_params"]
    assert run["adapter"]["learning_rate"] == planned["learning_rate"]
    assert planned["learning_rate"]["W_O"] == pytest.approx(1e-2 * 0.5 * 0.5)
    assert run["steps"]["planned"] == planned["steps"]
    assert run["data"] == planned["data"]
    on_disk = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_size
    assert on_disk == pytest.approx(planned["adapter_bytes"], rel=0.1)
    last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-2]
    assert json.loads(last)["tokens"] == pytest.approx(planned["tokens"], rel=0.1)


@pytest.mark.slow
def test_epochs_become_steps(cli, rows_file: Path, tmp_path: Path) -> None:
    sets = options(rows_file, tmp_path / "run", "train.packing=false", "train.max_steps=null", "train.epochs=2")[2:]
    planned = document(cli, "--recipe", "safe", *sets)
    samples = planned["data"]["train"]["rows"]
    assert planned["steps"] == 2 * -(-samples // 2)
    done = cli("train", "--recipe", "safe", "--output", str(tmp_path / "run"), *sets)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"]["done"] == planned["steps"]


@pytest.mark.parametrize(
    "recipe, sets, words",
    [
        ("W_UKV-priority", [], "W_UKV, served unmerged: vLLM would leave it out without an error"),
        ("all-linear", [], "a cached prefix can't be shared"),
        ("all-linear", [], "experts_gate_up, experts_down, served unmerged"),
        ("attention-only", ["adapter.method=dora"], "dora, served unmerged"),
        ("safe", ["optimizer.mla_lr_scale=0.4"], "0.5 to 0.8"),
        ("safe", ["optimizer.lora_plus_ratio=16"], "makes the rate of B 0.0208"),
    ],
)
def test_warnings(recipe: str, sets: list[str], words: str) -> None:
    document = planned(recipe, sets)
    assert any(words in w for w in document["warnings"])


def test_safe_warns_of_nothing() -> None:
    assert planned("safe", [])["warnings"] == []


def test_a_671_b_model_is_planned_without_weights(cli) -> None:
    planned = document(cli, "--recipe", "safe", "--no-data", "--set", "model.base=deepseek-v3")
    assert planned["params_total"] == pytest.approx(671.0e9, rel=1e-3)
    assert len(planned["adapted"]) == 61 + 3 * 3 + 58 * 3


@pytest.mark.parametrize("columns", ["80", "120"])
def test_the_table_fits_the_terminal(cli, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    done = cli("plan", "--recipe", "all-linear", "--no-data")
    assert done.code == 0, done.err
    table = [line for line in done.out.splitlines() if line.startswith(("role", "W_", "experts"))]
    assert len(table) == 8
    assert all(len(line) <= int(columns) for line in table)
