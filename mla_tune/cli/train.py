"""`mla-tune train`: train an adapter as a recipe says, in this process or in several processes."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mla_tune.runs.record import RunRecord


def command(
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Recipe file or shipped recipe, for example safe.")],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Replace one key of the recipe, for example --set train.max_steps=50. May be repeated."
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Run folder to write. Default: output.dir of the recipe.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the run in the run folder, if there is one, and start again.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in the run folder from its last complete checkpoint.")
    ] = False,
    allow_changes: Annotated[
        bool,
        typer.Option(
            "--allow-changes",
            help="With --resume: continue even if the recipe, the data or the base model has changed since.",
        ),
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option("--processes", metavar="N", help="Start N processes here, one for each GPU."),
    ] = None,
    launch: Annotated[
        str | None,
        typer.Option(
            "--launch",
            help="How processes share the model: ddp (each holds all of it), fsdp2 or zero3 (each holds a shard).",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the contents of run.json as one JSON document.")] = False,
) -> None:
    """Train an adapter as a recipe says, and write a run folder.

    Ctrl-C saves a checkpoint, and --resume continues from it. On several GPUs give --processes,
    and --launch to shard the model.
    """
    from mla_tune.console import err, print_json
    from mla_tune.errors import InputError
    from mla_tune.recipe.load import load_recipe
    from mla_tune.training.distributed.launch import (
        apply_launch_config,
        check_options,
        current_worker,
        silence_other_processes,
    )
    from mla_tune.training.resolve import resolve

    check_options(launch, processes)
    silence_other_processes()
    if allow_changes and not resume:
        raise InputError("--allow-changes applies only to a run that is resumed: give --resume too")
    if overwrite and resume:
        raise InputError("--overwrite deletes the earlier run and --resume continues it: give only one of them")
    overrides = list(set_ or [])
    if output:
        overrides.append(f"output.dir={output}")
    if overwrite:
        overrides.append("output.overwrite=true")
    loaded = load_recipe(recipe, overrides)
    starts_processes = bool(launch or (processes or 1) > 1) and not current_worker().launched
    # Importing torch and starting processes take seconds, so errors of the recipe are found before.
    resolved = resolve(loaded, _future_worker(launch, processes) if starts_processes else None)
    if starts_processes:
        options = {"--resume": resume, "--allow-changes": allow_changes, "--json": json}
        arguments = ["--recipe", recipe, *(x for text in overrides for x in ("--set", text))]
        arguments += [option for option, given in options.items() if given]
        _start_processes(loaded, arguments, launch, processes)
        return
    for note in resolved.warnings:
        err.print(f"note: {note}")
    if launch:
        apply_launch_config(launch)
    from mla_tune.training.run import train

    record = train(loaded, resume=resume, allow_changes=allow_changes)
    if not current_worker().is_main_process:
        return
    print_json(record.to_json()) if json else _print_result(record, loaded.output.dir)


def _print_result(record: RunRecord, directory: str) -> None:
    """Print what was trained, the held-out loss, the run folder, and the next command."""
    from mla_tune.console import human_count, out

    assert record.adapter is not None  # a finished run has one
    out.print(
        f"trained {human_count(record.adapter.trainable_params)} parameters, {record.steps.done} steps, "
        f"{record.seconds:.0f} s, {record.tokens_per_s:,.0f} tokens/s"
    )
    loss = record.held_out_loss
    if loss is not None and loss.before is not None and loss.after is not None:
        before, after = loss.before, loss.after
        out.print(f"held-out loss {before:.4f} → {after:.4f} ({(after / before - 1) * 100:+.1f} %)")
    else:
        out.print("no rows were held out, so no held-out loss was measured")
    out.print(f"run folder: {directory}", soft_wrap=True)
    if record.adapter.method != "none":
        out.print(f"next: mla-tune merge-absorb {shlex.quote(directory)}", soft_wrap=True)


def _start_processes(recipe: Any, arguments: list[str], launch: str | None, processes: int | None) -> None:
    """Run `mla-tune train` with these arguments in several processes, and wait for them.

    Raises `WorkError` if one of them fails; run.json then says that the run was killed, if it still said running.
    """
    from mla_tune.errors import WorkError
    from mla_tune.training.distributed.launch import launch_processes

    try:
        launch_processes(["train", *arguments], launch, processes)
    except WorkError as error:
        from mla_tune.runs.folder import RunFolder, mark_killed

        raise WorkError(f"{error}{mark_killed(RunFolder(Path(recipe.output.dir).expanduser()))}") from None


def _future_worker(launch: str | None, processes: int | None) -> Any:
    """Return one of the processes that are about to be started, for the checks that depend on their number."""
    from dataclasses import replace

    from mla_tune.training.distributed.launch import current_worker

    sharding = {None: current_worker().sharding, "ddp": "none"}.get(launch, launch)
    return replace(current_worker(), world_size=max(2, processes or 2), sharding=sharding)
