"""Checkpoints that are whole or absent.

The Trainer writes a checkpoint into `checkpoints/.partial`.  Then a list of its files with sizes and hashes is added,
all is synced to the disk, and a rename gives the folder its name.  A folder without the list, or with other files than
the list says, is damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mla_tune.errors import FileError, WorkError
from mla_tune.user_files import read_json_object

FILES = "files.json"
#: What mla-tune itself has to remember: spike guard, counts, patience of early stopping.
STATE = "mla_tune_state.json"
PARTIAL = ".partial"


def number_of(checkpoint: Path) -> int:
    """Return the optimizer step after which a checkpoint was made."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(folder: Path) -> list[Path]:
    """Return the folders with a checkpoint's name, whole or damaged, newest first."""
    found = [p for p in folder.glob("checkpoint-*") if p.is_dir() and p.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=number_of, reverse=True)


def damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, in a few words; None: all files are as they were written."""
    if not (checkpoint / FILES).exists():
        return f"{FILES} is missing, so it was never whole"
    try:
        files = read_json_object(checkpoint / FILES, "the list of a checkpoint's files")
    except FileError as error:
        return f"{FILES} can't be read ({error})"
    for name, wanted in files.items():
        if not isinstance(wanted, dict) or not {"bytes", "sha256"} <= wanted.keys():
            return f"{FILES} does not give the size and hash of {name}"
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != wanted["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {wanted['bytes']}"
        if _sha256(path) != wanted["sha256"]:
            return f"{name} was changed since it was written"
    return None


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint (None: there is none) and a line for each newer one that is damaged."""
    lines: list[str] = []
    for checkpoint in checkpoints(folder):
        wrong = damage(checkpoint)
        if wrong is None:
            return checkpoint, lines
        lines.append(f"{checkpoint} is damaged: {wrong}")
    return None, lines


@contextmanager
def whole_or_absent(
    folder: Path, step: int, is_main_process: bool = True, wait: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Within this context a staging folder is there to write `checkpoint-STEP` into; at its end that moves to `folder`.

    In a run of several processes all write into it, and the main process makes and seals it; `wait` waits until all
    processes have called it.  Raises `WorkError` where it can't be written; the new checkpoint is deleted then, and
    older ones are untouched.
    """
    staging = folder / PARTIAL
    target = folder / f"checkpoint-{step}"
    try:
        if is_main_process:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        wait()
        yield staging
        wait()
        if is_main_process:
            made = staging / target.name
            _seal(made)
            shutil.rmtree(target, ignore_errors=True)
            made.rename(target)
            _sync(folder)
        wait()
    except Exception as error:
        if not _is_about_writing(error):
            raise
        last, _ = newest_whole(folder)
        rest = f"the last whole one is {last}; make room and go on with --resume" if last else "there is none before it"
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WorkError(f"the checkpoint of step {step} can't be written to {folder} ({what}); {rest}") from error
    finally:
        if is_main_process:
            shutil.rmtree(staging, ignore_errors=True)


def keep_newest(folder: Path, count: int) -> None:
    """Delete all checkpoints but the newest `count`."""
    for old in checkpoints(folder)[count:]:
        shutil.rmtree(old, ignore_errors=True)


def _seal(made: Path) -> None:
    files = sorted(p for p in made.rglob("*") if p.is_file())
    entries = {str(p.relative_to(made)): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files}
    for path in files:
        _sync(path)
    listing = made / FILES
    listing.write_text(json.dumps(entries, indent=1))
    _sync(listing)
    _sync(made)


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_about_writing(error: Exception) -> bool:
    """Return whether the disk caused an error; torch and safetensors raise errors of their own then."""
    words = ("No space left", "File too large", "quota", "I/O error", "PytorchStreamWriter", "enforce fail", "write")
    known = type(error).__name__ in ("SafetensorError", "RuntimeError") and any(w in str(error) for w in words)
    return isinstance(error, OSError) or known
