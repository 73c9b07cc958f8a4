"""`output.report_to`: TensorBoard, W&B, MLflow and trackio through transformers' own callbacks.

transformers sends; this module adds what it does not know of: learning rates and gradient norms by role, spikes, the
recipe as the run's configuration, the run's name, and the held-out loss of the last step before the trackers close.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from mla_tune.recipe.schema import Recipe
from mla_tune.training.callbacks import rates_now

#: Name of the project (W&B, trackio) or experiment (MLflow) that runs go to, unless the user names another.
PROJECT = "mla-tune"


def name_projects() -> None:
    """Set the environment variables by which transformers' callbacks name the project, where the user has not."""
    os.environ.setdefault("WANDB_PROJECT", PROJECT)
    os.environ.setdefault("MLFLOW_EXPERIMENT_NAME", PROJECT)


def flatten_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as one flat dictionary, `recipe.train.max_steps: 20` and so on: trackers take no nested ones."""
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
    """Adds to the logs that the trackers get.  It has to come before their callbacks.

    `evaluates`: the run has held-out rows, so they are evaluated once more at the last step.
    """

    def __init__(self, evaluates: bool) -> None:
        self.evaluates = evaluates
        self.trainer: Any = None
        self.spikes = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count spikes, and let the Trainer evaluate at the last step."""
        self.spikes += self.trainer.spike is not None
        # Trackers close at the end of training: an evaluation after it would open a second run.
        if self.evaluates and state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add to the figures of a step."""
        if logs is None or "loss" not in logs:
            return
        logs |= {f"lr/{role}": rate for role, rate in rates_now(kwargs.get("optimizer")).items()}
        logs |= {f"grad_norm/{role}": norm for role, norm in self.trainer.role_norms.items()}
        logs |= {"spike": self.spikes, "spikes": self.trainer.guard.skipped, "cuts": self.trainer.guard.cuts}
        logs |= self.trainer.step_metrics
        logs["tokens"] = self.trainer.real_tokens
        self.spikes = 0


def add_trackers(trainer: Any, recipe: Recipe, root: Path) -> None:
    """Add `TrackerLogs` before the trackers' callbacks, and let TensorBoard write into the run folder `root`."""
    if not recipe.output.report_to:
        return
    ours = TrackerLogs(trainer.eval_dataset is not None)
    ours.trainer = trainer
    trainer.callback_handler.callbacks.insert(0, ours)
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ == "TensorBoardCallback" and callback.logging_dir is None:
            callback.logging_dir = str(root / "tensorboard")
