"""`runs`: the run folders below a folder, a row each."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from mla_tune.errors import FileError
from mla_tune.runs.metrics import read_curves
from mla_tune.runs.process import is_alive
from mla_tune.user_files import read_json_object

#: How deep below the folder run folders are looked for.
DEPTH = 3


@dataclass(slots=True)
class RunRow:
    """One run folder.  What is not known is None; `problem` says why a folder can't be read."""

    name: str
    """Relative to the folder that was searched."""
    state: str
    """done, running, killed (its process is gone), interrupted, failed, broken, or unknown."""
    base: str | None = None
    method: str | None = None
    targets: list[str] = field(default_factory=list)
    steps: int | None = None
    planned: int | None = None
    best_held_out_loss: float | None = None
    best_step: int | None = None
    last_loss: float | None = None
    tokens_per_s: float | None = None
    skipped: int = 0
    cuts: int = 0
    when: str | None = None
    """When it was begun, or last gone on with; ISO 8601."""
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def find_runs(root: Path) -> list[RunRow]:
    """Every run folder in `root`, itself included, at most `DEPTH` deep; in the order of their names.

    Raises `FileError` where `root` is no folder.
    """
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "no such folder; give the one that holds run folders"
        raise FileError(f"{root}: {what}")
    return [_row(folder, root) for folder in _folders(root, DEPTH)]


def _folders(folder: Path, depth: int) -> list[Path]:
    if (folder / "run.json").is_file():
        return [folder]
    if not depth:
        return []
    try:
        below = sorted(p for p in folder.iterdir() if p.is_dir() and not p.is_symlink() and p.name[0] != ".")
    except OSError:  # not ours to read
        return []
    return [found for sub in below for found in _folders(sub, depth - 1)]


def _row(folder: Path, root: Path) -> RunRow:
    name = folder.resolve().name if folder == root else folder.relative_to(root).as_posix()
    try:
        return _read(folder, name, read_json_object(folder / "run.json", "the record of the run"))
    except FileError as error:
        return RunRow(name, "broken", problem=str(error))
    # A record of another program, or edited by hand: any key may hold anything.
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        return RunRow(name, "broken", problem=f"{folder / 'run.json'}: is no record of mla-tune train ({error!r})")


def _read(folder: Path, name: str, run: dict[str, Any]) -> RunRow:
    if "state" not in run or "environment" not in run:
        return RunRow(name, "broken", problem=f"{folder / 'run.json'}: is no record of mla-tune train")
    curves = read_curves(folder / "metrics.jsonl")
    adapter: dict[str, Any] = run.get("adapter") or {}
    steps: dict[str, Any] = run.get("steps") or {}
    row = RunRow(name, _state(run))
    row.base, row.method = run.get("base"), adapter.get("method")
    whole = dict.fromkeys(path.rpartition(".")[2] for path in adapter.get("modules_to_save") or {})
    row.targets = [*(adapter.get("matrices") or {}), *whole]
    row.steps, row.planned = max(curves.steps, int(steps.get("done") or 0)), steps.get("planned")
    if curves.best:
        row.best_step, row.best_held_out_loss = curves.best
    row.last_loss = curves.train[-1][1] if curves.train else None
    row.tokens_per_s = run["tokens_per_s"] if row.state == "done" and "tokens_per_s" in run else curves.tokens_per_s
    row.skipped, row.cuts = curves.skipped, len(curves.cuts)
    row.when = run["environment"].get("date")
    return row


def _state(run: dict[str, Any]) -> str:
    state = str(run["state"])
    if state != "running":
        return state
    return {True: "running", False: "killed", None: "unknown"}[is_alive(run.get("process"))]


def sort_runs(rows: list[RunRow], by: str) -> list[RunRow]:
    """`when`: newest first.  `loss`: lowest held-out loss first.  `name`, `state`.  What is not known comes last."""
    if by == "when":
        return sorted(rows, key=lambda r: (_time(r.when), r.name), reverse=True)
    if by == "loss":
        return sorted(rows, key=lambda r: (r.best_held_out_loss is None, r.best_held_out_loss or 0.0, r.name))
    return sorted(rows, key=lambda r: (getattr(r, by), r.name))


def _time(when: str | None) -> float:
    try:
        return datetime.fromisoformat(when or "").timestamp()
    except ValueError:
        return 0.0


def runs_table(rows: list[RunRow]) -> Any:
    """Two lines a run, so that it fits 80 columns; what is wrong with a broken one is for below the table."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

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
