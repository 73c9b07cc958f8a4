"""transformers' Trainer with what training adapters on MLA needs: learning rates by role, the loss by chunks, gradient
norms by role with a guard against spikes, checkpoints that are whole or absent, a held-out loss that is a mean over
tokens, and a count of real (not padding) tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer

from mla_tune.data.stream import Stream
from mla_tune.runs import checkpoints
from mla_tune.training.distributed.deepspeed import gradient
from mla_tune.training.distributed.sampler import PaddedDistributedSampler, SetEpoch, is_dummy_row
from mla_tune.training.distributed.team import Team, gather_trained_weights, set_up_sharding
from mla_tune.training.held_out import held_out_figures
from mla_tune.training.objective import Collate, Objective
from mla_tune.training.spike_guard import Spike, SpikeGuard


class CountingCollator:
    """The collator, with the number of real tokens of the batch beside it."""

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
        #: Tokens trained on, of all processes, and what the others were told of a wish to stop.
        self.real_tokens = 0
        #: Rows that were trained on, of all processes: where a stream goes on.
        self.rows = 0
        self.wants_stop: Callable[[], bool] = lambda: False
        self.stop_agreed = False
        #: Of the step under way: its loss and tokens here, its gradients' norms by role, and the spike that it is.
        self.step_loss: list[torch.Tensor] = []
        self.step_tokens = 0
        self.role_norms: dict[str, float] = {}
        #: The objective's metrics: sums (M,) of each micro-batch of the step under way, here; units of the whole step;
        #: and means over the latest step.
        self.step_sums: list[torch.Tensor] = []
        self.step_count: torch.Tensor | float = 1.0
        self.step_metrics: dict[str, float] = {}
        self.spike: Spike | None = None
        self._staging: Path | None = None
        #: (step, held-out loss) of the latest evaluation
        self.last_evaluation: tuple[int, float] = (-1, math.nan)
        super().__init__(*args, **kwargs)
        # The loss is divided by the units of the whole step, so the Trainer must not divide it by the micro-batches.
        self.model_accepts_loss_kwargs = True

    # ---- many processes ----

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.team.is_distributed and self.team.here.sharding == "fsdp2":
            set_up_sharding(self.accelerator, full=not hasattr(self.model, "peft_config"))
            self.is_fsdp_enabled = True

    def get_train_dataloader(self) -> Any:
        if not isinstance(self.train_dataset, Stream):
            return super().get_train_dataloader()
        # Not through accelerate, which would share rows out among processes once more.
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
        """Norm of all gradients, as they are before clipping; a spike's are dropped: the step changes nothing."""
        squares: dict[str, torch.Tensor] = {}
        # DeepSpeed's optimizer has flat parameters of its own.
        groups = self.roles_of_handles or [(g["role"], g["params"]) for g in _groups_of(self.optimizer)]
        for role, parameters in groups:
            grads = [g for g in map(gradient, parameters) if g is not None]
            if grads:
                square = _square_of_norm(grads)
                squares[role] = squares[role] + square if role in squares else square
        scaler = self.accelerator.scaler
        scale = float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0
        values = torch.stack(list(squares.values())).tolist() if squares else []
        metrics = torch.stack(self.step_sums).sum(0).tolist() if self.step_sums else []
        loss, metrics, values = self._all_agree(float(torch.stack(self.step_loss).sum()), metrics, values)
        count = max(float(self.step_count), 1.0)
        self.step_metrics = {name: v / count for name, v in zip(self.objective.metrics, metrics, strict=True)}
        self.role_norms = {name: math.sqrt(v) / scale for name, v in zip(squares, values, strict=True)}
        total = math.sqrt(sum(values)) / scale
        self.step_loss, self.step_sums = [], []
        self.spike = None
        if scale != 1.0 and not math.isfinite(total):
            return total  # a float16 scale that was too large: the scaler skips the step and lowers it
        self.spike = self.guard.look(self.state.global_step + 1, loss, total)
        if self.spike is not None:
            for group in _groups_of(self.optimizer):
                for parameter in group["params"]:
                    parameter.grad = None
            if self.spike.cut is not None:
                self._cut(self.spike.cut)
        return total

    def _all_agree(
        self, loss: float, metrics: list[float], squares: list[float]
    ) -> tuple[float, list[float], list[float]]:
        """Return the step's loss and the sums of its metrics over all processes, and the first one's squared norms.

        They are the same to the last bit in all processes.  The step's tokens are counted on the way, and whether a
        process wants to stop.
        """
        tokens, stop = self.step_tokens, self.wants_stop()
        self.step_tokens = 0
        if self.team.is_distributed:
            sums = torch.tensor(
                [loss, tokens, stop, *metrics], dtype=torch.float64
            )  # on the CPU, whose group is always there
            norms = torch.tensor(squares, dtype=torch.float64)
            dist.all_reduce(sums)
            if self.roles_of_handles:
                dist.all_reduce(norms)  # of this process's shards as yet
            shared = torch.cat([sums, norms])
            dist.broadcast(shared, src=0)
            loss, tokens, stop, *rest = shared.tolist()
            metrics, squares = rest[: len(metrics)], rest[len(metrics) :]
            loss /= self.team.here.world_size
        self.real_tokens += int(tokens)
        self.stop_agreed = bool(stop)
        return loss, metrics, squares

    def _cut(self, factor: float) -> None:
        """Every learning rate from here on; the scheduler's own state carries it over a resume."""
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
            self.step_tokens += int(tokens)
        if self.objective.metrics:
            self.step_sums.append(
                torch.stack([found.metrics[name].detach().float() for name in self.objective.metrics])
            )
            self.step_count = count
        loss = found.loss / count.clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The count is of all processes, and their gradients are averaged.
            loss = loss * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_loss.append(loss)
        self.rows += self.args.per_device_train_batch_size * self.team.here.world_size
        return loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | None:
        """Units of the objective in all micro-batches of a step, of all processes."""
        if not batch_samples:
            return None
        count = torch.stack([self.objective.count(batch) for batch in batch_samples]).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()  # type: ignore[union-attr]
        return count

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the stock way walks over all parameters at every step."""
        return 0

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The objective's loss and metrics on the held-out rows, means over all their units (`held_out_figures`)."""
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
        """Of a sharded model only what is trained is gathered; the stock way gathers the base too."""
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
        """What the Trainer does not restore: guard, counted tokens, patience."""
        state = json.loads((checkpoint / checkpoints.STATE).read_text())
        self.guard.load(state["spike_guard"])
        self.real_tokens, self.rows = state["real_tokens"], state.get("rows", 0)
        if isinstance(self.train_dataset, Stream):
            self.train_dataset.load_state_dict(state["stream"])
        for callback, count in zip(self._early_stopping(), state["early_stopping"], strict=False):
            callback.early_stopping_patience_counter = count

    def _early_stopping(self) -> list[EarlyStoppingCallback]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]


def _groups_of(optimizer: Any) -> list[dict[str, Any]]:
    return getattr(optimizer, "optimizer", optimizer).param_groups  # accelerate wraps it


def _square_of_norm(grads: list[torch.Tensor]) -> torch.Tensor:
    """Σ g², float32; of sharded gradients over all shards."""
    norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads])
    total = norms.square().sum()
    return total.full_tensor() if hasattr(total, "full_tensor") else total  # type: ignore[operator]
