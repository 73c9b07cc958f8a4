"""`RoleTrainer`: transformers' Trainer with what training adapters on MLA needs.

Learning rates and gradient norms by role, the loss of an `Objective` as a mean over the whole step, a guard against
spikes, checkpoints that are whole or absent, a held-out loss that is a mean over all units, and counts of real tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer

from mla_tune.data.stream import Stream
from mla_tune.runs import checkpoints
from mla_tune.training.distributed.sampler import PaddedDistributedSampler, SetEpoch, is_dummy_row
from mla_tune.training.distributed.team import Team, gather_trained_weights, set_up_sharding
from mla_tune.training.gradients import squared_norms
from mla_tune.training.held_out import held_out_figures
from mla_tune.training.objective import Collate, Objective
from mla_tune.training.spike_guard import Spike, SpikeGuard
from mla_tune.training.step_totals import StepTotals, agree


class CountingCollator:
    """Wraps a collator: its batches get `real_tokens`, the number of tokens that are no padding."""

    def __init__(self, collator: Collate) -> None:
        self.collator = collator

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.collator(features)
        batch["real_tokens"] = torch.tensor(sum(len(f["input_ids"]) for f in features if not is_dummy_row(f)))
        return batch


class RoleTrainer(Trainer):
    """transformers' `Trainer`, for one run.

    `objective` says what is minimized, `groups` builds the optimizer's parameter groups from the model, `guard` judges
    each step, `team` are the processes of the run, and `keep` is how many checkpoints stay.
    """

    model: Any

    def __init__(
        self,
        *args: Any,
        objective: Objective,
        groups: Callable[[torch.nn.Module], list[dict[str, Any]]],
        guard: SpikeGuard,
        team: Team,
        keep: int = 2,
        **kwargs: Any,
    ) -> None:
        self.objective = objective
        self.groups = groups
        self.guard = guard
        self.team = team
        self.keep = keep
        #: Real tokens trained on so far, of all processes.
        self.real_tokens = 0
        #: Rows trained on so far, of all processes: where a stream goes on.
        self.rows = 0
        #: Says whether this process was asked to stop; `stop_agreed`: one of the processes was.
        self.wants_stop: Callable[[], bool] = lambda: False
        self.stop_agreed = False
        #: Of the step under way: its sums, and the spike that it is.
        self.totals = StepTotals()
        self.spike: Spike | None = None
        #: Of the latest step: gradient norms by role, and means of the objective's metrics.
        self.role_norms: dict[str, float] = {}
        self.step_metrics: dict[str, float] = {}
        self._staging: Path | None = None
        #: (step, held-out loss) of the latest evaluation
        self.last_evaluation: tuple[int, float] = (-1, math.nan)
        super().__init__(*args, **kwargs)
        # The loss is divided by the units of the whole step, so the Trainer must not divide it by the micro-batches.
        self.model_accepts_loss_kwargs = True

    # ---- many processes ----

    def create_accelerator_and_postprocess(self) -> None:
        """Also set up FSDP2, where the run shards with it."""
        super().create_accelerator_and_postprocess()
        if self.team.is_distributed and self.team.here.sharding == "fsdp2":
            set_up_sharding(self.accelerator, full=not hasattr(self.model, "peft_config"))
            self.is_fsdp_enabled = True

    def get_train_dataloader(self) -> Any:
        """As transformers', but for a stream, which shares its rows out among the processes itself."""
        if not isinstance(self.train_dataset, Stream):
            return super().get_train_dataloader()
        size = self.args.per_device_train_batch_size
        pin = self.args.dataloader_pin_memory
        return DataLoader(self.train_dataset, batch_size=size, collate_fn=self.data_collator, pin_memory=pin)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.team.is_distributed:
            return super()._get_train_sampler(train_dataset)
        dataset: Any = train_dataset or self.train_dataset
        batch = self.args.per_device_train_batch_size * self.team.here.world_size
        sampler = PaddedDistributedSampler(len(dataset) - 1, batch, self.args.data_seed)
        self.add_callback(SetEpoch(sampler))
        return sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        if not self.team.is_distributed:
            return super()._get_eval_sampler(eval_dataset)
        return PaddedDistributedSampler(
            len(eval_dataset) - 1, self.args.per_device_eval_batch_size * self.team.here.world_size, None
        )

    # ---- optimizer ----

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Make AdamW with a parameter group for each role."""
        if self.optimizer is None:
            target: torch.nn.Module = self.model if model is None else model  # type: ignore[assignment]
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, target)  # type: ignore[arg-type]
            kwargs.pop("lr", None)
            groups = self.groups(target)
            self.roles_of_handles = [(g["role"], g["params"]) for g in groups] if self.team.uses_zero3 else []
            self.optimizer = cls(groups, **kwargs)
        return self.optimizer

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        total = self._judge()
        super()._clip_grad_norm(model)
        return total

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        return self._judge() if grad_norm is None else grad_norm

    def _judge(self) -> float:
        """Return the norm of all gradients before clipping, and let the spike guard judge the step.

        A spike's gradients are dropped, so the step changes nothing.
        """
        # DeepSpeed's optimizer has flat parameters of its own.
        groups = self.roles_of_handles or [(g["role"], g["params"]) for g in _groups_of(self.optimizer)]
        squares = squared_norms(groups)
        scaler = self.accelerator.scaler
        scale = float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0
        values = torch.stack(list(squares.values())).tolist() if squares else []
        step = agree(
            self.team,
            self.totals,
            stop=self.wants_stop(),
            squares=values,
            squares_of_shards=bool(self.roles_of_handles),
        )
        self.totals, self.spike = StepTotals(), None
        self.real_tokens += step.tokens
        self.stop_agreed = step.stop
        self.step_metrics = dict(zip(self.objective.metrics, step.metrics, strict=True))
        self.role_norms = {name: math.sqrt(v) / scale for name, v in zip(squares, step.squares, strict=True)}
        total = math.sqrt(sum(step.squares)) / scale
        if scale != 1.0 and not math.isfinite(total):
            return total  # a float16 scale that was too large: the scaler skips the step and lowers it
        self.spike = self.guard.judge(self.state.global_step + 1, step.loss, total)
        if self.spike is not None:
            for group in _groups_of(self.optimizer):
                for parameter in group["params"]:
                    parameter.grad = None
            if self.spike.cut is not None:
                self._cut(self.spike.cut)
        return total

    def _cut(self, factor: float) -> None:
        """Multiply every learning rate by `factor`, for the rest of the run.

        The scheduler's own state carries it over a resume.
        """
        scheduler: Any = self.lr_scheduler
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
        for group in _groups_of(self.optimizer):
            group["lr"] *= factor
            group["initial_lr"] *= factor

    # ---- loss ----

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The objective's loss, a mean over its units.

        `num_items_in_batch`: the units of the whole step; None: those of this batch.
        """
        tokens = inputs.pop("real_tokens", None)
        count = torch.as_tensor(self.objective.count(inputs) if num_items_in_batch is None else num_items_in_batch)
        found = self.objective.loss(model, inputs)
        if tokens is not None and self.model.training:
            self.totals.tokens += int(tokens)
        if names := self.objective.metrics:
            self.totals.metrics.append(torch.stack([found.metrics[name].detach().float() for name in names]))
            self.totals.count = count
        loss = found.loss / count.clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The count is of all processes, and their gradients are averaged.
            loss = loss * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward pass of a micro-batch; its loss and rows are counted."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.totals.losses.append(loss)
        self.rows += self.args.per_device_train_batch_size * self.team.here.world_size
        return loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | None:
        """Return the units of the objective in all micro-batches of a step, of all processes."""
        if not batch_samples:
            return None
        count = torch.stack([self.objective.count(batch) for batch in batch_samples]).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()  # type: ignore[union-attr]
        return count

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: operations are not counted, because the stock way walks over all parameters at every step."""
        return 0

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the objective's loss and metrics on the held-out rows (`held_out_figures`), and log them."""
        was_training = self.model.training
        self.model.eval()
        found = held_out_figures(self, self.get_eval_dataloader(eval_dataset))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.last_evaluation = (self.state.global_step, metrics[f"{metric_key_prefix}_loss"])
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.model.train(was_training)
        return metrics

    # ---- checkpoints ----

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder, step = Path(self.args.output_dir or "."), self.state.global_step
        with checkpoints.whole_or_absent(folder, step, self.team.is_main_process, self.team.wait) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
                if self.team.is_main_process:
                    (staging / f"checkpoint-{step}" / checkpoints.STATE).write_text(json.dumps(self._own_state()))
            finally:
                self._staging = None
        if self.team.is_main_process:
            checkpoints.keep_newest(folder, self.keep)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter (or the model).

        Of a sharded model only the trained parameters are gathered; the stock way gathers the base too.
        """
        if not self.team.sharded:
            super().save_model(output_dir, _internal_call)
            return
        weights = gather_trained_weights(self.model)
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)

    def _own_state(self) -> dict[str, Any]:
        stream = (
            {"stream": self.train_dataset.state_dict_at(self.rows)} if isinstance(self.train_dataset, Stream) else {}
        )
        return stream | {
            "rows": self.rows,
            "spike_guard": self.guard.state(),
            "real_tokens": self.real_tokens,
            "early_stopping": [c.early_stopping_patience_counter for c in self._early_stopping()],
        }

    def load_own_state(self, checkpoint: Path) -> None:
        """Restore from a checkpoint what the stock Trainer leaves out: spike guard, counts, stream, early stopping."""
        state = json.loads((checkpoint / checkpoints.STATE).read_text())
        self.guard.load_state(state["spike_guard"])
        self.real_tokens, self.rows = state["real_tokens"], state.get("rows", 0)
        if isinstance(self.train_dataset, Stream):
            self.train_dataset.load_state_dict(state["stream"])
        for callback, count in zip(self._early_stopping(), state["early_stopping"], strict=False):
            callback.early_stopping_patience_counter = count

    def _early_stopping(self) -> list[EarlyStoppingCallback]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]


def _groups_of(optimizer: Any) -> list[dict[str, Any]]:
    return getattr(optimizer, "optimizer", optimizer).param_groups  # accelerate wraps it
