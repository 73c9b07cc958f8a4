"""`mla-tune merge-absorb` at the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.merge_helpers import make_adapter, make_base

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
    assert "checked: 2 tensors recomputed bit for bit" in result.out
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
    assert cli("merge-absorb", adapter, "--absorb", "fold").code == 2
