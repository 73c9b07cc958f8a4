"""`mla-tune serve-check`: say what an inference engine will do with an adapter or a checkpoint, before it is served."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mla_tune.cli.common import Json
from mla_tune.serving.engines import engine_names

if TYPE_CHECKING:
    from mla_tune.serving.compatibility import Check, CompatibilityReport

#: Verdict → its style on a terminal.
_STYLES = {"dropped": "bold red", "refused": "red", "unknown": "yellow", "applied": "green"}


def command(
    what: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTER_OR_MODEL",
            help="The adapter folder, run folder or model folder to judge, or 'embedded' for the embedded model.",
        ),
    ],
    engine: Annotated[
        str, typer.Option(metavar="NAME", help=f"The inference engine to judge for: {', '.join(engine_names())}.")
    ],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="The folder of the adapter's base model. Default: the one that the adapter records."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what an inference engine will do with an adapter or a checkpoint, and print the launch command.

    Exit code 1: the engine silently drops a part of it, or refuses it.
    """
    from mla_tune.console import print_json
    from mla_tune.errors import CheckError
    from mla_tune.serving.engines import find_engine

    report, document = _judge(what, find_engine(engine), base)
    print_json(document) if as_json else _print(report, document)
    if report.verdict in ("dropped", "refused"):
        found = {"silently dropped": _subjects_with(report, "dropped"), "refused": _subjects_with(report, "refused")}
        listed = "; ".join(f"{word}: {', '.join(names)}" for word, names in found.items() if names)
        raise CheckError(f"{what}: {report.engine.title} can't serve it as it is. {listed}")


def _subjects_with(report: CompatibilityReport, verdict: str) -> list[str]:
    """The subjects with this verdict, each once."""
    return list(dict.fromkeys(report.subjects_with(verdict)))


def _judge(what: Path, engine: Any, base: str | None) -> tuple[CompatibilityReport, dict[str, Any]]:
    """(the report on `what`, the document that `--json` prints)."""
    from mla_tune.adapter.files import ADAPTER_SUBFOLDER
    from mla_tune.adapter.settings import CONFIG_FILE
    from mla_tune.arch.build import architecture
    from mla_tune.checkpoint.index import Checkpoint
    from mla_tune.errors import FileError, InputError
    from mla_tune.resources import EMBEDDED_MODEL
    from mla_tune.runs.merge_inputs import EMBEDDED, open_inputs
    from mla_tune.serving.compatibility import check_compatibility

    folder = EMBEDDED_MODEL if str(what) == EMBEDDED else what.expanduser()
    is_model, is_adapter = (folder / "config.json").is_file(), (folder / CONFIG_FILE).is_file()
    if is_model and is_adapter:
        raise InputError(
            f"{what}: holds both config.json and {CONFIG_FILE}, and engines differ in which of them they read: move "
            "the adapter or the model to another folder"
        )
    if not (is_model or is_adapter or (folder / ADAPTER_SUBFOLDER / CONFIG_FILE).is_file()):
        found = f"holds neither config.json nor {CONFIG_FILE}" if folder.is_dir() else "no such folder"
        raise FileError(
            f"{what}: {found}: give an adapter folder, a run folder of mla-tune train, or the folder of a model"
        )
    if is_model:
        if base is not None:
            raise InputError(f"{what}: is a model, not an adapter: leave out --base")
        checkpoint = Checkpoint.open(folder)
        report = check_compatibility(engine, checkpoint, architecture(checkpoint.config, str(folder / "config.json")))
        folders = {"adapter": None, "model": str(folder)}
    else:
        inputs = open_inputs([(what, 1.0)], base, None)
        adapter = inputs.adapters[0][0]
        report = check_compatibility(engine, inputs.base, inputs.arch, adapter, str(inputs.paths.out))
        folders = {"adapter": str(adapter.folder), "model": str(inputs.base.folder)}
    return report, {
        "what": str(what),
        "kind": "model" if is_model else "adapter",
        **folders,
        "engine": engine.id,
        "verdict": report.verdict,
        "model_checks": [check.to_json() for check in report.model],
        "adapter_checks": [check.to_json() for check in report.adapter],
        "merge": report.merge,
        "launch": list(report.launch),
    }


def _print(report: CompatibilityReport, document: dict[str, Any]) -> None:
    """Print the report: tables of checks, their sources, what to do, and the commands that serve it."""
    from rich.markup import escape

    from mla_tune.console import out

    what = f"{document['adapter']} on {document['model']}" if document["adapter"] else document["model"]
    out.print(escape(f"{report.engine.title} and {what}"), soft_wrap=True)
    sources: dict[str, int] = {}
    if report.adapter:
        _table("adapter", report.adapter, sources)
    _table("base model" if report.adapter else "model", report.model, sources)
    seen = {check.fact.source for check in report.checks if check.fact}
    for source in sorted(seen, key=lambda s: sources[s.id]):
        how = {"measured": "measured", "source": "read in the code", "issue": "said by its tracker"}[source.how]
        out.print(escape(f"[{sources[source.id]}] {source.versions}; {how}, {source.date}"), soft_wrap=True)
        out.print(escape(f"    {source.url}"), soft_wrap=True)
    if unknown := _subjects_with(report, "unknown"):
        out.print(escape(f"\nunknown: {', '.join(unknown)}: compare outputs before you trust them"), soft_wrap=True)
    advice: dict[str, dict[str, None]] = {}  # what to do → the subjects that it helps with
    for check in report.checks:
        if check.fact and check.fact.instead and check.verdict != "applied":
            advice.setdefault(check.fact.instead, {})[check.item.subject] = None
    if advice:
        out.print("\nwhat to do")
        for what_to_do, subjects in advice.items():
            out.print(escape(f"  {', '.join(subjects)}: {what_to_do}"), soft_wrap=True)
    if report.merge:
        out.print(escape(f"\nmerge it\n  {report.merge}"), soft_wrap=True)
        out.print(f"\nand serve the merged checkpoint (serve-check it first) with {report.engine.title}")
    else:
        out.print("\nlaunch")
    for line in report.launch:
        out.print(escape(f"  {line}"), soft_wrap=True)


def _table(title: str, checks: tuple[Check, ...], sources: dict[str, int]) -> None:
    """Print a table with a row for each group of neighboring checks that the same fact decides.

    `sources` gets a number for each new source, by its id.
    """
    from itertools import groupby

    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    from mla_tune.console import out

    table = Table(box=SIMPLE_HEAD)
    table.add_column(title, max_width=26, overflow="fold")
    has_roles = any(check.item.topic == "role" for check in checks)
    if has_roles:
        table.add_column("matrices", justify="right")
    table.add_column("verdict", no_wrap=True)
    table.add_column("why")
    for _, group in groupby(checks, key=lambda c: (c.fact, c.item.topic) if c.fact else (None, c.item)):
        same = list(group)
        names = ", ".join(c.item.subject + (f" ({c.item.detail})" if c.item.detail else "") for c in same)
        fact, verdict = same[0].fact, same[0].verdict
        mark = f" [{sources.setdefault(fact.source.id, len(sources) + 1)}]" if fact else ""
        count = sum(c.item.count for c in same)
        style = _STYLES[verdict]
        table.add_row(
            escape(names),
            *([f"{count:,}" if count else ""] if has_roles else []),
            f"[{style}]{verdict}[/]",
            escape(same[0].says + mark),
        )
    out.print(table)
