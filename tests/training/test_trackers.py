"""`output.report_to`: what a tracker is told, through transformers' own list of callbacks."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, ClassVar

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from mla_tune.training import trackers
from mla_tune.training.spike_guard import SpikeGuard


class Recorder(TrainerCallback):
    """Stands where a tracker's callback would; its class attribute outlives the run."""

    told: ClassVar[list[tuple[str, Any]]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.told.append(("begin", args.to_dict() | {"run_name": args.run_name}))
        json.dumps(args.to_sanitized_dict())
        json.loads(args.to_json_string())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.told.append(("log", dict(logs or {}) | {"step": state.global_step}))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.told.append(("end", None))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    Recorder.told = []
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "mlflow", Recorder)
    monkeypatch.setattr("mla_tune.training.resolve.find_spec", lambda name: object())
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return Recorder.told


def options(tmp_path: Path, *sets: str) -> list[str]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Say {i}.", "completion": f"{i}"}) + "\n" for i in range(40)))
    base = ["model.preset=tiny", "model.base=null", f"data.path={rows}", "train.max_steps=3", "train.batch_size=2"]
    base += ["train.max_length=64", "train.eval_every=0", "output.samples=0"]
    base += ["output.report_to=[mlflow]", *sets]
    return ["train", "--recipe", "safe", "--output", str(tmp_path / "my-run"), *(x for s in base for x in ("--set", s))]


def test_a_tracker_is_told_name_recipe_rates_norms_and_losses(cli, tmp_path: Path, told: list[Any]) -> None:
    assert cli(*options(tmp_path)).code == 0
    begin = next(what for kind, what in told if kind == "begin")
    assert begin["run_name"] == "my-run"
    assert begin["recipe.train.max_steps"] == 3
    assert begin["recipe.model.preset"] == "tiny"
    assert all(isinstance(v, (bool, int, float, str)) for k, v in begin.items() if k.startswith("recipe."))
    lines = [json.loads(line) for line in (tmp_path / "my-run/metrics.jsonl").read_text().splitlines()]
    logs = [what for kind, what in told if kind == "log" and "loss" in what]
    written = [line for line in lines if "loss" in line]
    assert len(logs) == len(written) == 3
    for log, line in zip(logs, written, strict=True):
        assert log["step"] == line["step"]
        assert {k[3:]: v for k, v in log.items() if k.startswith("lr/")} == line["learning_rate"]
        assert {k[10:]: v for k, v in log.items() if k.startswith("grad_norm/")} == line["grad_norms"]
        assert (log["spike"], log["spikes"], log["cuts"], log["tokens"]) == (0, 0, 0, line["tokens"])
    # Before, and after the last step: both before the tracker is closed, or it would open a second run.
    held_out = [what["step"] for kind, what in told if kind == "log" and "eval_loss" in what]
    assert held_out == [0, 3]
    assert told[-1][0] == "end"
    assert os.environ["WANDB_PROJECT"] == os.environ["MLFLOW_EXPERIMENT_NAME"] == "mla-tune"


@pytest.mark.slow
def test_spikes_reach_a_tracker(cli, tmp_path: Path, told: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpikeGuard, "limit", lambda self, what: 0.0 if self.values[what] else math.inf)
    assert cli(*options(tmp_path, "train.max_steps=4", "data.eval_fraction=0")).code == 0
    logs = [what for kind, what in told if kind == "log" and "loss" in what]
    assert [(log["spike"], log["spikes"], log["cuts"]) for log in logs] == [(0, 0, 0), (1, 1, 0), (1, 2, 0), (1, 3, 1)]


@pytest.mark.slow
def test_without_report_to_no_log_is_changed(cli, tmp_path: Path, told: list[Any]) -> None:
    assert cli(*options(tmp_path, "output.report_to=[]")).code == 0
    assert told == []


def test_a_tracker_that_is_missing_is_an_error_before_anything_is_read(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mla_tune.training.resolve.find_spec", lambda name: None if name == "wandb" else object())
    done = cli(*options(tmp_path, "output.report_to=[wandb, mlflow]", "data.path=/no/such/file.jsonl"))
    assert done.code == 2
    assert done.err == (
        "error: output.report_to: wandb is not installed; pip install 'mla-tune[log]', or take it out\n"
    )
    assert not (tmp_path / "my-run").exists()


def test_projects_that_the_user_named_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    trackers.name_projects()
    assert os.environ["WANDB_PROJECT"] == "theirs"
    assert os.environ.pop("MLFLOW_EXPERIMENT_NAME") == "mla-tune"


def test_tensorboard_files_lie_in_the_run_folder(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would put them under runs/ of the working folder, since it is told a figure before it begins."""

    class TensorBoardCallback(Recorder):
        logging_dir: str | None = None

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.told.append(("dir", self.logging_dir))

    Recorder.told = []
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", TensorBoardCallback)
    monkeypatch.setattr("mla_tune.training.resolve.find_spec", lambda name: object())
    assert cli(*options(tmp_path, "output.report_to=[tensorboard]", "train.max_steps=1")).code == 0
    assert {what for kind, what in Recorder.told if kind == "dir"} == {str(tmp_path / "my-run" / "tensorboard")}
