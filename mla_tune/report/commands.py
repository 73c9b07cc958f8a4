"""The commands that a report and a card suggest for a run, quoted for a POSIX shell."""

from __future__ import annotations

import shlex
from pathlib import Path

from mla_tune.runs.folder import RunFolder
from mla_tune.runs.record import RunRecord


def commands(root: Path, record: RunRecord) -> list[tuple[str, str]]:
    """List pairs (what for, command) for the run folder `root` with the run.json `record`.

    They are meant for the folder in which the run was started: a recipe may name files relative to it.
    """
    name, folder = str(root), RunFolder(root)
    recipe = str(folder.recipe)
    again = str(root.with_name(root.name + "-again")) if root.name else f"{name}-again"
    many = _many(record)
    found = [("reproduce", _line("mla-tune", "train", "--recipe", recipe, "--output", again, *many))]
    if record.state != "done":
        return [("go on", _line("mla-tune", "train", "--recipe", recipe, "--output", name, *many, "--resume")), *found]
    if record.adapter is not None and record.adapter.method == "none":
        model = str(folder.model)
        return [
            *found,
            ("ask it", _line("mla-tune", "generate", model, "--prompt", "…")),
            ("what an engine will do with it", _line("mla-tune", "serve-check", model, "--engine", "vllm")),
            ("serve", _line("vllm", "serve", model)),
        ]
    merged = str(folder.merged)
    return [
        *found,
        ("ask it, unmerged", _line("mla-tune", "generate", name, "--prompt", "…")),
        ("merge", _line("mla-tune", "merge-absorb", name)),
        ("prove the merge again", _line("mla-tune", "verify", merged)),
        ("what an engine will do with it", _line("mla-tune", "serve-check", merged, "--engine", "vllm")),
        ("serve", _line("vllm", "serve", merged)),
    ]


def _many(record: RunRecord) -> list[str]:
    """Options of `mla-tune train` that start as many processes, on one machine, as the run had."""
    processes = record.processes
    if processes.count < 2:
        return []
    launch = [] if processes.sharding == "none" else ["--launch", processes.sharding]
    return ["--processes", str(processes.count), *launch]


def _line(*words: str) -> str:
    return shlex.join(words)


def working_folder(record: RunRecord) -> str | None:
    """Return the `cd` command into the folder in which the run was started; None where run.json does not say."""
    return shlex.join(["cd", record.working_folder]) if record.working_folder else None
