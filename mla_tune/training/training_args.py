"""A recipe → transformers' TrainingArguments."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainingArguments

from mla_tune.model.load import Loaded
from mla_tune.recipe.schema import Recipe
from mla_tune.runs.folder import RunFolder
from mla_tune.training.trackers import PROJECT, flatten_recipe

#: `optimizer.schedule` of the recipe → transformers' name.
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


class RecipeTrainingArguments(TrainingArguments):
    """TrainingArguments that also give the trackers the recipe."""

    #: Set where a tracker is used.

    recipe: Recipe | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments and the flattened recipe; trackers log this as the run's configuration."""
        return super().to_dict() | (flatten_recipe(self.recipe) if self.recipe is not None else {})


def training_arguments(
    recipe: Recipe, folder: RunFolder, loaded: Loaded, steps: int, has_eval: bool
) -> TrainingArguments:
    """Return the Trainer's arguments.  `steps`: optimizer steps of the run; `has_eval`: there are held-out rows."""
    t, o = recipe.train, recipe.optimizer
    warmup = o.warmup_steps if o.warmup_steps is not None else round(o.warmup_ratio * steps)
    gpu = loaded.device.type == "cuda"
    evaluates = bool(t.eval_every) and has_eval
    found = RecipeTrainingArguments(
        output_dir=str(folder.checkpoints),
        per_device_train_batch_size=t.batch_size,
        per_device_eval_batch_size=t.batch_size,
        gradient_accumulation_steps=t.gradient_accumulation_steps,
        max_steps=steps,
        learning_rate=o.learning_rate,
        lr_scheduler_type=SCHEDULES[o.schedule],
        warmup_steps=warmup,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        max_grad_norm=o.max_grad_norm,
        optim="adamw_torch_fused" if gpu else "adamw_torch",
        bf16=loaded.dtype == "bfloat16",
        fp16=loaded.dtype == "float16",
        use_cpu=not gpu,
        gradient_checkpointing=t.activation_checkpointing == "full",
        gradient_checkpointing_kwargs={"use_reentrant": False},
        tf32=True if gpu and torch.cuda.get_device_capability() >= (8, 0) else None,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=t.eval_every or None,
        metric_for_best_model="eval_loss" if evaluates else None,
        greater_is_better=False if evaluates else None,
        save_strategy="steps" if t.save_every else "no",
        save_steps=t.save_every or 500,
        logging_steps=t.log_every,
        # A loss that is not a number must reach the log, and stop the run, instead of being averaged away.
        logging_nan_inf_filter=False,
        seed=t.seed,
        data_seed=t.seed,
        report_to=list(recipe.output.report_to) or "none",
        run_name=folder.root.resolve().name,
        project=PROJECT,
        disable_tqdm=True,
        remove_unused_columns=False,
        ignore_data_skip=recipe.data.streaming,  # a stream goes on by itself
        dataloader_pin_memory=gpu,
        ddp_broadcast_buffers=False,  # nothing changes them, and quantized weights are some
        ddp_find_unused_parameters=False,  # every adapter has a gradient in every step, which the first one checks
    )
    found.recipe = recipe if recipe.output.report_to else None
    found._n_gpu = min(found.n_gpu, 1)  # one process drives one GPU
    return found
