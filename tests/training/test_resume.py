"""`--resume` ends at the bits of an undisturbed run: after SIGTERM, a full disk, a damaged checkpoint, with dropout,
with a spike guard at work.  (Ctrl-C and kill -9: `test_train`.)"""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mla_tune.runs.checkpoints import checkpoints
from mla_tune.training.callbacks import MetricsWriter
from tests.helpers.runs import cut_back, hash_of, metrics, options, signaled
from tests.helpers.spikes import BAD, rows_with_bad_batches, run_in_order

LONG = ["train.max_steps=12", "train.packing=false", "output.samples=0"]


@pytest.mark.slow
def test_sigterm_saves_and_resume_with_dropout_ends_bit_equal(cli, rows_file: Path, tmp_path: Path) -> None:
    """As a scheduler sends it.  Dropout: the random numbers go on where they were."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    sets = [*LONG, "adapter.dropout=0.2"]
    assert cli("train", "--recipe", "attention-only", *options(rows_file, straight, *sets)).code == 0
    without = cli("train", "--recipe", "attention-only", *options(rows_file, tmp_path / "without", *LONG))
    assert without.code == 0
    assert hash_of(tmp_path / "without" / "adapter") != hash_of(straight / "adapter")

    done = signaled("TERM", "attention-only", options(rows_file, stopped, *sets))
    assert done.returncode == 128 + signal.SIGTERM or done.returncode == 130, done.stderr
    assert "Go on with the same command and --resume" in done.stderr
    assert json.loads((stopped / "run.json").read_text())["state"] == "interrupted"
    resumed = cli("train", "--recipe", "attention-only", "--resume", *options(rows_file, stopped, *sets))
    assert resumed.code == 0, resumed.err
    assert hash_of(stopped / "adapter") == hash_of(straight / "adapter")
    assert metrics(stopped) == metrics(straight)


def test_a_damaged_newest_checkpoint_falls_back_bit_equal(cli, rows_file: Path, tmp_path: Path) -> None:
    straight, damaged = tmp_path / "straight", tmp_path / "damaged"
    sets = [*LONG, "train.save_every=4", "train.keep_checkpoints=9"]
    assert cli("train", "--recipe", "safe", *options(rows_file, straight, *sets)).code == 0
    shutil.copytree(straight, damaged)
    cut_back(damaged, 8)
    weights = damaged / "checkpoints" / "checkpoint-8" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    resumed = cli("train", "--recipe", "safe", "--resume", *options(rows_file, damaged, *sets))
    assert resumed.code == 0, resumed.err
    assert "checkpoint-8 is damaged: adapter_model.safetensors was changed since it was written" in resumed.err
    assert "checkpoint-4, the newest that is whole" in resumed.err
    assert hash_of(damaged / "adapter") == hash_of(straight / "adapter")
    assert metrics(damaged) == metrics(straight)

    for checkpoint in checkpoints(damaged / "checkpoints"):
        (checkpoint / "files.json").unlink()
    refused = cli("train", "--recipe", "safe", "--resume", *options(rows_file, damaged, *sets))
    assert refused.code == 2
    assert "is whole; begin anew with --overwrite or another --output" in refused.err


# Files may not grow beyond so many bytes from the given step on, which the system then says in its own words.
FULL = """
import resource
from mla_tune.cli.app import main
from mla_tune.training.callbacks import MetricsWriter
log = MetricsWriter.on_log
def on_log(self, args, state, control, logs=None, **kwargs):
    if state.global_step == 7:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    log(self, args, state, control, logs=logs, **kwargs)
