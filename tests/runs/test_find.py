"""`mla-tune runs`: rows, states, folders that are broken, and widths."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from mla_tune.console import out as console


def make(folder: Path, state: str = "done", when: str = "2026-11-01T10:00:00+0000", **keys: Any) -> Path:
    folder.mkdir(parents=True)
    run = {
        "state": state,
        "base": "some/model",
        "environment": {"date": when},
        "adapter": {"method": "lora", "matrices": {"W_UQ": 4, "W_UKV": 4, "W_O": 4, "gate": 1}},
        "steps": {"done": 3, "planned": 5},
        "tokens_per_s": 123.4,
    }
    (folder / "run.json").write_text(json.dumps(run | keys))
    lines = [
        {"step": 0, "eval_loss": 3.0},
        {"step": 1, "loss": 3.1, "tokens_per_s": 50.0},
        {"step": 2, "loss": 9.0, "spike": {"what": "loss"}, "skipped": 1, "cut": 0.5, "tokens_per_s": 50.0},
        {"step": 2, "eval_loss": 1.25},
        {"step": 3, "loss": 2.5, "skipped": 1, "tokens_per_s": 60.0},
        {"step": 3, "eval_loss": 1.5},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def listed(cli: Any, *args: Any) -> list[dict[str, Any]]:
    done = cli("runs", *map(str, args), "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_a_run_is_a_row(cli, tmp_path: Path) -> None:
    make(tmp_path / "a")
    assert listed(cli, tmp_path) == [
        {
            "name": "a", "state": "done", "base": "some/model", "method": "lora",
            "targets": ["W_UQ", "W_UKV", "W_O", "gate"], "steps": 3, "planned": 5, "best_held_out_loss": 1.25,
            "best_step": 2, "last_loss": 2.5, "tokens_per_s": 123.4, "skipped": 1, "cuts": 1,
            "when": "2026-11-01T10:00:00+0000", "problem": None,
        }
    ]  # fmt: skip


def test_folders_are_found_three_deep_and_no_run_is_looked_into(cli, tmp_path: Path) -> None:
    for name in ("a", "b/c", "b/d/e", "b/d/f/g", "a/checkpoints"):
        make(tmp_path / name)
    assert [r["name"] for r in listed(cli, tmp_path, "--sort", "name")] == ["a", "b/c", "b/d/e"]
    assert [r["name"] for r in listed(cli, tmp_path / "a")] == ["a"]


def test_rows_are_sorted(cli, tmp_path: Path) -> None:
    make(tmp_path / "a", when="2026-11-01T10:00:00+0000")
    make(tmp_path / "b", state="failed", when="2026-11-01T10:00:00-0500")  # later than a
    (make(tmp_path / "c", when="2026-10-01T10:00:00+0000") / "metrics.jsonl").write_text(
        '{"step": 1, "eval_loss": 1}\n'
    )
    (make(tmp_path / "d", when="?") / "metrics.jsonl").unlink()
    order = {by: [r["name"] for r in listed(cli, tmp_path, "--sort", by)] for by in ("when", "loss", "name", "state")}
    assert order == {
        "when": ["b", "a", "c", "d"],
        "loss": ["c", "a", "b", "d"],
        "name": ["a", "b", "c", "d"],
        "state": ["a", "c", "d", "b"],
    }


def test_a_running_run_whose_process_is_gone_was_killed(cli, tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    host, started = platform.node(), psutil.Process(child.pid).create_time()
    process = {"pid": child.pid, "host": host, "started": started}
    make(tmp_path / "one", "running", process=process)
    make(tmp_path / "elsewhere", "running", process=process | {"host": "another"})
    make(tmp_path / "number-used-again", "running", process=process | {"started": started - 3600})
    make(tmp_path / "old", "running")

    def states() -> dict[str, str]:
        return {r["name"]: r["state"] for r in listed(cli, tmp_path)}

    rest = {"elsewhere": "unknown", "number-used-again": "killed", "old": "unknown"}
    assert states() == {"one": "running", **rest}
    child.communicate(b"\n")
    assert states() == {"one": "killed", **rest}


def test_train_records_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from mla_tune.runs.process import is_alive, this_process

    process = this_process()
    assert (process.pid, process.host) == (os.getpid(), platform.node())
    assert is_alive(process) is True


@pytest.mark.parametrize(
    "text", ['{"state": "do', "[]", "{}", '{"state": "done", "environment": 3}', '{"state": 1, "environment": {}, '
    '"adapter": [1]}', '{"state": "done", "environment": {}, "steps": {"done": "x"}}', "\xff", ""]
)  # fmt: skip
def test_a_broken_record_is_a_row_that_says_so(cli, tmp_path: Path, text: str) -> None:
    make(tmp_path / "good")
    (make(tmp_path / "bad") / "run.json").write_bytes(text.encode("latin-1"))
    bad, good = listed(cli, tmp_path, "--sort", "name")
    assert (bad["state"], good["state"]) == ("broken", "done")
    assert str(tmp_path / "bad" / "run.json") in bad["problem"]
    shown = cli("runs", str(tmp_path))
    assert shown.code == 0
    assert f"broken: {bad['problem']}" in shown.out


def test_metrics_that_are_cut_off_are_no_fault(cli, tmp_path: Path) -> None:
    with (make(tmp_path / "a") / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 2')
    assert listed(cli, tmp_path)[0]["last_loss"] == 2.5


def test_no_runs_and_no_folder(cli, tmp_path: Path) -> None:
    empty = cli("runs", str(tmp_path))
    assert (empty.code, "no run folders in" in empty.out) == (0, True)
    assert listed(cli, tmp_path) == []
    missing = cli("runs", str(tmp_path / "none"))
    assert (missing.code, "no such folder" in missing.err) == (2, True)


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    make(tmp_path / "deep" / "a-run-with-a-long-name-[bold]", base="/models/DeepSeek-V2-Lite-Chat")
    monkeypatch.setattr(console, "_width", width)
    lines = cli("runs", str(tmp_path)).out.splitlines()
    text = "".join(lines)
    assert max(map(len, lines)) <= width
    for figure in ("1.2500", "2.5000", "done", "11-01 10:00", "123"):
        assert figure in text
    if width == 120:
        assert "a-run-with-a-long-name-[bold]" in text
        assert "DeepSeek-V2-Lite-Chat · lora · W_UQ, W_UKV, W_O and 1 more" in text
