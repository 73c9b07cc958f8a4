"""The folder that a merge is built in, beside its place: locked, resumable, renamed when everything holds.

    .OUT.lock        held while a merge into OUT runs; the system releases it when the process dies
    .OUT.partial/    the output so far; state.json says of what, finished.jsonl which shards are whole

A shard is listed in finished.jsonl only after its bytes have reached the disk and it has its name, so a merge that was
killed at any moment goes on from there.  state.json binds the folder to the base (its headers, sizes and times of
change), the adapters (their content) and the options: anything else starts anew.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mla_tune import __version__
from mla_tune.adapter.files import CONFIG_FILE, WEIGHTS_FILE
from mla_tune.checkpoint.atomic_files import sha256_of, sync_folder, write_json
from mla_tune.errors import FileError
from mla_tune.merge.output import MergePlan
from mla_tune.user_files import read_json_object

STATE_FILE, JOURNAL_FILE = "state.json", "finished.jsonl"
#: Raised when what is written for the same plan changes.
_FORMAT = 1


@dataclass
class Staging:
    """`identity` is what decides the bytes of the output; `finished` maps the name of a whole shard to what was
    recorded about it."""

    folder: Path
    identity: dict[str, Any]
    finished: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: The user may go on from here: set when work failed for a reason that lies outside of it.
    keep: bool = False

    def record(self, name: str, what: dict[str, Any]) -> None:
        """Note a shard that is whole and on the disk."""
        with (self.folder / JOURNAL_FILE).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps({"shard": name, **what}) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        self.finished[name] = what


def partial_folder(out: Path) -> Path:
    """Where `out` is built."""
    return out.with_name(f".{out.name}.partial")


@contextmanager
def staged(out: Path, plan: MergePlan, note: Callable[[str], None]) -> Iterator[Staging]:
    """A folder to build `out` in, with what an earlier run of the same plan has finished; it takes `out`'s place when
    the block ends well.  It stays where the block ends by a signal, a system error or with `keep` set, and is removed
    by any other error.

    Raises `FileError` where another process is merging into `out`.  `note` is told what is taken up or thrown away.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    replaced = out.with_name(f".{out.name}.replaced")
    with _locked(out):
        if replaced.exists() and not out.exists():
            replaced.rename(out)  # a run was killed between the two renames below
        shutil.rmtree(replaced, ignore_errors=True)
        staging = _open(partial_folder(out), plan, note)
        try:
            yield staging
            for name in (STATE_FILE, JOURNAL_FILE):
                (staging.folder / name).unlink()
            sync_folder(staging.folder)
            if out.exists():
                out.rename(replaced)
            staging.folder.rename(out)
        except BaseException as error:
            if replaced.exists() and not out.exists():
                replaced.rename(out)
            outside = isinstance(error, KeyboardInterrupt) or (
                isinstance(error, OSError) and not isinstance(error, FileError)
            )
            if not (outside or staging.keep):
                shutil.rmtree(staging.folder, ignore_errors=True)
            raise
        sync_folder(out.parent)
        shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    file = out.with_name(f".{out.name}.lock")
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise FileError(
            f"{out}: another merge is writing there: wait for it, or name another folder with --out"
        ) from None
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is held: a waiting process would take a file that is gone
        lock.release()


def _open(folder: Path, plan: MergePlan, note: Callable[[str], None]) -> Staging:
    wanted = identity(plan)
    staging = Staging(folder, wanted)
    if folder.exists():
        changed = _changed(folder, wanted)
        if changed is None:
            staging.finished = _finished(folder, plan)
            for stale in folder.rglob(".*.partial*"):
                stale.unlink()
            done, total = len(staging.finished), len(plan.shards)
            note(f"going on from an earlier run: {done} of {total} files are finished")
            return staging
        note(f"an unfinished merge of {changed} lies in {folder.name}: beginning anew")
        shutil.rmtree(folder)
    folder.mkdir()
    write_json(folder / STATE_FILE, wanted)
    return staging


def _changed(folder: Path, wanted: dict[str, Any]) -> str | None:
    """What the unfinished merge in `folder` differs in; None where it is the same."""
    try:
        found = read_json_object(folder / STATE_FILE, "the state of the merge")
    except FileError:
        return "unknown origin"
    if found == wanted:
        return None
    names = {"base": "another base", "adapters": "another adapter", "options": "other options"}
    differing = [text for key, text in names.items() if found.get(key) != wanted[key]]
    return " and ".join(differing) or "another version of mla-tune"


def _finished(folder: Path, plan: MergePlan) -> dict[str, dict[str, Any]]:
    """The shards that are listed as whole and lie there with the bytes that were written."""
    journal = folder / JOURNAL_FILE
    names = {shard.name for shard in plan.shards}
    finished = {}
    for line in journal.read_text(encoding="utf-8", errors="replace").splitlines() if journal.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # killed while the line was written
        name = entry.pop("shard", None)
        file = folder / str(name)
        if name in names and file.is_file() and file.stat().st_size == entry.get("bytes"):
            finished[name] = entry
    return finished


def identity(plan: MergePlan) -> dict[str, Any]:
    """What decides the bytes of the output."""
    base = plan.checkpoint
    return {
        "format": _FORMAT,
        "mla_tune": __version__,
        "base": {
            "config": sha256_of(base.folder / "config.json"),
            "shards": {
                base.name(s): [s.header_sha256, s.stamp.size, s.stamp.mtime_ns, s.stamp.inode] for s in base.shards
            },
        },
        "adapters": [
            {"weight": weight, **{name: sha256_of(adapter.folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}}
            for adapter, weight in plan.adapters
        ],
        "options": plan.options.to_json(),
    }
