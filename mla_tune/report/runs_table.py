"""The table of `mla-tune runs`."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from mla_tune.runs.find import RunRow


def runs_table(rows: list[RunRow]) -> Table:
    """Return a table of the runs, two lines for each, so that it fits 80 columns.

    What is wrong with a broken run is left to a line below the table.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("run\nrecipe", overflow="fold", ratio=1)
    table.add_column("state\nbegun", no_wrap=True)
    for title in ("steps\nof", "held-out loss\nbest, at step", "last loss\ntokens/s", "skipped\ncuts"):
        table.add_column(title, justify="right", no_wrap=True)
    for r in rows:
        if r.problem is not None:
            table.add_row(Text(r.name), r.state, *["–"] * 4)
            continue
        rate = "–" if r.tokens_per_s is None else f"{r.tokens_per_s:,.0f}"
        table.add_row(
            Text(f"{r.name}\n{_recipe(r)}"),
            f"{r.state}\n{_day(r.when)}",
            f"{r.steps:,}\n" + ("–" if r.planned is None else f"{r.planned:,}"),
            "–" if r.best_held_out_loss is None else f"{r.best_held_out_loss:.4f}\n{r.best_step:,}",
            ("–" if r.last_loss is None else f"{r.last_loss:.4f}") + f"\n{rate}",
            f"{r.skipped:,}\n{r.cuts:,}",
        )
    return table


def _recipe(row: RunRow) -> str:
    targets = ", ".join(row.targets[:3]) + (f" and {len(row.targets) - 3} more" if len(row.targets) > 3 else "")
    method = "every weight" if row.method == "none" else row.method
    base = Path(row.base).name if row.base and row.base.startswith("/") else row.base
    return " · ".join(part for part in (base, method, targets) if part)


def _day(when: str | None) -> str:
    return when[5:16].replace("T", " ") if when else "–"
