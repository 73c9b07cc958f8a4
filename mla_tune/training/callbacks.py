"""What happens beside the training step: the gradient check, metrics, progress, and a clean stop on Ctrl-C."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from mla_tune.console import err
from mla_tune.errors import CheckError
from mla_tune.model.attach import attached_loras
from mla_tune.model.modules_to_save import modules_to_save_copies
from mla_tune.training.distributed.deepspeed import gradient, is_handle
from mla_tune.training.spike_guard import Spike


class GradientCheck(TrainerCallback):
    """After the first backward pass every adapter has a finite, non-zero gradient, or the run stops and names those
    that don't.  (With B = 0, A's gradient is zero in the first step: one of the two has to be alive.)"""

    trainer: Any = None
    done = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
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


def gradient_problems(model: torch.nn.Module) -> list[str]:
    """A line for every LoRA (or, without adapters, every weight) whose gradient is missing, zero, or not finite."""
    problems = []
    loras = attached_loras(model)
    named = (
        [(a.parameter, [*a.layer.lora_A.parameters(), *a.layer.lora_B.parameters()]) for a in loras]
        if loras
        else [(n, [p]) for n, p in model.named_parameters() if p.requires_grad]
    )
    if loras:
        named += [(path, list(copy.parameters())) for path, copy in modules_to_save_copies(model).items()]
    there, odd, alive = _gradients([parameters for _, parameters in named])
    for i, (name, _) in enumerate(named):
        if not there[i]:
            problems.append(f"{name}: no gradient reached it")
        elif odd[i]:
            problems.append(f"{name}: its gradient is not finite")
        elif loras and not alive[i]:
            problems.append(f"{name}: its gradient is zero")
    return problems


def _gradients(groups: list[list[Any]]) -> list[list[int]]:
    """For each group of parameters whether it has a gradient, one that is not finite, one that is not zero; of sharded
    gradients all processes look at their part."""
    found = torch.zeros(3, len(groups), dtype=torch.int32)
    sharded = False
    for i, parameters in enumerate(groups):
        for parameter in parameters:
            grad: Any = gradient(parameter)
            if grad is None:
                continue
            sharded = sharded or is_handle(parameter)
            if hasattr(grad, "to_local"):
                sharded, grad = True, grad.to_local()
            found[0, i] = 1
            found[1, i] |= int(not torch.isfinite(grad).all())
            found[2, i] |= int(grad.any())
    if sharded:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.tolist()


class StopOnSignal(TrainerCallback):
    """Ctrl-C and SIGTERM: finish the step, save a checkpoint, stop.  A second one ends the process at once.

    Of many processes all stop after the same step, whichever of them was asked.
    """

    trainer: Any = None

    def __init__(self, many: bool = False) -> None:
        self.many = many
        self.asked = False
        #: Whether the run ends for it.
        self.stopped = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.wants_stop = lambda: self.asked

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        err.print("stopping after this step and saving a checkpoint (once more to stop at once)")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.stop_agreed if self.many else self.asked:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True


def _step_of(line: str) -> int:
    """-1 for a line that was cut when the process died or the disk was full."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return -1


class AtStart(TrainerCallback):
    """Work on the model as it is trained, wrapped or sharded, before its first step."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.work()


class Metrics(TrainerCallback):
    """One JSON line a logged step: `metrics.jsonl` of the run folder."""

    def __init__(self, path: Path, start_step: int) -> None:
        self.path = path
        self.trainer: Any = None
        kept = []
        if start_step and path.exists():  # a resumed run: what came after its checkpoint is written again
            kept = [line for line in path.read_text(errors="replace").splitlines() if 0 <= _step_of(line) <= start_step]
        path.write_text("".join(line + "\n" for line in kept))
        self.began = time.monotonic()
        self.tokens_before = 0
        self.spikes: list[Spike] = []

    def rate(self) -> float:
        """Real tokens a second of this process's run."""
        return (self.trainer.real_tokens - self.tokens_before) / max(time.monotonic() - self.began, 1e-9)

    def spikes_since_last_line(self) -> dict[str, Any]:
        """The latest skipped step's figures, and the product of all cuts."""
        found: dict[str, Any] = {}
        if self.spikes:
            found["spike"] = self.spikes[-1].to_json()
            cuts = [s.cut for s in self.spikes if s.cut is not None]
            if cuts:
                found["cut"] = math.prod(cuts)
        self.spikes = []
        return found

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
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
        self.began = time.monotonic()
        self.tokens_before = self.trainer.real_tokens


def _number(x: Any) -> float | None:
    """As JSON has it: no NaN, no infinity."""
    return float(x) if x is not None and math.isfinite(float(x)) else None


def rates_now(optimizer: Any) -> dict[str, float]:
    """Current learning rate of each role."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    return {g["role"]: g["lr"] for g in optimizer.param_groups} if optimizer is not None else {}


class ProgressLine(TrainerCallback):
    """A live line on a terminal; elsewhere a plain line ten times a run."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.text = ""
        self.bar: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
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
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
