"""`mla-tune train`: train an adapter as a recipe says, in this process or in several."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A recipe file, or the name of a shipped recipe.")],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Replace one key of the recipe, for example --set train.max_steps=50. May be repeated."
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="The run folder to write; replaces output.dir of the recipe.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="If the run folder exists, delete the run in it and begin anew.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in the run folder from its last whole checkpoint.")
    ] = False,
    allow_changes: Annotated[
        bool,
        typer.Option(
            "--allow-changes", help="With --resume: continue even if the recipe, the data or the base model changed."
        ),
    ] = False,
    processes: Annotated[
        int | None, typer.Option("--processes", help="Number of processes to start on this machine, one for each GPU.")
    ] = None,
    launch: Annotated[
        str | None,
        typer.Option(
            "--launch",
            help="How the processes share the model: ddp (each holds all of it), fsdp2 or zero3 (each holds a shard).",
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the contents of run.json, one JSON document, on standard output.")
    ] = False,
) -> None:
    """Train an adapter as a recipe says, and write a run folder.

    Ctrl-C saves a checkpoint; --resume continues from it. Several GPUs: --processes, and --launch to shard the model.
    """
    from mla_tune.console import err, human_count, out, print_json
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
        raise InputError("--allow-changes only has a meaning for a run that is continued: give --resume too")
    if overwrite and resume:
        raise InputError("--overwrite begins a run anew and --resume continues it: give only one of them")
    overrides = list(set_ or [])
    if output:
        overrides.append(f"output.dir={output}")
    if overwrite:
        overrides.append("output.overwrite=true")
    loaded = load_recipe(recipe, overrides)
    starts_others = bool(launch or (processes or 1) > 1) and not current_worker().launched
    # Torch takes seconds to import, processes seconds to start; what can be wrong with the recipe is found before.
    resolved = resolve(loaded, _planned_worker(launch, processes) if starts_others else None)
    if starts_others:
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
    if json:
        print_json(record.to_json())
        return
    assert record.adapter is not None  # of a run that is done
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
    directory = loaded.output.dir
    out.print(f"run folder: {directory}", soft_wrap=True)
    if record.adapter.method != "none":
        out.print(f"next: mla-tune merge-absorb {shlex.quote(directory)}", soft_wrap=True)


def _start_processes(recipe: Any, arguments: list[str], launch: str | None, processes: int | None) -> None:
    """Run `mla-tune train` with these arguments in several processes, and wait for them."""
    from mla_tune.errors import WorkError
    from mla_tune.training.distributed.launch import launch_processes

    try:
        launch_processes(["train", *arguments], launch, processes)
    except WorkError as error:
        from mla_tune.runs.folder import RunFolder, mark_killed

        raise WorkError(f"{error}{mark_killed(RunFolder(Path(recipe.output.dir).expanduser()))}") from None


def _planned_worker(launch: str | None, processes: int | None) -> Any:
    """One of the processes that are about to be started, for the checks that depend on there being several."""
    from dataclasses import replace

    from mla_tune.training.distributed.launch import current_worker

    sharding = {None: current_worker().sharding, "ddp": "none"}.get(launch, launch)
    return replace(current_worker(), world_size=max(2, processes or 2), sharding=sharding)
