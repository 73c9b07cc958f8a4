"""What commands share: options that had another name in an earlier version, and paths that can't be used.

An old name in `OLD_OPTIONS` is an error that names the new one; one in `HIDDEN_ALIASES` still works and is not listed.
Both hold for every command that has the new option, so that a renaming needs one line here and nothing in the command.
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

#: `--workers N` of the commands that merge and verify.
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, metavar="N", help="Number of threads. Default: one a core, at most 4.")
]
#: `--json` of every command that has a document to print.
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, and nothing else.")]

#: Option as it was called → what it is called now.
OLD_OPTIONS: dict[str, str] = {
    "--min-survival": "--min-retained",
    "--probe": "--logits",
    "--no-probe": "--no-logits",
    "--untie": "--untie-embeddings",
}


@dataclass(frozen=True, slots=True)
class Alias:
    """What an option of another name means."""

    #: The option's name now.
    option: str
    #: Old value → new value, for values that were renamed too; others stay as they are.
    values: Mapping[str, str] = field(default_factory=dict)


#: Option that still works but is not listed → what it means.
HIDDEN_ALIASES: dict[str, Alias] = {
    "--fp8": Alias("--quantized", {"bf16": "dequantize"}),
}


#: What is wrong with a path that a user gave: too long, closed to us, a file in place of a folder, links in a circle.
BAD_PATH = frozenset(
    (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENOENT)
)


def unusable_path(error: OSError) -> str:
    """The message for an error of the operating system about a path, which is cut where it is long."""
    path = os.fsdecode(error.filename)
    shown = path if len(path) <= 200 else f"{path[:97]}…{path[-100:]}"
    return f"{shown}: {error.strerror}"


class Command(TyperCommand):
    """A command that knows the earlier names of its options."""

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
    """The arguments with each hidden alias of a `known` option replaced by it, and its value by the new one."""
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
    """Return path and weight of every adapter that a command was given, in order.

    `adapter` is the argument, `named` are the values of `--adapter DIR[=WEIGHT]`.  Where one of them names the
    argument's folder, it gives that adapter its weight.  Raises `InputError` for a weight that is not finite, and where
    no adapter is named at all.
    """
    from mla_tune.errors import InputError

    parsed: list[tuple[Path, float]] = []
    for text in named:
        name, sign, number = text.rpartition("=")
        try:
            path, weight = (Path(name), float(number)) if sign else (Path(text), 1.0)
        except ValueError:
            path, weight = Path(text), 1.0  # a folder with '=' in its name
        if sign and not path.exists() and Path(text).exists():
            path, weight = Path(text), 1.0
        if weight != weight or weight in (float("inf"), float("-inf")):
            raise InputError(f"--adapter {text}: the weight must be a finite number")
        parsed.append((path, weight))
    if adapter is not None and all(path.absolute() != adapter.absolute() for path, _ in parsed):
        parsed.insert(0, (adapter, 1.0))
    if not parsed:
        raise InputError("no adapter: name a run folder or an adapter folder, or one or more with --adapter DIR=WEIGHT")
    return parsed


@contextmanager
def progress_bars(stages: list[str]) -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar in bytes with the time left for each stage, if standard error is a terminal.

    The block gets the function to call with (stage, bytes done, bytes in all).
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
