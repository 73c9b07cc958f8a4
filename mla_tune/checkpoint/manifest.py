"""Read the manifest of a merged checkpoint.

`merge.export` writes it: base, adapters and options of the merge, and bytes and sha256 of every file of the output.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from mla_tune.errors import FileError
from mla_tune.user_files import read_json_object

MANIFEST_FILE = "mla_tune_manifest.json"


def read_manifest(folder: Path, options: Collection[str]) -> dict[str, Any]:
    """Return the manifest in `folder`, or an empty dictionary where there is none.

    `options` are the names of the merge's options, which it must hold.  Raises `FileError` for a file that can't be
    read, is damaged, or was written by another version.
    """
    file = folder / MANIFEST_FILE
    if not file.is_file():
        return {}
    manifest = read_json_object(file, "the manifest of the merge")
    match manifest:
        case {"base": str(), "base_files": dict(), "adapters": [_, *_], "options": dict(found), "files": dict()}:
            if found.keys() == set(options):
                return manifest
    raise FileError(f"{file}: is damaged, or of another version of mla-tune: remove it and name --base and --adapter")
