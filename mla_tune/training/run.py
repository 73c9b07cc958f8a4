"""`train`: from a recipe to a run folder, from the first check to `state: done`."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mla_tune.console import err
from mla_tune.data.prepare import prepare
from mla_tune.errors import InputError, Interrupted, WorkError
from mla_tune.model.auto import auto_class
from mla_tune.model.load import base_hash, load_model, silence_libraries
from mla_tune.model.tokenizer import load_tokenizer, tokenizer_source
from mla_tune.recipe.schema import Recipe
from mla_tune.report.run_report import write_report
from mla_tune.resources import EMBEDDED_MODEL
from mla_tune.runs.checkpoints import newest_whole
from mla_tune.runs.folder import RunFolder, check_folder, how_to_go_on, make_folder, write_recipe
from mla_tune.runs.process import this_process
from mla_tune.runs.record import Processes, RunRecord
from mla_tune.sockets import OBJECTIVES
from mla_tune.training.distributed.launch import current_worker
from mla_tune.training.distributed.team import (
    destroy_distributed,
    explain_lost_processes,
    init_distributed,
    warn_about_idle_gpus,
)
from mla_tune.training.environment import environment
from mla_tune.training.job import TrainingJob
from mla_tune.training.loop import train_adapter
from mla_tune.training.memory import memory_advice, memory_now
from mla_tune.training.resolve import check_held_out, resolve
from mla_tune.training.save import save_base
from mla_tune.training.trackers import name_projects

#: Errors of the operating system that mean that nothing can be written: no space, over quota, file too large, a file
#: system that has become read-only, a broken disk.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


def train(
    recipe: Recipe, *, resume: bool = False, allow_changes: bool = False, callbacks: Sequence[Any] = ()
) -> RunRecord:
    """Train as the recipe says, write the run folder `output.dir`, and return the contents of its run.json.

    `resume`: continue the run in the folder from its newest whole checkpoint.  `allow_changes`: do so even if the
    recipe, the data or the base changed since.  `callbacks`: further `transformers.TrainerCallback`s; one with an
    attribute `trainer` gets the Trainer there.

    The input is checked before weights are read or a file is written.  Raises `InputError` or `FileError` for wrong
    input, `CheckError` if the attached adapter or its gradients are not as planned, `WorkError` if the work fails, and
    `Interrupted` if a signal stopped it (a checkpoint is saved).

    Where a launcher started several processes (`training.distributed.launch`), each of them calls this function, and
    they do one run together; the main process writes the files.
    """
    silence_libraries()
    name_projects()
    resolved = resolve(recipe, current_worker())
    recipe = resolved.recipe
    for line in resolved.notes:
        err.print(f"note: {line}", markup=False, soft_wrap=True)
    objective = OBJECTIVES.get(recipe.train.objective)(recipe)
    team = init_distributed(recipe)
    with explain_lost_processes(team, lambda: how_to_go_on(RunFolder(Path(recipe.output.dir).expanduser()))):
        job = _prepare_job(
            TrainingJob(recipe, resolved.placement, resolved.arch, team, objective), resume, allow_changes
        )
        _train_and_record(job, callbacks)
    destroy_distributed()
    return job.record


def _prepare_job(job: TrainingJob, resume: bool, allow_changes: bool) -> TrainingJob:
    """Check what is left to check, read data and weights, and make or reopen the run folder."""
    recipe, team, section = job.recipe, job.team, job.recipe.model
    folder, difference = team.main_process_only(
        lambda: check_folder(recipe, resume=resume, allow_changes=allow_changes)
    )
    job.folder = folder
    job.checkpoint = team.main_process_only(lambda: _checkpoint(folder)) if resume else None
    job.tokenizer = load_tokenizer(tokenizer_source(section), section.trust_remote_code)
    job.data = team.main_process_first(lambda: prepare(recipe, job.arch, job.tokenizer))
    for line in job.data.lines:
        err.print(line, markup=False, soft_wrap=True)
    check_held_out(recipe, job.data)
    job.objective.check_data(job.data)
    job.start_memory = memory_now()
    full = job.placement.method == "none"
    with memory_advice(recipe):
        job.loaded = load_model(
            section,
            seed=recipe.train.seed,
            full_precision=full,
            allow_quantized=True,
            move_to_device=not team.sharded,
            shapes_only=team.sharded and not team.is_main_process,
        )
    warn_about_idle_gpus(team.here, job.loaded.device)

    def open_folder() -> None:
        if not resume:
            make_folder(folder, recipe)
        elif difference:
            err.print(f"--allow-changes: goes on with another recipe:\n{difference}", markup=False, soft_wrap=True)
            write_recipe(folder, recipe)
        base = save_base(job.loaded, job.tokenizer, recipe, folder)
        _record_origin(job, base, resume, allow_changes)

    team.main_process_only(open_folder)
    if not folder.recipe.exists():
        raise InputError(f"output.dir: {folder.root} must lie on a file system that all machines of the run share")
    if not team.is_main_process:
        save_base(job.loaded, job.tokenizer, recipe, folder)
    job.record = team.broadcast(job.record)
    return job


def _record_origin(job: TrainingJob, base: str, resume: bool, allow_changes: bool) -> None:
    """Write run.json as it is at the start.

    On resume, raises `InputError` if the base or the data are not those of the start, unless `allow_changes`.
    """
    record = job.folder.read() if resume else RunRecord()
    origin: dict[str, Any] = {
        "base_hash": base_hash(str(EMBEDDED_MODEL) if base == "embedded" else base),
        "data": job.data.summary(),
    }
    changed = [name for name in origin if resume and getattr(record, name) != origin[name]]
    if changed:
        what = " and ".join({"base_hash": "the base model", "data": "the data"}[name] for name in changed)
        if not allow_changes:
            raise InputError(
                f"--resume: {what} changed since {job.folder.root} was begun; start anew in another folder, or go on "
                "with --allow-changes"
            )
        err.print(f"--allow-changes: {what} changed since the run was begun", soft_wrap=True)
    job.record = replace(
        record,
        state="running",
        process=this_process(),
        working_folder=str(Path.cwd()),
        recipe=str(job.folder.recipe),
        model_type=job.arch.model_type,
        auto_class=auto_class(job.loaded.model.config).__name__,
        base=job.recipe.model.source,
        base_path=base,
        **origin,
        seed=job.recipe.train.seed,
        device=str(job.loaded.device),
        dtype=job.loaded.dtype,
        quantized=job.loaded.quantized,
        processes=Processes(job.team.here.world_size, job.team.here.sharding),
        environment=environment(),
    )
    job.write_record()


def _train_and_record(job: TrainingJob, callbacks: Sequence[Any]) -> None:
    """Train, and write into run.json how it ended."""
    try:
        with memory_advice(job.recipe):
            train_adapter(job, callbacks)
        job.record.state, job.record.error = "done", None
        job.write_record()
    except BaseException as error:
        job.record.state = "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"
        job.record.error = str(error) or type(error).__name__
        with contextlib.suppress(OSError):  # on a full disk that would hide the error itself
            job.write_record()
        if isinstance(error, OSError) and error.errno in FULL:
            raise _disk_is_full(job.folder, error) from error
        if not isinstance(error, KeyboardInterrupt):  # asked to stop at once
            _write_report(job)
        raise
    _write_report(job)


def _write_report(job: TrainingJob) -> None:
    """Write loss.png and report.html.  A run does not fail because of them: an error is a note."""
    if not job.team.is_main_process:
        return
    try:
        write_report(job.folder, job.record)
    except (OSError, ValueError) as error:
        err.print(f"note: {job.folder.report} was not written: {error}", markup=False, soft_wrap=True)


def _disk_is_full(folder: RunFolder, error: OSError) -> WorkError:
    last, _ = newest_whole(folder.checkpoints)
    rest = f"; the last whole checkpoint is {last}: make room and go on with --resume" if last else ""
    return WorkError(f"{folder.root} can't be written: {error.strerror}{rest}")


def _checkpoint(folder: RunFolder) -> Path:
    """Return the newest whole checkpoint, and print a line for each newer one that is damaged.

    Raises `InputError` if none is whole.
    """
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
