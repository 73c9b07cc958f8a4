"""The guard against spikes: its bands, its patience, and a planted bad batch in a real run."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mla_tune.errors import WorkError
from mla_tune.recipe.schema import SpikeSection
from mla_tune.training.spike_guard import SpikeGuard
from tests.helpers.spikes import BAD, STEPS, rows_with_bad_batches, run_in_order


def guard_with(values: list[float], **keys: Any) -> SpikeGuard:
    guard = SpikeGuard(SpikeSection(window=8, width=4.0, patience=2, cut=0.25, **keys))
    for step, value in enumerate(values):
        assert guard.judge(step, value, 10 * value) is None
    return guard


STEADY = [1.00, 1.05, 0.95, 1.02, 0.98, 1.01, 0.99, 1.03]


def test_the_band_is_median_and_absolute_deviation() -> None:
    guard = guard_with(STEADY)
    middle = statistics.median(STEADY)
    sigma = 1.4826 * statistics.median(abs(v - middle) for v in STEADY)
    assert guard.limit("loss") == pytest.approx(middle + 4 * sigma)
    assert guard.judge(9, guard.limit("loss") * 0.999, 10) is None
    spike = guard_with(STEADY).judge(9, middle + 4 * sigma + 0.01, 10)
    assert spike is not None
    assert (spike.what, spike.cut) == ("loss", None)


@pytest.mark.parametrize("window, needed", [(8, 8), (64, 16)])
def test_it_is_silent_before_the_band_is_there(window: int, needed: int) -> None:
    for count in (needed - 1, needed):
        guard = SpikeGuard(SpikeSection(window=window))
        for step in range(count):
            assert guard.judge(step, 1.0, 1.0) is None
        assert (guard.judge(count, 50.0, 1.0) is None) == (count < needed)


def test_a_gradient_norm_alone_is_a_spike() -> None:
    spike = guard_with(STEADY).judge(9, 1.0, 500.0)
    assert spike is not None
    assert (spike.what, spike.value) == ("grad_norm", 500.0)


def test_a_skipped_step_stays_out_of_the_band() -> None:
    guard = guard_with(STEADY)
    before = guard.limit("loss")
    assert guard.judge(9, 100.0, 10.0) is not None
    assert guard.limit("loss") == before
    assert guard.judge(10, 1.0, 10.0) is None
    assert guard.in_a_row == 0


def test_patience_cuts_the_rate_and_begins_a_new_band() -> None:
    guard = guard_with(STEADY)
    first, second = guard.judge(9, 9.0, 10.0), guard.judge(10, 9.0, 10.0)
    assert first is not None
    assert second is not None
    assert (first.cut, second.cut) == (None, 0.25)
    assert (guard.skipped, guard.cuts) == (2, 1)
    assert guard.judge(11, 9.0, 10.0) is None  # the new level is no spike


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_finite_number_is_a_spike_and_stops_after_patience(value: float) -> None:
    guard = guard_with(STEADY)
    assert guard.judge(9, value, 1.0) is not None
    with pytest.raises(WorkError, match=f"step 10: the loss is {value}, for 2 steps in a row"):
        guard.judge(10, value, 1.0)


def test_without_a_guard_no_step_is_skipped_but_nan_stops() -> None:
    guard = SpikeGuard(SpikeSection(guard=False, window=8))
    for step in range(9):
        assert guard.judge(step, 1.0, 1.0) is None
    assert guard.judge(12, 1e9, 1e9) is None
    with pytest.raises(WorkError, match="step 13: the gradient norm is nan"):
        guard.judge(13, 1.0, math.nan)


def test_state_comes_back() -> None:
    guard = guard_with(STEADY)
    guard.judge(9, 9.0, 10.0)
    other = SpikeGuard(guard.section)
    other.load_state(json.loads(json.dumps(guard.state())))
    assert other.state() == guard.state()
    spike = other.judge(10, 9.0, 10.0)
    assert spike is not None
    assert spike.cut == 0.25


# ---- in a run ----


@pytest.mark.slow
def test_a_planted_bad_batch_is_skipped_and_counted(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = rows_with_bad_batches(tmp_path / "rows.jsonl")
    lines = run_in_order(cli, monkeypatch, data, tmp_path / "run", "train.spike.patience=3")
    steps = {line["step"]: line for line in lines if "loss" in line}
    assert [n for n, line in steps.items() if "spike" in line] == list(BAD)
    assert steps[STEPS]["skipped"] == len(BAD)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["spikes"] == {"skipped": len(BAD), "cuts": 0}
    # Weights and moments are as they were: without the bad rows the run ends at the same bits.
    good = rows_with_bad_batches(tmp_path / "good.jsonl", bad=False)
    run_in_order(cli, monkeypatch, good, tmp_path / "without", "train.spike.patience=3")
    with_bad, without = (load_file(tmp_path / d / "adapter" / "adapter_model.safetensors") for d in ("run", "without"))
    assert all(torch.equal(with_bad[k], without[k]) for k in with_bad)


def test_patience_cuts_the_rate_of_a_run(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = rows_with_bad_batches(tmp_path / "rows.jsonl")
    lines = run_in_order(cli, monkeypatch, data, tmp_path / "run", "train.spike.patience=2", "train.spike.cut=0.25")
    steps = {line["step"]: line for line in lines if "loss" in line}
    assert steps[BAD[-1]]["cut"] == 0.25
    for role, rate in steps[BAD[0]]["learning_rate"].items():
        assert steps[STEPS]["learning_rate"][role] == pytest.approx(rate / 4)


@pytest.mark.slow
def test_the_key_turns_it_off(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = rows_with_bad_batches(tmp_path / "rows.jsonl")
    lines = run_in_order(cli, monkeypatch, data, tmp_path / "run", "train.spike.guard=false")
    assert not [line for line in lines if "spike" in line]
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["spikes"] == {"skipped": 0, "cuts": 0}
