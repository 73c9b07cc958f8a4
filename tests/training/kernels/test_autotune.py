"""Kernels by measurement: the fastest wins, a kernel that fails is out, a choice is kept and repeats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mla_tune.arch.build import architecture
from mla_tune.training.kernels import autotune as choose
from mla_tune.training.kernels import packed_attention as packed
from mla_tune.training.kernels.autotune import autotune_attention, autotune_experts
from tests.helpers.runs import options
from tests.helpers.tiny_families import FAMILIES, tiny

ROWS = [[5, 9], [7]]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLA_TUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "choices.json"


def attention(dtype: torch.dtype = torch.float32) -> choose.AutotuneResult:
    return autotune_attention(architecture(FAMILIES["deepseek_v3"]), ROWS, CPU, dtype)


def timed(monkeypatch: pytest.MonkeyPatch, *times: float) -> list[Any]:
    """Candidates take these milliseconds in turn; returns the list of measurements made."""
    made: list[Any] = []

    def milliseconds(run: Any, device: Any) -> float:
        run()
        made.append(run)
        return times[(len(made) - 1) % len(times)]

    monkeypatch.setattr(choose, "_milliseconds", milliseconds)
    return made


@pytest.mark.parametrize("times, winner", [((1.0, 2.0), packed.NAME), ((2.0, 1.0), "sdpa")])
def test_the_fastest_wins(monkeypatch: pytest.MonkeyPatch, times: tuple[float, float], winner: str) -> None:
    made = timed(monkeypatch, *times)
    choice = attention()
    assert choice.name == winner
    assert choice.tried == {packed.NAME: times[0], "sdpa": times[1]}
    assert len(made) == 2 * choose.ROUNDS
    assert choice.line() == f"attention: {winner} (mla_tune_packed {times[0]:.1f} ms, sdpa {times[1]:.1f} ms)"


def test_a_choice_is_kept_for_the_same_shapes_only(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    timed(monkeypatch, 1.0, 2.0)
    assert attention().name == packed.NAME
    timed(monkeypatch, 2.0, 1.0)
    again = attention()
    assert (again.name, again.remembered) == (packed.NAME, True)
    assert again.line().endswith("measured earlier)")
    assert attention(torch.bfloat16).name == "sdpa"
    own_cache.write_text("{damaged")
    assert attention().name == "sdpa"


def test_a_kernel_that_fails_is_out_and_its_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("head dim 26 is not a multiple of 8\nmore")

    monkeypatch.setitem(choose.ALL_ATTENTION_FUNCTIONS._global_mapping, packed.NAME, broken)
    monkeypatch.setattr(packed, "register", lambda: packed.NAME)
    choice = attention()
    assert choice.name == "sdpa"
    assert choice.tried[packed.NAME] == "head dim 26 is not a multiple of 8"


def test_where_no_candidate_works_the_first_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no")

    for name in (packed.NAME, "sdpa"):
        monkeypatch.setitem(choose.ALL_ATTENTION_FUNCTIONS._global_mapping, name, broken)
    monkeypatch.setattr(packed, "register", lambda: packed.NAME)
    assert attention().name == packed.NAME


def test_experts_are_timed_and_the_model_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("deepseek_v3")
    model.set_experts_implementation("grouped_mm")
    timed(monkeypatch, 3.0, 1.0)
    choice = autotune_experts(model, architecture(FAMILIES["deepseek_v3"]), choose.EXPERTS, CPU)
    assert choice.name == "eager"
    assert model.config._experts_implementation == "grouped_mm"
    assert all(p.grad is None for p in model.parameters())


def test_batched_mm_which_copies_a_weight_for_each_token_is_no_candidate() -> None:
    assert "batched_mm" not in choose.EXPERTS


def test_a_run_says_what_it_chose_and_a_resumed_one_keeps_it(
    cli,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own_cache: Path,
) -> None:
    timed(monkeypatch, 1.0, 2.0)
    out = tmp_path / "run"
    sets = ["train.max_steps=4", "train.save_every=2", "output.samples=0"]
    done = cli("train", "--recipe", "safe", *options(rows_file, out, *sets))
    assert done.code == 0, done.err
    assert "attention: mla_tune_packed (mla_tune_packed 1.0 ms, sdpa 2.0 ms)" in done.err
    chosen = json.loads((out / "run.json").read_text())["kernels"]
    assert chosen == {"attention": packed.NAME, "experts": "grouped_mm"}
    own_cache.unlink()
    timed(monkeypatch, 2.0, 1.0)  # on another machine the others would win
    resumed = cli("train", "--recipe", "safe", "--resume", *options(rows_file, out, *sets))
    assert resumed.code == 0, resumed.err
    assert "attention:" not in resumed.err
    assert json.loads((out / "run.json").read_text())["kernels"] == chosen
