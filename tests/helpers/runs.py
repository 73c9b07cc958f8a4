"""Training runs of the tests: the options of a short run, its metrics and hash, and ways to stop it."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

from mla_tune.runs.checkpoints import checkpoints

WORDS = ["red", "green", "blue", "one", "two", "three", "stone", "river", "light", "paper", "glass", "north"]


def options(rows: Path, out: Path, *sets: str) -> list[str]:
    """Arguments of `train`: four steps of the tiny preset on `rows` into the folder `out`, then the settings `sets`."""
    base = ["model.preset=tiny", "model.base=null", f"data.path={rows}", "train.max_steps=4", "train.batch_size=2"]
    base += ["train.max_length=64", "optimizer.learning_rate=1e-2", "optimizer.mla_lr_scale=0.5"]
    return ["--output", str(out), *(x for s in [*base, *sets] for x in ("--set", s))]


def metrics(out: Path, key: str = "loss") -> dict[int, float]:
    """Step → the value of `key`, from the run's metrics.jsonl."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {x["step"]: x[key] for x in lines if key in x}


# The process signals itself after it has logged step 5, so that no clock decides where it stops.
SIGNALED = """
import os, signal
from mla_tune.cli.app import main
from mla_tune.training.callbacks import MetricsWriter
log = MetricsWriter.on_log
def on_log(self, args, state, control, logs=None, **kwargs):
    log(self, args, state, control, logs=logs, **kwargs)
    if state.global_step == 5 and "loss" in logs:
        os.kill(os.getpid(), signal.SIG{name})
MetricsWriter.on_log = on_log
main()
"""


def signaled(name: str, recipe: str, args: list[str]) -> subprocess.CompletedProcess[str]:
    """Run `train` in a process of its own that gets SIGINT or SIGKILL after step 5."""
    command = [sys.executable, "-c", SIGNALED.replace("{name}", name), "train", "--recipe", recipe, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def hash_of(folder: Path) -> str:
    """SHA-256 of the weights of the adapter in `folder`."""
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def cut_back(run: Path, step: int) -> None:
    """As if the run had been killed some time after the checkpoint of `step`."""
    for checkpoint in checkpoints(run / "checkpoints"):
        if int(checkpoint.name.rpartition("-")[2]) > step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(run / "adapter")
