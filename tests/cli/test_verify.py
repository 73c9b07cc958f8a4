"""`mla-tune verify` at the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from mla_tune.merge.run import merge_absorb
from tests.helpers.merging import edit_json, edit_tensors, load, make_adapter, make_base

Cli = Callable[..., Any]
KEY = "model.layers.1.self_attn.kv_b_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    base = make_base(root / "base", "minicpm3", "bfloat16")
    adapter = make_adapter(root / "run" / "adapter", base, target_modules=["kv_b_proj"])
    (root / "run" / "run.json").write_text(json.dumps({"base_path": str(base)}))
    merge_absorb(adapter, base, root / "out", logits=False)
    PeftModel.from_pretrained(load(base), adapter).merge_and_unload().save_pretrained(root / "peft")
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "place")
    manifest = tmp_path / "place" / "out" / "mla_tune_manifest.json"
    manifest.write_text(manifest.read_text().replace(str(made), str(tmp_path / "place")))
    return tmp_path / "place"


def damage(folder: Path, key: str = KEY) -> None:
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors[key].view(-1)[7:8].neg_() and None)


def test_our_output_by_its_manifest(cli: Cli, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = cli("verify", made / "out", "--no-logits")
    assert (result.code, result.err) == (0, "")
    first, *rest = result.out.splitlines()
    assert first == f"{made / 'out'}: adapter merged into {made / 'base'}"
    assert rest == [
        "proven by reading the output again and comparing it with base and adapter:",
        "changed   2 tensors, 4.2 K numbers: each is base + adapter, rounded to nearest",
        "unchanged 24 tensors: each equals the base's, byte for byte",
        "absorbed  2 attention modules: tensors match the merged weights they come from",
        "logits    not compared (--no-logits)",
    ]
    monkeypatch.chdir(made)
    assert cli("verify", "out", "--base", "base", "--adapter", "run", "--no-logits").code == 0


def test_logits_are_compared(cli: Cli, made: Path) -> None:
    result = cli("verify", made / "out", "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert document["logits"]["ran"]
    assert document["logits"]["absorbed"]["max_error"] < 1e-3
    lines = cli("verify", made / "out").out.splitlines()[5:]
    assert lines[0] == "logits    base + adapter (PEFT) vs merged: same top token 16 of 16 times;"
    assert lines[2] == "          merged vs absorbed attention: same top token 16 of 16 times;"
    assert all("largest difference" in line and "KL divergence" in line for line in lines[1::2])


def test_another_tools_output(cli: Cli, made: Path) -> None:
    result = cli("verify", made / "peft", "--no-logits")
    assert result.code == 2
    assert "peft: has no mla_tune_manifest.json that says what it was merged from: name the adapters" in result.err
    result = cli("verify", made / "peft", "--adapter", made / "run", "--no-logits", "--json")
    document = json.loads(result.out)
    assert result.code == 0
    assert (document["holds"], document["proof"]["strict"], document["proof"]["recomputed"]) == (True, False, 2)
    assert document["adapters"] == [{"path": str(made / "run" / "adapter"), "weight": 1.0}]
    assert document["base"] == str(made / "base"), "the one that the run recorded"
    result = cli("verify", made / "peft", "--adapter", f"{made / 'run'}=0.5", "--no-logits")
    assert result.code == 1


def test_what_fails_is_named_and_exits_1(cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    damage(place / "out")
    result = cli("verify", place / "out")
    assert result.code == 1
    assert (
        f"error: {place / 'out'}: 3 tensors or files are not what merging the adapters into the base gives"
        in result.err
    )
    assert "Traceback" not in result.err
    for words in (KEY, "1 of 2,100 numbers is wrong", "model.layers.1.self_attn.W_U", "model.safetensors", "sha256"):
        assert words in result.out
    result = cli("verify", place / "out", "--json")
    document = json.loads(result.out)
    assert (result.code, document["holds"], document["proof"]["failed"], document["logits"]) == (1, False, 3, None)
    assert {f["key"] for f in document["proof"]["failures"]} > {KEY, "model.safetensors"}


def test_a_long_list_is_cut(cli: Cli, place: Path) -> None:
    edit_tensors(place / "peft" / "model.safetensors", lambda t: [x.add_(1) for x in t.values()] and None)
    result = cli("verify", place / "peft", "--adapter", place / "run", "--no-logits")
    assert result.code == 1
    assert "and 6 more" in result.out.splitlines()
    assert sum("model." in line for line in result.out.splitlines()[1:]) <= 20


def test_files_that_have_changed_or_are_gone(cli: Cli, place: Path) -> None:
    config = place / "out" / "generation_config.json"
    size = config.stat().st_size
    config.write_bytes(b"x" * size)
    (place / "out" / "absorbed.safetensors").unlink()
    (place / "out" / "config.json").write_text((place / "out" / "config.json").read_text() + "\n")
    result = cli("verify", place / "out", "--no-logits", "--json")
    found = {f["key"]: f["what"] for f in json.loads(result.out)["proof"]["failures"]}
    assert result.code == 1
    assert found["generation_config.json"] == "has changed since it was written (its sha256 differs)"
    assert found["absorbed.safetensors"] == "was written by the merge and is missing"
    assert "when it was written" in found["config.json"]
    assert len(found) == 3


def test_an_adapter_that_has_changed_is_noted(cli: Cli, place: Path) -> None:
    weights = place / "run" / "adapter" / "adapter_model.safetensors"
    edit_tensors(weights, lambda tensors: [tensor.mul_(2) for tensor in tensors.values()] and None)
    result = cli("verify", place / "out", "--no-logits", "--json")
    document = json.loads(result.out)
    assert result.code == 1
    assert document["notes"] == [f"{weights} is not the file that merge-absorb read, or has changed since"]
    assert not document["proof"]["strict"]
    assert f"note: {weights} is not the file that merge-absorb read" in cli("verify", place / "out", "--no-logits").out


def test_another_base_is_noted(cli: Cli, place: Path) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({key: tensor.float() for key, tensor in tensors.items()})

    edit_tensors(place / "base" / "model.safetensors", widen)
    result = cli("verify", place / "out", "--no-logits", "--json")
    document = json.loads(result.out)
    assert (result.code, document["proof"]["strict"]) == (0, False), "the same numbers in float32"
    assert document["notes"] == [f"{place / 'base'} is not the base that merge-absorb read, or has changed since"]


def test_a_moved_adapter_with_the_same_content_is_the_same(cli: Cli, place: Path) -> None:
    (place / "run").rename(place / "moved")
    assert cli("verify", place / "out", "--no-logits").code == 2
    result = cli("verify", place / "out", "--adapter", place / "moved" / "adapter", "--no-logits", "--json")
    assert json.loads(result.out)["proof"]["strict"]
    (place / "base").rename(place / "elsewhere")
    result = cli("verify", place / "out", "--adapter", place / "moved" / "adapter", "--no-logits")
    assert (result.code, "which is gone: name its folder with --base" in result.err) == (2, True)
    named = ("--adapter", place / "moved" / "adapter", "--base", place / "elsewhere")
    assert cli("verify", place / "out", *named, "--no-logits").code == 0


def test_bad_input_is_a_line_and_exit_code_2(cli: Cli, place: Path) -> None:
    result = cli("verify", place / "nothing", "--json")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"error: {place / 'nothing'}: no such folder")
    assert cli("verify", place / "out", "--adapter", place / "nothing").code == 2
    (place / "out" / "mla_tune_manifest.json").write_text("{}")
    assert "is damaged, or of another version of mla-tune" in cli("verify", place / "out").err
    file = place / "run" / "adapter" / "adapter_model.safetensors"
    edit_tensors(file, lambda t: [x.fill_(torch.nan) for x in t.values()] and None)
    assert "holds NaN" in cli("verify", place / "peft", "--adapter", place / "run").err
    edit_json(place / "run" / "adapter" / "adapter_config.json", peft_type="IA3")
    assert cli("verify", place / "peft", "--adapter", place / "run").code == 2


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_it_readably(width: int, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    import mla_tune.report.merge_tables as tables

    proof = {"recomputed": 44_021, "numbers": 671_000_000_000, "unchanged": 47_970, "same_files": 3, "absorbed": 61}
    way = {"reference": "base + adapters", "other": "merged", "max_error": 0.0123, "largest": 31.2, "kl": 1e-5}
    logits = {
        "ran": True,
        "reason": "",
        "tokens": 16,
        "idle": False,
        "merged": way | {"top1": 0.97},
        "absorbed": way | {"top1": 1},
    }
    old, tables.out = tables.out, Console(width=width, force_terminal=True, no_color=True, highlight=False)
    try:
        tables.print_proof(proof | {"worst_ulp": 0.5}, logits)
    finally:
        tables.out = old
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line.rstrip()) <= width for line in lines)
    assert all(line[:10].rstrip() in ("", "changed", "unchanged", "absorbed", "logits") for line in lines[1:])
    assert len(lines) <= 12
