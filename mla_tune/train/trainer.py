"""TRL's SFTTrainer with three things changed: learning rates by role, a held-out loss that is a mean over tokens,
and a count of real (not padding) tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from trl.trainer.sft_trainer import SFTTrainer

from mla_tune.data.collate import Collator


class CountingCollator:
    """The collator, with the number of real tokens of the batch beside it."""

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.collator(features)
        batch["real_tokens"] = torch.tensor(sum(len(f["input_ids"]) for f in features))
        return batch


class RoleTrainer(SFTTrainer):
    """`groups` builds the optimizer's parameter groups from the model."""

    model: Any

    def __init__(self, *args: Any, groups: Callable[[torch.nn.Module], list[dict[str, Any]]], **kwargs: Any) -> None:
        self.groups = groups
        self.real_tokens = 0
        #: (step, held-out loss) of the latest evaluation
        self.last_evaluation: tuple[int, float] = (-1, math.nan)
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            target: torch.nn.Module = self.model if model is None else model  # type: ignore[assignment]
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, target)  # type: ignore[arg-type]
            kwargs.pop("lr", None)
            self.optimizer = cls(self.groups(target), **kwargs)
        return self.optimizer

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        tokens = inputs.pop("real_tokens", None)
        if tokens is not None and self.model.training:
            self.real_tokens += int(tokens)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss over all trained tokens of the held-out rows, in nats.

        The stock loop averages batch means, so its figure moves with batch size and packing; this one does not.
        """
        was_training = self.model.training
        self.model.eval()
        loader = self.get_eval_dataloader(eval_dataset)
        total = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for inputs in loader:
                inputs = self._prepare_inputs(inputs)
                count = int((inputs["labels"][:, 1:] != -100).sum())
                if count:
                    with self.compute_loss_context_manager():
                        loss = self.compute_loss(self.model, inputs)
                    total += torch.tensor([float(loss) * count, count], dtype=torch.float64)
        total = self.accelerator.reduce(total.to(self.args.device), reduction="sum")
        assert isinstance(total, torch.Tensor)
        loss_sum, tokens = total.tolist()
        metrics = {f"{metric_key_prefix}_loss": loss_sum / tokens if tokens else math.nan}
        self.last_evaluation = (self.state.global_step, metrics[f"{metric_key_prefix}_loss"])
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.model.train(was_training)
        return metrics
