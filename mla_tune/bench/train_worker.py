"""The process that trains one case of `bench train`: a share of the data for each line on standard input.

`bench.train` starts it as `python -m mla_tune.bench.train_worker`.  Standard input: a JSON line with the recipe's file,
the case and the number of rounds; then one line to start each round, and one to finish the run.  Standard output: a
JSON line when the warm-up is over, one for each round, and one with the figures of the whole run.  Everything else goes
to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import TrainerCallback

from mla_tune.bench.train_cases import CASES, TrainCase
from mla_tune.data.prepare import prepare
from mla_tune.model.load import load_model, silence_libraries
from mla_tune.model.tokenizer import load_tokenizer, tokenizer_source
from mla_tune.recipe.load import load_recipe
from mla_tune.recipe.schema import Recipe
from mla_tune.training.memory import memory_now, memory_peak
from mla_tune.training.resolve import resolve

#: Optimizer steps before times are measured: in them allocators fill, and kernels are chosen and compiled.
WARM_UP = 2


class Rounds(TrainerCallback):
    """After each share of the tokens, write its figures to `report`, and wait for a line on standard input.

    `total` is the number of real tokens of all training rows; `rounds` is the number of shares.
    """

    def __init__(self, total: int, rounds: int, report: TextIO) -> None:
        self.total, self.rounds, self.report = total, rounds, report
        self.trainer: Any = None
        self.done = self.steps = self.tokens_before = self.warm_up_tokens = 0
        self.start = self.seconds = 0.0
        self.tokens_now = 0

    def tokens(self) -> int:
        """Return the real tokens trained on so far."""
        return int(self.trainer.real_tokens)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """When the warm-up is over, report that, and wait for the first round to start."""
        if state.global_step == WARM_UP:
            _synchronize()
            _print(self.report, {"ready": True})
            self.warm_up_tokens = self.tokens()
            self._wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Update the figures of the round; at the end of a round, report them and wait for the next."""
        if state.global_step <= WARM_UP:
            return
        self.steps += 1
        # Measured at each step, so that work after the last one (callbacks, the end of the loader) counts in no round.
        _synchronize()
        self.seconds, self.tokens_now = time.perf_counter() - self.start, self.tokens()
        share = (self.total - self.warm_up_tokens) * (self.done + 1) / self.rounds
        if self.done < self.rounds - 1 and self.tokens() - self.warm_up_tokens >= share:
            self._report()
            self._wait()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the last round, and wait until the other cases have trained theirs."""
        self._report()
        sys.stdin.readline()  # the work that follows in `main` would disturb the other processes

    def _wait(self) -> None:
        sys.stdin.readline()
        self.steps, self.tokens_before = 0, self.tokens()
        self.start = time.perf_counter()

    def _report(self) -> None:
        _print(
            self.report, {"seconds": self.seconds, "tokens": self.tokens_now - self.tokens_before, "steps": self.steps}
        )
        self.done += 1


def main() -> None:
    """Run the case that standard input names (see the docstring of this module)."""
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to standard error
    silence_libraries()
    task = json.loads(sys.stdin.readline())
    recipe, case = load_recipe(task["recipe"]), CASES[task["case"]]
    rows = _rows(recipe)
    total = sum(len(r["input_ids"]) for r in rows["train"])
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    rounds = Rounds(total, task["rounds"], report)
    before = memory_now()
    trainer = _with_trl(recipe, case, rows["train"], rounds) if case.trl else _with_mla_tune(recipe, rounds)
    gpu = torch.cuda.is_available() and recipe.model.device != "cpu"
    peak = torch.cuda.max_memory_allocated() if gpu else memory_peak()
    _print(
        report,
        {
            "peak": peak,
            "run_peak": peak if gpu else peak - before,
            "activations": activations(trainer),
            "loss": held_out_loss(trainer, rows["held_out"]),
            "steps": trainer.state.global_step,
            "tokens": total,
            "rows": len(rows["train"]),
        },
    )


def _rows(recipe: Recipe) -> dict[str, list[dict[str, Any]]]:
    """Return the training rows and the held-out rows, one sample a row."""
    section = recipe.model
    unpacked = recipe.model_copy(update={"train": recipe.train.model_copy(update={"packing": False})})
    tokenizer = load_tokenizer(tokenizer_source(section), section.trust_remote_code)
    data = prepare(unpacked, resolve(recipe).arch, tokenizer)
    return {"train": list(data.train_rows), "held_out": list(data.held_out_rows)}


def _with_mla_tune(recipe: Recipe, rounds: Rounds) -> Any:
    """Train with mla-tune; return the trainer."""
    from mla_tune.training.run import train

    train(recipe, callbacks=[rounds])
    return rounds.trainer


def _with_trl(recipe: Recipe, case: TrainCase, rows: list[dict[str, Any]], rounds: Rounds) -> Any:
    """Train with SFTTrainer and the same tokens, model, adapter, batches, rates and schedule; return the trainer."""
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from mla_tune.model.attach import attach
    from mla_tune.training.training_args import SCHEDULES

    t, o = recipe.train, recipe.optimizer
    loaded = load_model(recipe.model, seed=t.seed)
    model = attach(loaded.model, loaded.arch, resolve(recipe).placement, t.seed)
    tokenizer = load_tokenizer(tokenizer_source(recipe.model), recipe.model.trust_remote_code)

    class TokenCountingTrainer(SFTTrainer):
        real_tokens = 0

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            mask = inputs.get("attention_mask")
            self.real_tokens += int(inputs["input_ids"].numel() if mask is None else mask.sum())
            return super().training_step(model, inputs, num_items_in_batch)

    training_arguments = SFTConfig(
        output_dir=str(Path(recipe.output.dir) / "trl"),
        per_device_train_batch_size=t.batch_size,
        gradient_accumulation_steps=t.gradient_accumulation_steps,
        num_train_epochs=t.epochs,
        max_steps=t.max_steps or -1,
        max_length=t.max_length,
        learning_rate=o.learning_rate * o.mla_lr_scale,
        lr_scheduler_type=SCHEDULES[o.schedule],
        warmup_steps=o.warmup_steps if o.warmup_steps is not None else o.warmup_ratio,
        max_grad_norm=o.max_grad_norm,
        seed=t.seed,
        use_cpu=loaded.device.type == "cpu",
        logging_steps=t.log_every,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **case.config,
    )
    columns = {"input_ids": [r["input_ids"] for r in rows], "labels": [r["labels"] for r in rows]}
    trainer: Any = TokenCountingTrainer(
        model=model, args=training_arguments, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer
    )
    trainer.add_callback(rounds)
    rounds.trainer = trainer
    trainer.train()
    return trainer


def activations(trainer: Any) -> int:
    """Return the bytes that a forward pass of the trainer's first batch keeps for the backward pass."""
    model = trainer.model_wrapped if trainer.model_wrapped is not None else trainer.model
    model.train()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))

    def forward() -> Any:
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(model, dict(inputs))

    forward()
    if torch.cuda.is_available() and next(trainer.model.parameters()).is_cuda:
        before = torch.cuda.memory_allocated()
        loss = forward()
        return torch.cuda.memory_allocated() - before + 0 * int(loss.requires_grad)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = forward()
    kept: int = sum(event.self_cpu_memory_usage for event in profiler.events() or [])
    return kept + 0 * int(loss.requires_grad)


@torch.no_grad()
def held_out_loss(trainer: Any, rows: list[dict[str, Any]]) -> float | None:
    """Return the mean loss over the trained tokens of the held-out rows, one row at a time, with stock attention."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.set_attn_implementation("sdpa")
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for row in rows:
        labels = torch.tensor(row["labels"][1:], device=device)
        logits = model(input_ids=torch.tensor([row["input_ids"]], device=device), use_cache=False).logits[0, :-1]
        trained = labels != -100
        total += float(torch.nn.functional.cross_entropy(logits[trained].float(), labels[trained], reduction="sum"))
        count += int(trained.sum())
    return total / count if count else None


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _print(stream: TextIO, document: dict[str, Any]) -> None:
    stream.write(json.dumps(document) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
