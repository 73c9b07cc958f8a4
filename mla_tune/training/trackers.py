"""`output.report_to`: TensorBoard, W&B, MLflow and trackio through transformers' own callbacks.

Theirs is the transport; ours is what they would not get: rates, gradient norms by role and spikes, the recipe as the
run's configuration, a name, and the held-out loss of the last step before they close.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from mla_tune.recipe.schema import Recipe
from mla_tune.training.callbacks import rates_now

#: Under which experiments, projects and spaces collect runs, unless the user says otherwise.
PROJECT = "mla-tune"


def name_projects() -> None:
    """Where runs go, as transformers' callbacks read it; what the user has set stays."""
    os.environ.setdefault("WANDB_PROJECT", PROJECT)
    os.environ.setdefault("MLFLOW_EXPERIMENT_NAME", PROJECT)


def flat(recipe: Recipe) -> dict[str, Any]:
    """`recipe.train.max_steps: 20`, …: trackers take one level, and MLflow no long values."""
    found: dict[str, Any] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, below in value.items():
                walk(f"{name}.{key}", below)
        else:
            found[name] = value if isinstance(value, (bool, int, float, str)) else str(value)

    walk("recipe", recipe.model_dump(mode="json"))
    return found


class TrackerLogs(TrainerCallback):
    """Has to come before the trackers' callbacks: it adds to the logs that they get."""

    def __init__(self, evaluates: bool) -> None:
        self.evaluates = evaluates
        self.trainer: Any = None
        self.spikes = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.spikes += self.trainer.spike is not None
        # Trackers close at the end of training: an evaluation after it would open a second run.
        if self.evaluates and state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        logs |= {f"lr/{role}": rate for role, rate in rates_now(kwargs.get("optimizer")).items()}
        logs |= {f"grad_norm/{role}": norm for role, norm in self.trainer.role_norms.items()}
        logs |= {"spike": self.spikes, "spikes": self.trainer.guard.skipped, "cuts": self.trainer.guard.cuts}
        logs |= self.trainer.step_metrics
        logs["tokens"] = self.trainer.real_tokens
        self.spikes = 0


def add_trackers(trainer: Any, recipe: Recipe, root: Path) -> None:
    """Put `TrackerLogs` before the callbacks of transformers, and TensorBoard's files into the run folder."""
    if not recipe.output.report_to:
        return
    ours = TrackerLogs(trainer.eval_dataset is not None)
    ours.trainer = trainer
    trainer.callback_handler.callbacks.insert(0, ours)
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ == "TensorBoardCallback" and callback.logging_dir is None:
            callback.logging_dir = str(root / "tensorboard")
