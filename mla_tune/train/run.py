"""`train`: a recipe → a run folder with an adapter, metrics, and the held-out loss before and after."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, PrinterCallback

from mla_tune.adapter.placement import Placement, place
from mla_tune.arch.registry import architecture
from mla_tune.console import err
from mla_tune.data.prepare import Prepared, prepare, steps_of
from mla_tune.errors import InputError, Interrupted, WorkError
from mla_tune.model.attach import attach
from mla_tune.model.initialise import initialise
from mla_tune.model.load import Loaded, base_hash, load_model, quantised_kind, quiet
from mla_tune.model.tokenizer import load_tokenizer, tokenizer_source
from mla_tune.recipe.checks import check_quantised
from mla_tune.recipe.schema import Recipe
from mla_tune.report.card import card
from mla_tune.report.process import this_process
from mla_tune.report.run_report import write_report
from mla_tune.resources import EMBEDDED_MODEL
from mla_tune.survey.plan import role_rates
from mla_tune.survey.source import load_config
from mla_tune.train.arguments import arguments
from mla_tune.train.callbacks import GradientCheck, Metrics, ProgressLine, StopOnSignal
from mla_tune.train.checkpoints import newest_whole, number_of
from mla_tune.train.folder import RunFolder, check_folder, environment, make_folder, write_recipe
from mla_tune.train.memory import memory_advice, memory_now, memory_report
from mla_tune.train.optim import param_groups
from mla_tune.train.prepare import prepare_model
from mla_tune.train.samples import Question, answer, questions
from mla_tune.train.save import base_of, save_result
from mla_tune.train.spike import SpikeGuard
from mla_tune.train.trackers import add_trackers, check_trackers, name_projects
from mla_tune.train.trainer import CountingCollator, RoleTrainer

#: No space, over quota, file too large, read-only now, broken.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def train(
    recipe: Recipe, *, resume: bool = False, allow_changes: bool = False, callbacks: Sequence[Any] = ()
) -> dict[str, Any]:
    """Run a recipe to its end (with `resume`, from its newest whole checkpoint) and return the contents of run.json.

    `allow_changes`: resume although recipe, data or base changed since; what did is told.  `callbacks`: further ones of
    transformers' kind; their `trainer` is set where they have it.

    Everything that can be wrong with the input is found before weights are read or a file is written.  Raises
    `InputError`/`FileError` for the input, `CheckError` if the adapter attached or its gradients are not as planned,
    `WorkError` for a failure of the work, `Interrupted` when stopped by a signal (a checkpoint is saved).
    """
    quiet()
    check_trackers(recipe)
    name_projects()
    folder, difference = check_folder(recipe, resume, allow_changes)
    checkpoint = _checkpoint(folder) if resume else None
    section = recipe.model
    config, where, _ = load_config(section.preset or section.base or "embedded")
    arch = architecture(config, where)
    placement = place(arch, recipe.adapter)
    check_quantised(recipe, quantised_kind(section, config))
    tokenizer = load_tokenizer(tokenizer_source(section), section.trust_remote_code)
    data = prepare(recipe, arch, tokenizer)
    for line in data.lines:
        err.print(line, markup=False, soft_wrap=True)
    if recipe.train.early_stopping and not data.held_out_rows:
        raise InputError("train.early_stopping needs held-out rows: set data.eval_fraction or data.eval_path")
    start_memory = memory_now()
    with memory_advice(recipe):
        loaded = load_model(section, seed=recipe.train.seed, full_precision=placement.method == "none", quantised=True)
    if not resume:
        make_folder(folder, recipe)
    elif difference:
        err.print(f"--allow-changes: goes on with another recipe:\n{difference}", markup=False, soft_wrap=True)
        write_recipe(folder, recipe)
    base = base_of(loaded, tokenizer, recipe, folder)

    run: dict[str, Any] = folder.read() if resume else {}
    origin = {
        "base_hash": base_hash(str(EMBEDDED_MODEL) if base == "embedded" else base),
        "data": data.summary(),
    }
    changed = [name for name in origin if resume and run[name] != origin[name]]
    if changed:
        what = " and ".join({"base_hash": "the base model", "data": "the data"}[name] for name in changed)
        if not allow_changes:
            raise InputError(
                f"--resume: {what} changed since {folder.root} was begun; start anew in another folder, or go on with "
                "--allow-changes"
            )
        err.print(f"--allow-changes: {what} changed since the run was begun", soft_wrap=True)
    run |= {
        "state": "running",
        "process": this_process(),
        "working_folder": str(Path.cwd()),
        "recipe": str(folder.recipe),
        "model_type": arch.model_type,
        "base": section.source,
        "base_path": base,
        **origin,
        "seed": recipe.train.seed,
        "device": str(loaded.device),
        "dtype": loaded.dtype,
        "quantised": loaded.quantised,
        "environment": environment(),
    }
    folder.write(run)
    try:
        with memory_advice(recipe):
            _run(recipe, folder, loaded, tokenizer, placement, data, run, checkpoint, start_memory, callbacks)
    except BaseException as error:
        run["state"] = "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"
        run["error"] = str(error) or type(error).__name__
        with contextlib.suppress(OSError):  # on a full disk that would hide the error itself
            folder.write(run)
        if isinstance(error, OSError) and error.errno in FULL:
            raise _disk_is_full(folder, error) from error
        if not isinstance(error, KeyboardInterrupt):  # asked to stop at once
            show_run(folder, run)
        raise
    return run


def _run(
    recipe: Recipe,
    folder: RunFolder,
    loaded: Loaded,
    tokenizer: Any,
    placement: Placement,
    data: Prepared,
    run: dict[str, Any],
    checkpoint: Path | None,
    start_memory: int,
    further: Sequence[Any],
) -> None:
    model: torch.nn.Module = loaded.model
    if placement.method != "none":
        model = attach(model, loaded.arch, placement, recipe.train.seed)
        initialise(model, placement, recipe.train.seed)
    ways = prepare_model(model, loaded, recipe, data, run.get("chosen"))
    run["chosen"] = ways.chosen
    for line in loaded.lines + ways.lines:
        err.print(line, markup=False, soft_wrap=True)
    run["adapter"] = {
        "method": placement.method,
        "matrices": {r.value: len(placement.by_role(r)) for r in placement.roles},
        "ranks": {r.value: placement.by_role(r)[0].rank for r in placement.roles},
        "params": {r.value: sum(p.lora_params for p in placement.by_role(r)) for r in placement.roles},
        "trainable_params": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "learning_rate": role_rates(placement, recipe),
    }
    metrics = Metrics(folder.metrics, number_of(checkpoint) if checkpoint else 0)
    progress = ProgressLine(metrics)
    stop = StopOnSignal()
    steps = steps_of(recipe, len(data.train_rows), int(os.environ.get("WORLD_SIZE", "1")))
    check = GradientCheck()
    callbacks: list[Any] = [check, metrics, progress, stop, *further]
    if recipe.train.early_stopping:
        callbacks.append(EarlyStoppingCallback(recipe.train.early_stopping))
    trainer = RoleTrainer(
        model=model,
        args=arguments(recipe, folder, loaded, steps, bool(data.held_out_rows)),
        data_collator=CountingCollator(ways.collator(recipe, tokenizer)),
        train_dataset=Dataset.from_list(data.train_rows),
        eval_dataset=Dataset.from_list(data.held_out_rows) if data.held_out_rows else None,
        processing_class=tokenizer,
        callbacks=callbacks,
        groups=lambda m: param_groups(m, placement, recipe),
        guard=SpikeGuard(recipe.train.spike),
        keep=recipe.train.keep_checkpoints,
    )
    trainer.remove_callback(PrinterCallback)
    for callback in callbacks:
        if hasattr(callback, "trainer"):
            callback.trainer = trainer
    add_trackers(trainer, recipe, folder.root)
    if checkpoint is not None:
        trainer.load_own_state(checkpoint)

    held_out = [row for part in data.parts for row in part.rows.held_out]
    asked = questions(recipe, held_out, tokenizer, loaded.arch.max_position_embeddings)
    _ask("before", run, model, loaded, tokenizer, asked)
    run["steps"] = {"done": number_of(checkpoint) if checkpoint else 0, "planned": steps}
    folder.write(run)  # `runs` shows how far it is to go
    if data.held_out_rows and "held_out_loss" not in run:
        before = trainer.evaluate()["eval_loss"]
        if not math.isfinite(before):
            raise WorkError(f"before any training the held-out loss is {before}: the base model or its dtype is broken")
        run["held_out_loss"] = {"before": before, "after": None}
        folder.write(run)
    began, tokens_before = time.monotonic(), trainer.real_tokens
    with stop:
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            progress.close()
    seconds = time.monotonic() - began
    done = trainer.state.global_step
    run["steps"] = {"done": done, "planned": steps}
    run["stopped_early"] = done < steps
    run["seconds"] = round(run.get("seconds", 0) + seconds, 2)
    run["tokens_per_s"] = round((trainer.real_tokens - tokens_before) / seconds, 1)
    run["spikes"] = {"skipped": trainer.guard.skipped, "cuts": trainer.guard.cuts}
    run["memory"] = memory_report(loaded.device, start_memory)
    if stop.asked and done < steps:
        raise Interrupted(
            f"stopped at step {done} of {steps}; the checkpoint is in {folder.last_checkpoint()}.\n"
            f"Go on with the same command and --resume"
        )
    if data.held_out_rows:
        fresh = trainer.last_evaluation[0] == done
        after = trainer.last_evaluation[1] if fresh else trainer.evaluate()["eval_loss"]
        if not math.isfinite(after):
            raise WorkError(f"after training the held-out loss is {after}; lower optimizer.learning_rate")
        run["held_out_loss"]["after"] = after
    _ask("after", run, model, loaded, tokenizer, asked)
    paths = [s.path for s in recipe.data.sources] or [recipe.data.path]
    readme = card(folder.root, run, paths) if placement.method != "none" else None
    save_result(model, loaded, tokenizer, folder, placement, readme)
    run["state"] = "done"
    run.pop("error", None)
    folder.write(run)
    show_run(folder, run)


def _ask(when: str, run: dict[str, Any], model: Any, loaded: Loaded, tokenizer: Any, asked: list[Question]) -> None:
    """Answers into run.json; a resumed run keeps those of before its first start."""
    samples = run.setdefault("samples", {"seconds": {}, "answers": [{"prompt": q.prompt} for q in asked]})
    if not asked or when in samples["seconds"]:
        return
    texts, samples["seconds"][when] = answer(model, loaded, tokenizer, asked)
    for entry, question, text in zip(samples["answers"], asked, texts, strict=False):
        entry |= {"reference": question.reference, when: text}
    err.print(f"answered {len(asked)} held-out prompts {when} training in {samples['seconds'][when]:.1f} s")


def show_run(folder: RunFolder, run: dict[str, Any]) -> None:
    """loss.png and report.html.  A run does not fail by them: what goes wrong is told."""
    try:
        write_report(folder.root, run)
    except (OSError, ValueError) as error:
        err.print(f"note: {folder.report} was not written: {error}", markup=False, soft_wrap=True)


def _disk_is_full(folder: RunFolder, error: OSError) -> WorkError:
    last, _ = newest_whole(folder.checkpoints)
    rest = f"; the last whole checkpoint is {last}: make room and go on with --resume" if last else ""
    return WorkError(f"{folder.root} can't be written: {error.strerror}{rest}")


def _checkpoint(folder: RunFolder) -> Path:
    """The newest whole checkpoint; a line for each newer one that is damaged."""
    found, lines = newest_whole(folder.checkpoints)
    for line in lines:
        err.print(line, markup=False, soft_wrap=True)
    if found is None:
        raise InputError(
            f"--resume: no checkpoint in {folder.checkpoints} is whole; begin anew with --overwrite or another --output"
        )
    if lines:
        err.print(f"going on from {found}, the newest that is whole", markup=False, soft_wrap=True)
    return found
