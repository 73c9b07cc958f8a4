"""The files with absorbed tensors beside a checkpoint: names, contents, what they were made from."""

from __future__ import annotations

import json
from pathlib import Path

from mla_tune.checkpoint.index import Shard, TensorRef, read_shard
from mla_tune.errors import FileError
from mla_tune.user_files import read_json_object

#: The name of a single file, and of the index of several.
ABSORBED_FILE = "absorbed.safetensors"
ABSORBED_INDEX = "absorbed.safetensors.index.json"


def absorbed_shards(folder: Path) -> list[Shard]:
    """Read the headers of the absorbed files of a model folder; empty where there are none.

    Raises `FileError` for a damaged index, and for missing files that it names.
    """
    index, single = folder / ABSORBED_INDEX, folder / ABSORBED_FILE
    names: dict[str, None] = dict.fromkeys([ABSORBED_FILE] if single.is_file() else [])
    if index.is_file():
        weight_map = read_json_object(index, "the index of the absorbed tensors", unique=True).get("weight_map")
        if not isinstance(weight_map, dict) or not all(Path(str(n)).name == n for n in weight_map.values()):
            raise FileError(f"{index}: has no 'weight_map' from keys to files of this folder: the index is damaged")
        names = dict.fromkeys(weight_map.values())
    return [read_shard(folder / name) for name in names]


def absorbed_tensors(folder: Path) -> dict[str, TensorRef]:
    """The absorbed tensors of a model folder, from all its files, by key."""
    return {key: ref for shard in absorbed_shards(folder) for key, ref in shard.tensors.items()}


def sources_of(shard: Shard) -> dict[str, str]:
    """Key → sha256 of the tensors from which those of this file were made; empty where the file does not say."""
    try:
        found = json.loads(shard.metadata.get("source_sha256", "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
