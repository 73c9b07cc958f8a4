"""Files that appear whole or not at all: written beside, flushed to the disk, renamed."""

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
    """A binary file to write; `file` appears, or is replaced, when the block ends well, and is untouched otherwise."""
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
    """Make renames inside `folder` survive a power cut.  Does nothing where folders can't be opened (Windows)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def copy_file(source: Path, target: Path) -> None:
    """Copy the contents, whole or not at all; a link is followed."""
    with source.open("rb") as read, replacing(target) as write:
        shutil.copyfileobj(read, write, 1 << 24)


def sha256_of(file: Path) -> str:
    """Digest of the whole file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(file: Path, document: Any) -> None:
    """Whole or not at all, in the style of Hugging Face's own JSON files."""
    with replacing(file) as stream:
        stream.write((json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())
