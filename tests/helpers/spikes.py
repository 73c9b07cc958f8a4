"""Runs with planted bad batches, for tests of the spike guard and of what resumes with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

STEPS, BAD = 18, (13, 14)


def rows_with_bad_batches(path: Path, bad: bool = True) -> Path:
    """Each row another short sum; in the steps of `BAD` text that a trained model finds absurd."""
    rows = []
    for i in range(STEPS):
        answer = " ".join(["b"] * 12)
        if i + 1 in BAD:
            if not bad:
                continue
            answer = "".join(chr(0x4E00 + 37 * i + 11 * k) for k in range(14))
        rows.append({"prompt": "say b", "completion": answer})
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    return path


def run_in_order(
    cli: Any, monkeypatch: pytest.MonkeyPatch, data: Path, out: Path, *sets: str, resume: bool = False
) -> list[dict[str, Any]]:
    """A run of one row a step, in the file's order; the lines of metrics.jsonl."""
    from torch.utils.data import SequentialSampler

    from mla_tune.training.trainer import RoleTrainer

    monkeypatch.setattr(RoleTrainer, "_get_train_sampler", lambda self, d=None: SequentialSampler(self.train_dataset))
    steps = len(data.read_text().splitlines())
    keys = [
        "train.packing=false", "train.batch_size=1", f"train.max_steps={steps}", "data.eval_fraction=0",
        "train.spike.window=8", "train.spike.width=6", "optimizer.learning_rate=5e-3", "optimizer.schedule=constant",
        "output.samples=0", *sets,
    ]  # fmt: skip
    options = [x for k in keys for x in ("--set", k)]
    command = ["train", "--recipe", "safe", "--output", str(out), "--set", f"data.path={data}", *options]
    command += ["--resume"] if resume else []
    done = cli(*command)
    assert done.code == 0, done.err
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