MetricsWriter.on_log = on_log
main()
"""


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before_it(cli, rows_file: Path, tmp_path: Path) -> None:
    straight, full = tmp_path / "straight", tmp_path / "full"
    sets = [*LONG, "train.save_every=4"]
    assert cli("train", "--recipe", "safe", *options(rows_file, straight, *sets)).code == 0
    command = [sys.executable, "-c", FULL, "train", "--recipe", "safe", *options(rows_file, full, *sets)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "the checkpoint of step 8 can't be written" in done.stderr
    assert "the last whole one is" in done.stderr
    assert "make room and go on with --resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert [p.name for p in (full / "checkpoints").iterdir()] == ["checkpoint-4"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    resumed = cli("train", "--recipe", "safe", "--resume", *options(rows_file, full, *sets))
    assert resumed.code == 0, resumed.err
    assert hash_of(full / "adapter") == hash_of(straight / "adapter")
    assert metrics(full) == metrics(straight)


@pytest.mark.slow
def test_a_full_disk_that_takes_no_line_more(
    cli,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    straight, full = tmp_path / "straight", tmp_path / "full"
    sets = [*LONG, "train.save_every=4"]
    assert cli("train", "--recipe", "safe", *options(rows_file, straight, *sets)).code == 0
    log = MetricsWriter.on_log

    def on_log(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6:
            with self.path.open("a") as f:
                f.write('{"step": 6, "lo')
            self.path = Path("/dev/full")
        log(self, args, state, control, **kwargs)

    monkeypatch.setattr(MetricsWriter, "on_log", on_log)
    done = cli("train", "--recipe", "safe", *options(rows_file, full, *sets))
    monkeypatch.undo()
    assert done.code == 1
    assert "full can't be written: No space left on device; the last whole checkpoint is" in done.err.replace("\n", " ")
    resumed = cli("train", "--recipe", "safe", "--resume", *options(rows_file, full, *sets))
    assert resumed.code == 0, resumed.err
    assert hash_of(full / "adapter") == hash_of(straight / "adapter")
    assert metrics(full) == metrics(straight)


@pytest.mark.slow
def test_the_spike_guard_goes_on_where_it_was(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between two bad steps in a row: the second one still cuts the learning rate, and the bits are equal."""
    data = rows_with_bad_batches(tmp_path / "rows.jsonl")
    sets = ["train.spike.patience=2", f"train.save_every={BAD[0]}", "train.keep_checkpoints=9"]
    straight = tmp_path / "straight"
    lines = run_in_order(cli, monkeypatch, data, straight, *sets)
    assert [line["step"] for line in lines if "cut" in line] == [BAD[1]]
    killed = tmp_path / "killed"
    shutil.copytree(straight, killed)
    cut_back(killed, BAD[0])
    again = run_in_order(cli, monkeypatch, data, killed, *sets, resume=True)
    assert hash_of(killed / "adapter") == hash_of(straight / "adapter")
    figures = ("step", "loss", "grad_norms", "learning_rate", "spike", "cut", "skipped", "tokens")
    assert [[x.get(k) for k in figures] for x in again] == [[x.get(k) for k in figures] for x in lines]


@pytest.mark.slow
def test_a_changed_recipe_is_shown_and_goes_on_only_when_allowed(cli, rows_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sets = [*LONG, "train.save_every=6"]
    assert cli("train", "--recipe", "safe", *options(rows_file, run, *sets)).code == 0
    cut_back(run, 6)
    changed = [*sets, "optimizer.learning_rate=5e-3", "train.max_steps=9"]
    refused = cli("train", "--recipe", "safe", "--resume", *options(rows_file, run, *changed))
    assert refused.code == 2
    assert "optimizer.learning_rate: 0.01 then, 0.005 now" in refused.err
    assert "train.max_steps: 12 then, 9 now" in refused.err
    assert "--allow-changes" in refused.err
    gone_on = cli("train", "--recipe", "safe", "--resume", "--allow-changes", *options(rows_file, run, *changed))
    assert gone_on.code == 0, gone_on.err
    assert "goes on with another recipe" in gone_on.err
    assert max(metrics(run)) == 9
    assert "learning_rate: 0.005" in (run / "recipe.yaml").read_text()
    alone = cli("train", "--recipe", "safe", "--allow-changes", *options(rows_file, tmp_path / "other", *LONG))
    assert alone.code == 2
    assert "--allow-changes" in alone.err
