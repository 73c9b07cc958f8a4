"""The commands that a report and a card suggest for a run, quoted for a POSIX shell."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any


def commands(root: Path, run: dict[str, Any]) -> list[tuple[str, str]]:
    """List pairs (what for, command) for the run folder `root` with the run.json contents `run`.

    They are meant for the folder in which the run was started: a recipe may name files relative to it.
    """
    name = str(root)
    recipe = str(root / "recipe.yaml")
    again = str(root.with_name(root.name + "-again")) if root.name else f"{name}-again"
    many = _many(run)
    found = [("reproduce", _line("mla-tune", "train", "--recipe", recipe, "--output", again, *many))]
    if run.get("state") != "done":
        return [("go on", _line("mla-tune", "train", "--recipe", recipe, "--output", name, *many, "--resume")), *found]
    if (run.get("adapter") or {}).get("method") == "none":
        model = str(root / "model")
        return [
            *found,
            ("ask it", _line("mla-tune", "generate", model, "--prompt", "…")),
            ("what an engine will do with it", _line("mla-tune", "serve-check", model, "--engine", "vllm")),
            ("serve", _line("vllm", "serve", model)),
        ]
    merged = str(root / "merged")
    return [
        *found,
        ("ask it, unmerged", _line("mla-tune", "generate", name, "--prompt", "…")),
        ("merge", _line("mla-tune", "merge-absorb", name)),
        ("prove the merge again", _line("mla-tune", "verify", merged)),
        ("what an engine will do with it", _line("mla-tune", "serve-check", merged, "--engine", "vllm")),
        ("serve", _line("vllm", "serve", merged)),
    ]


def _many(run: dict[str, Any]) -> list[str]:
    """Options of `mla-tune train` that start as many processes, on one machine, as the run had."""
    processes = run.get("processes") or {}
    if processes.get("count", 1) < 2:
        return []
    sharding = processes.get("sharding", "none")
    launch = [] if sharding == "none" else ["--launch", sharding]
    return ["--processes", str(processes["count"]), *launch]


def _line(*words: str) -> str:
    return shlex.join(words)


def working_folder(run: dict[str, Any]) -> str | None:
    """Return the `cd` command into the folder in which the run was started; None where run.json does not say."""
    folder = run.get("working_folder")
    return shlex.join(["cd", str(folder)]) if folder else None
