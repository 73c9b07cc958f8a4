"""`mla-tune bench train` on a tiny model: the cases do the same work, and errors name what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

SETS = ["model.preset=tiny", "model.base=null", "train.batch_size=2", "train.max_length=64", "data.limit=null"]


def options(rows: Path, cases: str, rounds: int = 2) -> list[str]:
    sets = [x for s in [*SETS, f"data.path={rows}"] for x in ("--set", s)]
    return ["bench", "train", "--cases", cases, "--rounds", str(rounds), *sets]


@pytest.mark.slow
def test_all_cases_do_the_same_work(cli, rows_file: Path, tmp_path: Path) -> None:
    done = cli(*options(rows_file, "none,mla,trl"), "--json", "--out", tmp_path)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert json.loads((tmp_path / "train.json").read_text()) == found
    ours, mla, trl = found["cases"]
    assert [len(c["seconds"]) for c in found["cases"]] == [2, 2, 2]
    assert all(0 < sum(c["tokens"]) <= found["tokens"] for c in found["cases"])
    assert mla["activations"] < ours["activations"]
    assert mla["loss"] == pytest.approx(ours["loss"], rel=1e-5)
    assert trl["loss"] == pytest.approx(ours["loss"], rel=0.05)
    assert trl["steps"] > ours["steps"]  # its rows are not packed


def test_the_table(cli, rows_file: Path) -> None:
    done = cli(*options(rows_file, "none", 1))
    assert done.code == 0, done.err
    assert "preset tiny, lora on safe; " in done.out
    assert "tokens/s" in done.out
    assert max(len(line) for line in done.out.splitlines()[1:]) <= 80


@pytest.mark.parametrize("cases, words", [("none,liger", "unknown liger"), ("", "no case given")])
def test_an_unknown_case(cli, rows_file: Path, cases: str, words: str) -> None:
    done = cli(*options(rows_file, cases))
    assert done.code == 2
    assert words in done.err
    assert "allowed: none, unpacked, mla, full" in done.err


@pytest.mark.slow
def test_a_case_that_fails_says_why(cli, rows_file: Path) -> None:
    done = cli(*options(rows_file, "none"), "--set", "data.prompt=question")
    assert done.code == 1
    assert "bench: none ended with exit code" in done.err
    assert "question" in done.err


def test_a_recipe_that_cant_be_trained_is_refused_before_any_case_starts(cli, rows_file: Path) -> None:
    done = cli(*options(rows_file, "none"), "--set", "adapter.targets=[W_Q]")
    assert done.code == 2
    assert done.err.startswith("error: adapter.targets: this DeepSeek-V3 model has no W_Q")
