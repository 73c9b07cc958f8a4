"""Find the run folders below a folder, read what each holds, and sort them: the rows of `mla-tune runs`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from mla_tune.errors import FileError
from mla_tune.runs.folder import RunFolder
from mla_tune.runs.metrics import read_curves
from mla_tune.runs.process import is_alive
from mla_tune.runs.record import UNKNOWN, RunRecord

#: How deep below the folder run folders are looked for.
DEPTH = 3


@dataclass(slots=True)
class RunRow:
    """One run folder.  What is not known is None."""

    #: The folder, relative to the one that was searched.
    name: str
    #: done, running, killed (its process is gone), interrupted, failed, broken (run.json can't be read), or unknown.
    state: str
    #: The base model, as the recipe names it.
    base: str | None = None
    #: Adapter method; `none`: every weight is trained.
    method: str | None = None
    #: What is trained: roles, and modules that are trained whole.
    targets: list[str] = field(default_factory=list)
    #: Optimizer steps done.
    steps: int | None = None
    #: Optimizer steps that the recipe asks for.
    planned: int | None = None
    #: The lowest held-out loss.
    best_held_out_loss: float | None = None
    #: The step after which it was measured.
    best_step: int | None = None
    #: Training loss of the last logged step.
    last_loss: float | None = None
    #: Real tokens a second.
    tokens_per_s: float | None = None
    #: Steps that the spike guard skipped.
    skipped: int = 0
    #: Cuts of the learning rate.
    cuts: int = 0
    #: When the run was begun, or last gone on with; ISO 8601.
    when: str | None = None
    #: Why a broken folder can't be read.
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the row as a JSON object."""
        return asdict(self)


def find_runs(root: Path) -> list[RunRow]:
    """Return a row for each run folder in `root`, itself included, at most `DEPTH` deep, in the order of their names.

    Raises `FileError` where `root` is no folder.
    """
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "no such folder; give the one that holds run folders"
        raise FileError(f"{root}: {what}")
    return [_row(folder, root) for folder in _folders(root, DEPTH)]


def _folders(folder: Path, depth: int) -> list[Path]:
    if RunFolder(folder).run_json.is_file():
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
        return _read(RunFolder(folder), name)
    except (FileError, OSError) as error:
        return RunRow(name, "broken", problem=str(error))


def _read(folder: RunFolder, name: str) -> RunRow:
    record = folder.read()
    if record.state == UNKNOWN or not record.environment:
        raise FileError(f"{folder.run_json}: names no state or no environment, so it is no record of mla-tune train")
    curves = read_curves(folder.metrics)
    row = RunRow(name, _state(record), record.base)
    if record.adapter is not None:
        modules = dict.fromkeys(path.rpartition(".")[2] for path in record.adapter.modules_to_save)
        row.method, row.targets = record.adapter.method, [*record.adapter.matrices, *modules]
    row.steps, row.planned = max(curves.steps, record.steps.done), record.steps.planned
    if curves.best:
        row.best_step, row.best_held_out_loss = curves.best
    row.last_loss = curves.train[-1][1] if curves.train else None
    is_done = row.state == "done" and record.tokens_per_s is not None
    row.tokens_per_s = record.tokens_per_s if is_done else curves.tokens_per_s
    row.skipped, row.cuts = curves.skipped, len(curves.cuts)
    row.when = str(record.environment["date"]) if record.environment.get("date") else None
    return row


def _state(record: RunRecord) -> str:
    if record.state != "running":
        return record.state
    return {True: "running", False: "killed", None: UNKNOWN}[is_alive(record.process)]


def sort_runs(rows: list[RunRow], by: str) -> list[RunRow]:
    """Sort rows by `when` (newest first), `loss` (lowest held-out loss first), `name` or `state`.

    Runs of which it is not known come last.
    """
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
