"""`mla-tune runs`: list the runs below a folder in a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def command(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Folder to search for run folders, at most three levels deep."),
    ] = Path("runs"),
    sort: Annotated[
        Literal["when", "loss", "name", "state"],
        typer.Option(
            "--sort",
            help="Order of the runs: newest first (when), lowest held-out loss first (loss), by name, or by state.",
        ),
    ] = "when",
    json: Annotated[
        bool, typer.Option("--json", help="Print a list with an object for each run as one JSON document.")
    ] = False,
) -> None:
    """List the runs below a folder: what was trained, state, steps, held-out loss, speed, skipped steps."""
    from mla_tune.console import out, print_json
    from mla_tune.report.runs_table import runs_table
    from mla_tune.runs.find import find_runs, sort_runs

    rows = sort_runs(find_runs(folder), sort)
    if json:
        print_json([r.to_json() for r in rows])
    elif not rows:
        out.print(f"no run folders in {folder}, searched three levels deep; mla-tune train writes them", soft_wrap=True)
    else:
        out.print(runs_table(rows))
        for row in rows:
            if row.problem is not None:
                out.print(f"broken: {row.problem}", markup=False, soft_wrap=True)
