"""Shared parts of commands: common options, renamed options, messages about unusable paths, progress bars.

An option that was renamed is an error that names the new option (`OLD_OPTIONS`), or still works but is not listed
(`HIDDEN_ALIASES`).  Either holds for every command that has the new option: renaming one takes a line here.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from mla_tune.errors import InputError

#: `--workers N`, for commands that merge and verify.
Workers = Annotated[
    int | None,
    typer.Option("--workers", min=1, metavar="N", help="Number of threads. Default: one for each core, at most 4."),
]
#: `--json`, for commands that have a document to print.
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, and nothing else.")]

#: Old name of an option → its name now.  Using the old name is an error that says so.
OLD_OPTIONS: dict[str, str] = {
    "--min-survival": "--min-retained",
    "--probe": "--logits",
    "--no-probe": "--no-logits",
    "--untie": "--untie-embeddings",
}


@dataclass(frozen=True, slots=True)
class Alias:
    """The option that an alias stands for."""

    option: str
    """The name of the option."""
    values: Mapping[str, str] = field(default_factory=dict)
    """Value of the alias → value of the option, for values that were renamed; others stay as they are."""


#: Alias that still works but is not listed in `--help` → the option that it stands for.
HIDDEN_ALIASES: dict[str, Alias] = {
    "--fp8": Alias("--quantized", {"bf16": "dequantize"}),
}


#: Errors of the operating system that mean a wrong path from the user: too long, not permitted, a file in place of a
#: folder or the reverse, a loop of links, missing.
BAD_PATH = frozenset(
    (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENOENT)
)


def unusable_path(error: OSError) -> str:
    """The message for an error of the operating system about a path; a long path is shortened."""
    path = os.fsdecode(error.filename)
    shown = path if len(path) <= 200 else f"{path[:97]}…{path[-100:]}"
    return f"{shown}: {error.strerror}"


class Command(TyperCommand):
    """A command that recognizes earlier names of its options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments.  Raises `InputError` for an option that was renamed."""
        known = {name for param in self.params for name in (*param.opts, *param.secondary_opts)}
        args = list(without_aliases(args, known))
        for argument in args:
            if argument == "--":
                break
            old = argument.partition("=")[0]
            if old not in known and (new := OLD_OPTIONS.get(old)) in known:
                raise InputError(f"{old}: renamed: the option is now {new}")
        return super().parse_args(ctx, args)


def without_aliases(args: Iterable[str], known: set[str]) -> Iterator[str]:
    """Yield the arguments with every hidden alias of a `known` option, and its value, replaced."""
    values: Mapping[str, str] = {}
    literal = False
    for argument in args:
        name, equals, value = argument.partition("=")
        alias = None if literal else HIDDEN_ALIASES.get(name)
        if alias is not None and name not in known and alias.option in known:
            yield alias.option + (f"={alias.values.get(value, value)}" if equals else "")
            values = {} if equals else alias.values
            continue
        yield values.get(argument, argument)
        values = {}
        literal = literal or argument == "--"


def weighted_adapters(adapter: Path | None, named: list[str]) -> list[tuple[Path, float]]:
    """Return (path, weight) of every adapter on the command line, in order.

    `adapter` is the argument, and `named` has the values of `--adapter DIR[=WEIGHT]`.  Where one of these is the folder
    of the argument, it sets the argument's weight.  Raises `InputError` for a weight that is not finite, and without
    any adapter.
    """
    parsed: list[tuple[Path, float]] = []
    for text in named:
        name, sign, number = text.rpartition("=")
        try:
            path, weight = (Path(name), float(number)) if sign else (Path(text), 1.0)
        except ValueError:
            path, weight = Path(text), 1.0  # a folder name with '=' in it
        if sign and not path.exists() and Path(text).exists():
            path, weight = Path(text), 1.0
        if weight != weight or weight in (float("inf"), float("-inf")):
            raise InputError(f"--adapter {text}: the weight must be a finite number")
        parsed.append((path, weight))
    if adapter is not None and all(path.absolute() != adapter.absolute() for path, _ in parsed):
        parsed.insert(0, (adapter, 1.0))
    if not parsed:
        raise InputError("no adapter: give a run folder or an adapter folder, or one or more with --adapter DIR=WEIGHT")
    return parsed


@contextmanager
def progress_bars(stages: list[str]) -> Iterator[Callable[[str, int, int], None]]:
    """Show a progress bar in bytes, with the time left, for each stage, if standard error is a terminal.

    Yields the function to call with (stage, bytes done, total bytes).
    """
    from mla_tune.console import err

    if not err.is_terminal:
        yield lambda stage, done, total: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        tasks = {stage: progress.add_task(stage, total=None, start=False) for stage in stages}

        def show(stage: str, done: int, total: int) -> None:
            if not progress.tasks[tasks[stage]].started:
                progress.start_task(tasks[stage])
            progress.update(tasks[stage], completed=done, total=total)

        yield show
