"""Tokenized rows on disk, found again by the hash of everything that they depend on.

One safetensors file a set, in `tokens/` of the cache ($MLA_TUNE_CACHE, else ~/.cache/mla-tune): ids and labels of all
samples end to end, their lengths, and the counts.  Files may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_tune.data.encode import Encoded, Sample
from mla_tune.data.row_kinds import IGNORED
from mla_tune.recipe.schema import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Changed whenever `encode` makes other tokens of the same rows.
VERSION = 1
#: Keys of the recipe on which the tokens of given rows depend.
KEYS = ("template", "train_on", "on_overflow", "on_invalid_row")


def cache_folder() -> Path:
    """Where tokenized rows are kept: $MLA_TUNE_CACHE/tokens, else ~/.cache/mla-tune/tokens."""
    root = os.environ.get("MLA_TUNE_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mla-tune"
    return (Path(root) if root else base) / "tokens"


def key_of(rows_sha256: str, part: str, tokenizer: PreTrainedTokenizerBase, data: DataSection, length: int) -> str:
    """Hash of the rows, the tokenizer with its template, and the keys that matter."""
    parts: list[Any] = [VERSION, rows_sha256, part, length, *(getattr(data, k) for k in KEYS)]
    parts += [_tokenizer(tokenizer), tokenizer.chat_template, tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _tokenizer(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return hashlib.sha256(backend.to_str().encode()).hexdigest()
    return json.dumps([type(tokenizer).__name__, tokenizer.name_or_path, len(tokenizer)])


def cached(key: str, make: Callable[[], Encoded]) -> tuple[Encoded, bool]:
    """What `make` makes, and whether it came from the cache.  A damaged file, or a folder that can't be written, costs
    the time to make it and nothing else."""
    path = cache_folder() / f"{key}.safetensors"
    found = _read(path)
    if found is not None:
        return found, True
    made = make()
    with contextlib.suppress(OSError):
        _write(path, made)
    return made, False


def _read(path: Path) -> Encoded | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as f:
            counts = json.loads(f.metadata()["counts"])
            ids, trained, lengths = (f.get_tensor(n) for n in ("ids", "trained", "lengths"))
        if lengths.sum() != len(ids) or len(ids) != counts["tokens"]:
            return None
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None
    samples, start = [], 0
    for n in lengths.tolist():
        own = ids[start : start + n].tolist()
        marks = trained[start : start + n].tolist()
        samples.append(Sample(own, [i if t else IGNORED for i, t in zip(own, marks, strict=True)]))
        start += n
    return Encoded(samples, **counts)


def _write(path: Path, encoded: Encoded) -> None:
    import numpy as np
    from safetensors.numpy import save

    path.parent.mkdir(parents=True, exist_ok=True)
    counts = {k: v for k, v in asdict(encoded).items() if k != "samples"}
    tensors = {
        "ids": np.array([i for s in encoded.samples for i in s.input_ids], dtype=np.int32),
        "trained": np.array([label != IGNORED for s in encoded.samples for label in s.labels], dtype=np.bool_),
        "lengths": np.array([len(s.input_ids) for s in encoded.samples], dtype=np.int64),
    }
    # Beside its place, then renamed: another process may read or write the same file.
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(save(tensors, {"counts": json.dumps(counts)}))
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
