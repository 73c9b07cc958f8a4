"""`mla-tune merge-absorb` at the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.merging import make_adapter, make_base

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("made")
    base = make_base(root / "base", "minicpm3")
    return base, make_adapter(root / "run" / "adapter", base, target_modules=["kv_b_proj"])


def test_a_readable_summary(cli: Cli, made: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = made
    result = cli("merge-absorb", adapter.parent, "--base", base, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert "lora merged into minicpm3, float32" in result.out
    row = next(line for line in result.out.splitlines() if "W_UKV" in line)
    assert "100.0%" in row
    assert "changed   2 tensors" in result.out
    assert "absorbed  2 attention modules: tensors match the merged weights they come from" in result.out
    assert "logits    base + adapter (PEFT) vs merged: same top token" in result.out
    assert f"next: mla-tune generate {tmp_path / 'out'} --prompt" in result.out
    assert (tmp_path / "out" / "absorbed.safetensors").is_file()


def test_json_alone_on_standard_output(cli: Cli, made: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = made
    out = tmp_path / "out"
    common = ("merge-absorb", adapter, "--base", base, "--out", out, "--json")
    result = cli(*common, "--absorb", "none", "--dtype", "bfloat16")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report == json.loads((out / "merge_report.json").read_text())
    assert (report["dtype"], report["absorbed"]) == ("bfloat16", None)
    again = cli(*common, "--overwrite")
    assert json.loads(again.out)["absorbed"]["modules"] == 2


def test_errors_are_a_line_and_exit_code_2(cli: Cli, made: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = made
    result = cli("merge-absorb", tmp_path / "nothing", "--json")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"error: {tmp_path / 'nothing'}: no such folder")
    assert cli("merge-absorb", adapter, "--base", base, "--out", tmp_path / "out").code == 0
    result = cli("merge-absorb", adapter, "--base", base, "--out", tmp_path / "out")
    assert result.code == 2
    assert "replace it with --overwrite" in result.err
    assert "Traceback" not in result.err
    assert cli("merge-absorb", adapter, "--absorb", "twist").code == 2
    assert "no adapter: give a run folder" in cli("merge-absorb").err


def test_dry_run_reads_headers_and_writes_nothing(cli: Cli, made: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = made
    result = cli("merge-absorb", adapter, "--base", base, "--out", tmp_path / "out", "--dry-run")
    assert result.code == 0, result.err
    assert "changes  2 of 26 tensors: W_UKV 2" in result.out
    assert "files    1 written, 0 shared" in result.out
    assert not any(tmp_path.iterdir())
    plan = json.loads(cli("merge-absorb", adapter, "--base", base, "--dry-run", "--json").out)
    assert (plan["tensors_changed"], plan["files_written"]) == (2, ["model.safetensors"])
    size = (base / "model.safetensors").stat().st_size
    assert plan["bytes_read"] == pytest.approx(size, rel=0.05)
    assert plan["bytes_written"] == plan["bytes_total"] > plan["bytes_read"]


def test_weighted_adapters_by_name(cli: Cli, made: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = made
    other = make_adapter(tmp_path / "other", base, target_modules=["kv_b_proj", "o_proj"])
    common = ("--base", base, "--no-verify", "--json")
    result = cli("merge-absorb", adapter, "--adapter", f"{other}=0.3", *common, "--out", tmp_path / "a")
    weights = [(Path(a["path"]), a["weight"]) for a in json.loads(result.out)["adapters"]]
    assert weights == [(adapter, 1.0), (other, 0.3)]
    named = ("--adapter", f"{adapter}=-0.7", "--adapter", other)
    result = cli("merge-absorb", *named, *common, "--out", tmp_path / "b")
    assert [a["weight"] for a in json.loads(result.out)["adapters"]] == [-0.7, 1.0]
    result = cli("merge-absorb", adapter, *named, *common, "--out", tmp_path / "c")
    assert [a["weight"] for a in json.loads(result.out)["adapters"]] == [-0.7, 1.0], "named once, with its weight"
    assert cli("merge-absorb", "--adapter", f"{adapter}=nan", *common).code == 2
    result = cli("merge-absorb", adapter, "--adapter", tmp_path / "gone", *common)
    assert (result.code, "gone: no such folder" in result.err) == (2, True)
