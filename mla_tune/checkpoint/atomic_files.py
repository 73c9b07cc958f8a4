"""Write files that appear complete or not at all: written under another name, flushed to the disk, renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(file: Path) -> Iterator[IO[bytes]]:
    """Open a binary file for writing that becomes `file` at the end of the block.

    If the block raises, nothing is left of it, and an earlier `file` stays as it was.
    """
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power failure.  Does nothing where folders can't be opened (Windows)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def copy_file(source: Path, target: Path) -> None:
    """Copy the contents of a file; `target` appears complete or not at all.  Links are followed."""
    with source.open("rb") as read, replacing(target) as write:
        shutil.copyfileobj(read, write, 1 << 24)


def sha256_of(file: Path) -> str:
    """Digest of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(file: Path, document: Any) -> None:
    """Write a JSON file, indented as Hugging Face's own are; it appears complete or not at all."""
    with replacing(file) as stream:
        stream.write((json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())
