"""The middle of a run: adapt the model, build the Trainer, train, and write the result."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, PrinterCallback

from mla_tune.console import err, human_count
from mla_tune.data.prepare import optimizer_steps
from mla_tune.errors import Interrupted, WorkError
from mla_tune.model.attach import attach, freeze_unreached
from mla_tune.model.lora_init import initialize
from mla_tune.preflight.plan import role_rates
from mla_tune.report.card import card
from mla_tune.runs.checkpoints import number_of
from mla_tune.runs.record import HeldOutLoss, SampleAnswer, SpikeCounts, Steps, TrainedParameters
from mla_tune.training.callbacks import BeforeFirstStep, GradientCheck, MetricsWriter, ProgressLine, StopOnSignal
from mla_tune.training.distributed.deepspeed import gather_experts_as_unit, separate_optimizer_step
from mla_tune.training.distributed.sampler import with_dummy_row
from mla_tune.training.distributed.team import gather_trained_weights
from mla_tune.training.job import TrainingJob
from mla_tune.training.memory import memory_report
from mla_tune.training.optimizer import param_groups
from mla_tune.training.prepare_model import KernelConfig, prepare_model
from mla_tune.training.sample_answers import SamplePrompt, answer_prompts, sample_prompts
from mla_tune.training.save import save_result
from mla_tune.training.spike_guard import SpikeGuard
from mla_tune.training.trackers import add_trackers
from mla_tune.training.trainer import CountingCollator, RoleTrainer
from mla_tune.training.training_args import training_arguments


def train_adapter(job: TrainingJob, callbacks: Sequence[Any]) -> None:
    """Adapt the model of `job`, train it, and write the adapter (without one: the model) into the run folder.

    `callbacks`: further callbacks for the Trainer.  What is measured goes into `job.record`.  Raises `CheckError`,
    `WorkError` and `Interrupted` as `run.train` says.
    """
    model, kernels = _adapt_model(job)
    steps = optimizer_steps(job.recipe, job.data.train_rows, job.team.here.world_size)
    held_out = [row for source in job.data.sources for row in source.rows.held_out]
    prompts = sample_prompts(job.recipe, held_out, job.tokenizer, job.arch.max_position_embeddings)
    start = _BeforeTraining(job, model, prompts)
    stop = StopOnSignal(job.team.is_distributed)
    own = [BeforeFirstStep(start.measure), GradientCheck(), stop]
    trainer = _build_trainer(job, model, kernels, steps, [*own, *callbacks])
    start.trainer = trainer
    job.record.steps = Steps(number_of(job.checkpoint) if job.checkpoint else 0, steps)
    job.write_record()  # `runs` shows how far it is to go
    with stop:
        try:
            trainer.train(resume_from_checkpoint=str(job.checkpoint) if job.checkpoint else None)
        finally:
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, ProgressLine):
                    callback.close()
    done = _record_figures(job, trainer, start, steps)
    if stop.stopped and done < steps:
        raise Interrupted(
            f"stopped at step {done} of {steps}; the checkpoint is in {job.folder.last_checkpoint()}.\n"
            f"Go on with the same command and --resume"
        )
    if job.data.held_out_rows:
        fresh = trainer.last_evaluation[0] == done
        after = trainer.last_evaluation[1] if fresh else trainer.evaluate()["eval_loss"]
        if not math.isfinite(after):
            raise WorkError(f"after training the held-out loss is {after}; lower optimizer.learning_rate")
        assert job.record.held_out_loss is not None  # measured before training
        job.record.held_out_loss.after = after
    _record_answers("after", job, model, prompts)
    paths = [s.path for s in job.recipe.data.sources] or [job.recipe.data.path]
    weights = gather_trained_weights(model) if job.team.sharded else None

    def save() -> None:
        readme = card(job.folder.root, job.record, paths) if job.placement.method != "none" else None
        save_result(model, job.loaded, job.tokenizer, job.folder, job.placement, readme, weights)

    job.team.main_process_only(save)


def _adapt_model(job: TrainingJob) -> tuple[torch.nn.Module, KernelConfig]:
    """Attach the adapter, prepare the model for training, and record what is trained.

    The main process chooses the kernels for all processes.
    """
    placement, loaded, recipe, team = job.placement, job.loaded, job.recipe, job.team
    model: torch.nn.Module = loaded.model
    if placement.method != "none":
        model = attach(model, loaded.arch, placement, recipe.train.seed)
        initialize(model, placement, recipe.train.seed)
    elif frozen := freeze_unreached(model, loaded.arch):
        what = "towers and indexers" if loaded.arch.wrapper else "indexers"
        err.print(f"note: {human_count(frozen)} parameters of {what} stay frozen: text gives them no gradient")
    kernels = (
        prepare_model(model, loaded, recipe, job.data, job.objective, job.record.kernels)
        if team.is_main_process
        else None
    )
    job.record.kernels = team.broadcast(kernels.kernels if kernels else None)
    if kernels is None:
        kernels = prepare_model(model, loaded, recipe, job.data, job.objective, job.record.kernels)
    if team.uses_zero3:
        gather_experts_as_unit(model)
    for line in loaded.lines + kernels.lines:
        err.print(line, markup=False, soft_wrap=True)
    job.record.adapter = TrainedParameters(
        method=placement.method,
        matrices={r.value: len(placement.by_role(r)) for r in placement.roles},
        ranks={r.value: placement.by_role(r)[0].rank for r in placement.roles},
        params={r.value: sum(p.lora_params for p in placement.by_role(r)) for r in placement.roles},
        modules_to_save=dict(placement.modules_to_save),
        trainable_params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        learning_rate=role_rates(placement, recipe),
    )
    return model, kernels


def _build_trainer(
    job: TrainingJob, model: torch.nn.Module, kernels: KernelConfig, steps: int, callbacks: list[Any]
) -> RoleTrainer:
    recipe, data = job.recipe, job.data
    if job.team.is_main_process:
        metrics = MetricsWriter(job.folder.metrics, number_of(job.checkpoint) if job.checkpoint else 0)
        callbacks[2:2] = [metrics, ProgressLine(metrics)]
    if recipe.train.early_stopping:
        callbacks.append(EarlyStoppingCallback(recipe.train.early_stopping))
    rows = with_dummy_row if job.team.is_distributed else Dataset.from_list
    if data.streamed:
        data.train_rows.set_process(rank=job.team.here.rank, world_size=job.team.here.world_size)
    trainer = RoleTrainer(
        model=model,
        args=training_arguments(recipe, job.folder, job.loaded, steps, bool(data.held_out_rows)),
        data_collator=CountingCollator(job.objective.collator(kernels.collator(recipe, job.tokenizer))),
        train_dataset=data.train_rows if data.streamed else rows(data.train_rows),
        eval_dataset=rows(data.held_out_rows) if data.held_out_rows else None,
        processing_class=job.tokenizer,
        callbacks=callbacks,
        objective=job.objective,
        groups=lambda m: param_groups(m, job.placement, recipe),
        guard=SpikeGuard(recipe.train.spike),
        keep=recipe.train.keep_checkpoints,
        team=job.team,
    )
    trainer.remove_callback(PrinterCallback)
    for callback in callbacks:
        if hasattr(callback, "trainer"):
            callback.trainer = trainer
    add_trackers(trainer, recipe, job.folder.root)
    if job.checkpoint is not None:
        trainer.load_own_state(job.checkpoint)
    return trainer


class _BeforeTraining:
    """Measures the model before the first step, wrapped or sharded as it will train: answers and held-out loss."""

    trainer: RoleTrainer

    def __init__(self, job: TrainingJob, model: torch.nn.Module, prompts: list[SamplePrompt]) -> None:
        self.job, self.model, self.prompts = job, model, prompts
        self.began, self.tokens = time.monotonic(), 0

    def measure(self) -> None:
        """Measure, write run.json, and start the clock.  Raises `WorkError` if the held-out loss is not finite."""
        if self.job.team.uses_zero3:
            separate_optimizer_step(self.trainer)
        _record_answers("before", self.job, self.model, self.prompts)
        if self.job.data.held_out_rows and self.job.record.held_out_loss is None:
            loss = self.trainer.evaluate()["eval_loss"]
            if not math.isfinite(loss):
                raise WorkError(
                    f"before any training the held-out loss is {loss}: the base model or its dtype is broken"
                )
            self.job.record.held_out_loss = HeldOutLoss(before=loss)
        self.job.write_record()
        self.began, self.tokens = time.monotonic(), self.trainer.real_tokens


def _record_figures(job: TrainingJob, trainer: RoleTrainer, start: _BeforeTraining, steps: int) -> int:
    """Record steps, time, spikes and memory of the training, and return the number of steps done."""
    seconds = time.monotonic() - start.began
    done: int = trainer.state.global_step
    record = job.record
    record.steps, record.stopped_early = Steps(done, steps), done < steps
    record.seconds = round(record.seconds + seconds, 2)
    record.tokens_per_s = round((trainer.real_tokens - start.tokens) / seconds, 1)
    record.spikes = SpikeCounts(trainer.guard.skipped, trainer.guard.cuts)
    record.memory = memory_report(job.loaded.device, job.start_memory)
    if job.data.streamed:
        record.streamed = counts = job.data.train_rows.counts_at(trainer.rows)
        if counts["skipped"]:
            told = "\n  ".join(counts["faults"])
            err.print(f"data.on_invalid_row: skip: {counts['skipped']} rows were left out:\n  {told}", markup=False)
    return done


def _record_answers(
    when: Literal["before", "after"], job: TrainingJob, model: Any, prompts: list[SamplePrompt]
) -> None:
    """Let the model answer and record it; a resumed run keeps the answers from before its first start.

    All processes call it: a sharded model gathers its weights in every forward pass.
    """
    samples = job.record.samples
    samples.answers = samples.answers or [SampleAnswer(q.prompt, q.reference) for q in prompts]
    if not prompts or when in samples.seconds:
        return
    texts, samples.seconds[when] = answer_prompts(model, job.loaded, job.tokenizer, prompts)
    for entry, text in zip(samples.answers, texts, strict=False):
        setattr(entry, when, text)
    err.print(f"answered {len(prompts)} held-out prompts {when} training in {samples.seconds[when]:.1f} s")
