"""`train`: a recipe → a run folder with an adapter, metrics, and the held-out loss before and after."""

from __future__ import annotations

import contextlib
import errno
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, PrinterCallback

from mla_tune.adapter.placement import Placement, place
from mla_tune.arch.site import Architecture
from mla_tune.console import err
from mla_tune.data.prepare import Prepared, prepare, steps_of
from mla_tune.errors import InputError, Interrupted, WorkError
from mla_tune.model.attach import attach
from mla_tune.model.initialise import initialise
from mla_tune.model.load import Loaded, base_hash, load_model, quiet
from mla_tune.model.tokenizer import load_tokenizer, tokenizer_source
from mla_tune.recipe.schema import Recipe
from mla_tune.report.plots import plot_run
from mla_tune.resources import EMBEDDED_MODEL
from mla_tune.survey.plan import role_rates
from mla_tune.survey.source import architecture_of
from mla_tune.train.arguments import arguments
from mla_tune.train.callbacks import AtStart, GradientCheck, Metrics, ProgressLine, StopOnSignal
from mla_tune.train.checkpoints import newest_whole, number_of
from mla_tune.train.folder import RunFolder, check_folder, environment, make_folder, write_recipe
from mla_tune.train.launch import worker
from mla_tune.train.memory import memory_advice, memory_now, memory_report
from mla_tune.train.optim import param_groups
from mla_tune.train.order import with_filler
from mla_tune.train.prepare import prepare_model
from mla_tune.train.processes import Team, gathered, join, leave, lost_others_told, refuse, tell_idle_gpus
from mla_tune.train.save import base_of, save_result
from mla_tune.train.spike import SpikeGuard
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
    section = recipe.model
    arch = architecture_of(section)
    placement = place(arch, recipe.adapter)
    refuse(recipe, placement, worker())
    team = join(recipe)
    with lost_others_told(team, lambda: _go_on(recipe)):
        run = _train(recipe, resume, allow_changes, callbacks, arch, placement, team)
    leave()
    return run


def _go_on(recipe: Recipe) -> str:
    last, _ = newest_whole(RunFolder(Path(recipe.output.dir).expanduser()).checkpoints)
    return f"; the last whole checkpoint is {last}: go on with --resume" if last else "; there is no checkpoint yet"


