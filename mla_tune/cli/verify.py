"""`mla-tune verify`: prove a merged checkpoint, made by any tool, against its base and its adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mla_tune.verification.verify import VerifyResult

#: Tensors that are listed.
_LISTED = 20


def command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a merged checkpoint, made by any tool.")],
    base: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Folder of the base model, or 'embedded'. Default: what OUT's manifest says."),
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="DIR[=WEIGHT]",
            help="Adapter or run folder that was merged, with its weight (default 1). Default: those of the manifest.",
        ),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Compare logits too (loads transformers and PEFT).")
    ] = True,
    workers: Annotated[int | None, typer.Option(min=1, metavar="N", help="Threads. Default: cores, at most 4.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """Prove a merged checkpoint, made by any tool, number by number against its base and adapters."""
    from mla_tune.cli.merge_absorb import bars, weighted
    from mla_tune.console import print_json
    from mla_tune.errors import CheckError
    from mla_tune.merge.run import default_workers
    from mla_tune.verification.verify import verify

    named = weighted(None, adapters) if adapters else []
    with bars(["check", *(["logits"] if probe else [])]) as show:
        found = verify(out, base, named, probe=probe, workers=workers or default_workers(), progress=show)
    print_json(found.to_json()) if as_json else _print(found)
    if not found.holds:
        n = found.proof.failed
        what = "tensor or file is" if n == 1 else "tensors or files are"
        raise CheckError(f"{out}: {n:,} {what} not what base and adapters make")


def _print(found: VerifyResult) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    from mla_tune.console import out

    names = ", ".join(f"{Path(p).name} × {w:g}" if w != 1 else Path(p).name for p, w in found.adapters)
    out.print(escape(f"{found.output}: {names} merged into {found.base}"), soft_wrap=True)
    for note in found.notes:
        out.print(escape(f"note: {note}"), soft_wrap=True)
    if found.proof.failed:
        table = Table(box=SIMPLE_HEAD)
        table.add_column("tensor or file", no_wrap=True)
        table.add_column("what is wrong")
        for failure in found.proof.failures[:_LISTED]:
            table.add_row(escape(failure.key), escape(failure.what))
        out.print(table)
        if found.proof.failed > _LISTED:
            out.print(f"and {found.proof.failed - _LISTED:,} more")
        return
    result = found.to_json()
    print_proof(result["proof"], result["probe"])


def print_proof(proof: dict[str, Any], probe: dict[str, Any] | None) -> None:
    """What was proven, and what the logits said, from `ProofReport.to_json` and `LogitsReport.to_json`."""
    from mla_tune.console import human_count

    near = "each the nearest to the exact sum" if proof["worst_ulp"] <= 0.5 else f"within {proof['worst_ulp']:.3g} ulp"
    _say(f"proven   {proof['recomputed']:,} tensors computed again, {human_count(proof['numbers'])} numbers, {near}")
    same = proof["same_files"]
    shared = f", {same:,} file{'s' * (same != 1)} shared with the base" if same else ""
    unchanged = f"{proof['unchanged']:,} tensors are the base's, byte for byte{shared}"
    if proof["absorbed"]:
        unchanged += f"; absorbed tensors of {proof['absorbed']:,} modules follow from what was written"
    _say(f"         {unchanged}")
    if probe is None:
        _say("logits   not compared (--no-probe)")
        return
    if not probe["ran"]:
        _say(f"logits   not compared: {probe['reason']}")
        return
    lines = [c for c in (probe["merged"], probe["absorbed"]) if c is not None]
    for i, c in enumerate(lines):
        error = f"off by at most {c['max_error']:.2g} of {c['largest']:.3g}"
        figures = f"{error}, KL {c['kl']:.2g}, top-1 {c['top1']:.1%}"
        _say(f"{'' if i else 'logits':8} {c['reference']} → {c['other']}: {figures}")
    if probe["merged"] is not None and probe["merged"]["top1"] < 0.99:
        _say("         rounding moves logits, most where a router's choice tips over: the numbers are the proof")
    if probe["idle"]:
        _say("         the adapter changes no logit: these can't tell a merge from none")
    if probe["reason"]:
        _say(f"         not everything was compared: {probe['reason']}")


def _say(line: str) -> None:
    """A line of 9 columns and a text, which goes on below itself where the terminal is narrow."""
    from rich.markup import escape
    from rich.table import Table

    from mla_tune.console import out

    if not out.is_terminal:
        out.print(escape(line), soft_wrap=True)
        return
    grid = Table.grid()
    grid.add_column(width=9)
    grid.add_column()
    grid.add_row(line[:9], escape(line[9:]))
    out.print(grid)
