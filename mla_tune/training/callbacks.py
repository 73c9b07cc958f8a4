"""The Trainer's callbacks: the gradient check, metrics.jsonl, the progress line, and a clean stop on Ctrl-C."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from mla_tune.console import err
from mla_tune.errors import CheckError
from mla_tune.training.gradients import gradient_problems
from mla_tune.training.spike_guard import Spike


class GradientCheck(TrainerCallback):
    """Checks after the first backward pass that every adapter has a gradient that is finite and not zero."""

    #: The `RoleTrainer`; set before training.
    trainer: Any = None
    #: Whether the check was made.
    done = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the check once.  Raises `CheckError` with the adapters that don't learn (`gradient_problems`)."""
        if self.done or self.trainer.spike is not None:  # a spike's gradients are gone
            return
        self.done = True
        problems = gradient_problems(kwargs["model"])
        if problems:
            shown = "\n  ".join(problems[:20])
            more = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise CheckError(
                f"after the first step {len(problems)} adapters are not learning; stopped:\n  {shown}{more}"
            )


class StopOnSignal(TrainerCallback):
    """On Ctrl-C or SIGTERM finishes the step, saves a checkpoint and stops.  A second signal ends the process at once.

    As a context manager it takes the signals over.  In a run of several processes (`is_distributed`) all stop after the
    same step, whichever of them got the signal.
    """

    #: The `RoleTrainer`; set before training.
    trainer: Any = None

    def __init__(self, is_distributed: bool = False) -> None:
        self.is_distributed = is_distributed
        #: Whether this process got a signal.
        self.asked = False
        #: Whether the run stops because of a signal.
        self.stopped = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the trainer tell the other processes of a signal."""
        self.trainer.wants_stop = lambda: self.asked

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        err.print("stopping after this step and saving a checkpoint (once more to stop at once)")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop, if a process got a signal."""
        if self.trainer.stop_agreed if self.is_distributed else self.asked:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True


def _step_of(line: str) -> int:
    """Return the step of a line of metrics.jsonl; -1 for one that was cut off when the process died."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return -1


class BeforeFirstStep(TrainerCallback):
    """Calls a function before the first step, when the model is wrapped or sharded as it will train."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call it."""
        self.function()


class MetricsWriter(TrainerCallback):
    """Writes metrics.jsonl: a JSON line for each logged step and each evaluation.

    `start_step` is the step that a resumed run goes on from: lines after it are deleted, since they are written again.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        self.path = path
        self.trainer: Any = None
        kept = []
        if start_step and path.exists():
            kept = [line for line in path.read_text(errors="replace").splitlines() if 0 <= _step_of(line) <= start_step]
        path.write_text("".join(line + "\n" for line in kept))
        self.began = time.monotonic()
        self.tokens_before = 0
        self.spikes: list[Spike] = []

    def rate(self) -> float:
        """Return real tokens a second since the training began."""
        return (self.trainer.real_tokens - self.tokens_before) / max(time.monotonic() - self.began, 1e-9)

    def spikes_since_last_line(self) -> dict[str, Any]:
        """Return `spike`, the latest skipped step, and `cut`, the product of all cuts, if there were any."""
        found: dict[str, Any] = {}
        if self.spikes:
            found["spike"] = self.spikes[-1].to_json()
            cuts = [s.cut for s in self.spikes if s.cut is not None]
            if cuts:
                found["cut"] = math.prod(cuts)
        self.spikes = []
        return found

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the user of a skipped step."""
        spike = self.trainer.spike
        if spike is None:
            return
        self.spikes.append(spike)
        cut = f"; every learning rate × {spike.cut:g} from here on" if spike.cut is not None else ""
        what = spike.what.replace("_", " ")
        err.print(
            f"step {state.global_step} skipped: {what} {spike.value:.4g} is above its band ({spike.limit:.4g}){cut}",
            soft_wrap=True,
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write a line, of a step (`loss`) or an evaluation (`eval_loss`)."""
        logs = dict(logs or {})
        if "train_runtime" in logs:
            return
        line: dict[str, Any] = {"step": state.global_step}
        if "loss" in logs:
            trainer = self.trainer
            line |= {"loss": _number(logs["loss"]), "grad_norm": _number(logs.get("grad_norm"))}
            line["grad_norms"] = {role: _number(norm) for role, norm in trainer.role_norms.items()}
            line["learning_rate"] = rates_now(kwargs.get("optimizer"))
            line["tokens"] = trainer.real_tokens
            line["tokens_per_s"] = round(self.rate(), 1)
            if trainer.step_metrics:
                line["metrics"] = {name: _number(value) for name, value in trainer.step_metrics.items()}
            if trainer.guard.skipped:
                line["skipped"] = trainer.guard.skipped
            line |= self.spikes_since_last_line()
        if "eval_loss" in logs:
            line["eval_loss"] = float(logs["eval_loss"])
            if names := self.trainer.objective.metrics:
                line["eval_metrics"] = {name: _number(logs[f"eval_{name}"]) for name in names}
        if len(line) > 1:
            with self.path.open("a") as f:
                f.write(json.dumps(line) + "\n")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.began = time.monotonic()
        self.tokens_before = self.trainer.real_tokens


def _number(x: Any) -> float | None:
    """Return a float, or None for what JSON does not have: NaN and infinity."""
    return float(x) if x is not None and math.isfinite(float(x)) else None


def rates_now(optimizer: Any) -> dict[str, float]:
    """Return the current learning rate of each role; empty without an optimizer."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    return {g["role"]: g["lr"] for g in optimizer.param_groups} if optimizer is not None else {}


class ProgressLine(TrainerCallback):
    """Shows progress on standard error: a live line on a terminal, elsewhere a plain line ten times a run."""

    def __init__(self, metrics: MetricsWriter) -> None:
        self.metrics = metrics
        self.text = ""
        self.bar: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the line."""
        self.first, self.total = state.global_step, state.max_steps
        if err.is_terminal:
            columns = [
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=None),
                TextColumn("{task.description}"),
            ]
            self.bar = Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=err)
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total, completed=self.first)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show loss, learning rate and speed."""
        if not logs or "loss" not in logs:
            return
        seconds = max(time.monotonic() - self.metrics.began, 1e-9)
        rate = self.metrics.rate()
        top = max(rates_now(kwargs.get("optimizer")).values(), default=0.0)
        self.text = f"loss {float(logs['loss']):.3f}  lr {top:.1e}  {rate:,.0f} tok/s"
        done = state.global_step - self.first
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step, description=self.text)
        elif done and state.global_step % max(1, self.total // 10) == 0:
            left = seconds / done * (self.total - state.global_step)
            print(f"step {state.global_step}/{self.total}  {self.text}  {left:.0f} s left", file=sys.stderr, flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the step."""
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the line away."""
        self.close()

    def close(self) -> None:
        """Take the line away, also where training ended by an error.  May be called twice."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