def _train(
    recipe: Recipe,
    resume: bool,
    allow_changes: bool,
    callbacks: Sequence[Any],
    arch: Architecture,
    placement: Placement,
    team: Team,
) -> dict[str, Any]:
    section = recipe.model
    folder, difference = team.by_first(lambda: check_folder(recipe, resume, allow_changes))
    checkpoint = team.by_first(lambda: _checkpoint(folder)) if resume else None
    tokenizer = load_tokenizer(tokenizer_source(section), section.trust_remote_code)
    data = team.first_then_others(lambda: prepare(recipe, arch, tokenizer))
    for line in data.lines:
        err.print(line, markup=False, soft_wrap=True)
    if recipe.train.early_stopping and not data.held_out_rows:
        raise InputError("train.early_stopping needs held-out rows: set data.eval_fraction or data.eval_path")
    start_memory = memory_now()
    with memory_advice(recipe):
        full = placement.method == "none"
        loaded = load_model(section, seed=recipe.train.seed, full_precision=full, place=not team.sharded)
    tell_idle_gpus(team.here, loaded.device)

    def begin() -> None:
        if not resume:
            make_folder(folder, recipe)
        elif difference:
            err.print(f"--allow-changes: goes on with another recipe:\n{difference}", markup=False, soft_wrap=True)
            write_recipe(folder, recipe)
        base_of(loaded, tokenizer, recipe, folder)

    team.by_first(begin)
    if not folder.recipe.exists():
        raise InputError(f"output.dir: {folder.root} must lie on a file system that all machines of the run share")
    base = base_of(loaded, tokenizer, recipe, folder)

    run: dict[str, Any] = folder.read() if resume else {}
    hashed = team.by_first(lambda: base_hash(str(EMBEDDED_MODEL) if base == "embedded" else base))
    origin = {"base_hash": hashed, "data": data.summary()}
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
        "recipe": str(folder.recipe),
        "model_type": arch.model_type,
        "base": section.source,
        "base_path": base,
        **origin,
        "seed": recipe.train.seed,
        "device": str(loaded.device),
        "dtype": loaded.dtype,
        "processes": {"count": team.here.count, "sharding": team.here.sharding},
        "environment": environment(),
    }
    _record(folder, run, team)
    try:
        with memory_advice(recipe):
            _run(recipe, folder, loaded, tokenizer, placement, data, run, checkpoint, start_memory, callbacks, team)
    except BaseException as error:
        run["state"] = "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"
        with contextlib.suppress(OSError):  # on a full disk that would hide the error itself
            _record(folder, run, team)
        if isinstance(error, OSError) and error.errno in FULL:
            raise _disk_is_full(folder, error) from error
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
    team: Team,
) -> None:
    model: torch.nn.Module = loaded.model
    if placement.method != "none":
        model = attach(model, loaded.arch, placement, recipe.train.seed)
        initialise(model, placement, recipe.train.seed)
    ways = prepare_model(model, loaded, recipe, data, run.get("chosen")) if team.first else None
    run["chosen"] = team.same(ways.chosen if ways else None)
    if ways is None:
        ways = prepare_model(model, loaded, recipe, data, run["chosen"])
    for line in ways.lines:
        err.print(line, markup=False, soft_wrap=True)
    run["adapter"] = {
        "method": placement.method,
        "matrices": {r.value: len(placement.by_role(r)) for r in placement.roles},
        "trainable_params": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "learning_rate": role_rates(placement, recipe),
    }
    steps = steps_of(recipe, len(data.train_rows), team.here.count)
    clock: dict[str, float] = {"tokens": 0, "began": time.monotonic()}

    def before() -> None:
        if data.held_out_rows and "held_out_loss" not in run:
            loss = trainer.evaluate()["eval_loss"]
            if not math.isfinite(loss):
                raise WorkError(
                    f"before any training the held-out loss is {loss}: the base model or its dtype is broken"
                )
            run["held_out_loss"] = {"before": loss, "after": None}
            _record(folder, run, team)
        clock["tokens"], clock["began"] = trainer.real_tokens, time.monotonic()

    stop = StopOnSignal(team.many)
    check = GradientCheck()
    callbacks: list[Any] = [AtStart(before), check]
    if team.first:
        metrics = Metrics(folder.metrics, number_of(checkpoint) if checkpoint else 0)
        callbacks += [metrics, ProgressLine(metrics)]
    callbacks += [stop, *further]
    if recipe.train.early_stopping:
        callbacks.append(EarlyStoppingCallback(recipe.train.early_stopping))
    rows = with_filler if team.many else Dataset.from_list
    trainer = RoleTrainer(
        model=model,
        args=arguments(recipe, folder, loaded, steps, bool(data.held_out_rows)),
        data_collator=CountingCollator(ways.collator(recipe, tokenizer)),
        train_dataset=rows(data.train_rows),
        eval_dataset=rows(data.held_out_rows) if data.held_out_rows else None,
        processing_class=tokenizer,
        callbacks=callbacks,
        groups=lambda m: param_groups(m, placement, recipe),
        guard=SpikeGuard(recipe.train.spike),
        keep=recipe.train.keep_checkpoints,
        team=team,
    )
    trainer.remove_callback(PrinterCallback)
    for callback in callbacks:
        if hasattr(callback, "trainer"):
            callback.trainer = trainer
    if checkpoint is not None:
        trainer.load_own_state(checkpoint)

    with stop:
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            for callback in callbacks:
                if isinstance(callback, ProgressLine):
                    callback.close()
    seconds = time.monotonic() - clock["began"]
    done = trainer.state.global_step
    run["steps"] = {"done": done, "planned": steps}
    run["stopped_early"] = done < steps
    run["seconds"] = round(run.get("seconds", 0) + seconds, 2)
    run["tokens_per_s"] = round((trainer.real_tokens - clock["tokens"]) / seconds, 1)
    run["spikes"] = {"skipped": trainer.guard.skipped, "cuts": trainer.guard.cuts}
    run["memory"] = memory_report(loaded.device, start_memory)
    if stop.stopped and done < steps:
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
    weights = gathered(model) if team.sharded else None
    team.by_first(lambda: save_result(model, loaded, tokenizer, folder, placement, weights))
    run["state"] = "done"
    _record(folder, run, team)
    if not team.first:
        return
    with contextlib.suppress(ValueError):
        plot_run(folder.metrics, folder.plot, run)


def _record(folder: RunFolder, run: dict[str, Any], team: Team) -> None:
    if team.first:
        folder.write(run)


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
