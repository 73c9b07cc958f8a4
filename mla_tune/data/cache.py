"""Keep tokenized rows on disk under the hash of everything that they depend on (`data.cache`).

Each set of rows is one safetensors file in `tokens/` of the cache folder ($MLA_TUNE_CACHE, else ~/.cache/mla-tune). It
holds the ids and labels of all samples end to end, their lengths, and the counts. Files may be deleted at any time.
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

VERSION = 1
"""Part of every key; raise it whenever `encode` makes different samples of the same rows."""
KEYS = ("template", "train_on", "on_overflow", "on_invalid_row")
"""Keys of `data` on which the samples made of given rows depend."""


def cache_folder() -> Path:
    """Return the folder of tokenized rows: $MLA_TUNE_CACHE/tokens, else mla-tune/tokens in the user's cache folder."""
    root = os.environ.get("MLA_TUNE_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mla-tune"
    return (Path(root) if root else base) / "tokens"


def cache_key(rows_sha256: str, part: str, tokenizer: PreTrainedTokenizerBase, data: DataSection, length: int) -> str:
    """Return the key of one list of rows: a hash of all that the samples made of it depend on.

    Args:
        rows_sha256: `RowSet.sha256`.
        part: which list of the `RowSet` it is ("training rows", "held-out rows").
        tokenizer: the tokenizer, with its chat template.
        data: the recipe's data section, of which the keys in `KEYS` count.
        length: `train.max_length`.
    """
    parts: list[Any] = [VERSION, rows_sha256, part, length, *(getattr(data, k) for k in KEYS)]
    parts += [_tokenizer_identity(tokenizer), tokenizer.chat_template, tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _tokenizer_identity(tokenizer: Any) -> str:
    """Return a hash of a fast tokenizer's contents; of a slow one its class, name and size."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return hashlib.sha256(backend.to_str().encode()).hexdigest()
    return json.dumps([type(tokenizer).__name__, tokenizer.name_or_path, len(tokenizer)])


def load_or_encode(key: str, encode_rows: Callable[[], Encoded]) -> tuple[Encoded, bool]:
    """Return the samples kept under `key`, else call `encode_rows` and keep its result; and whether they were kept.

    A damaged file counts as missing, and a folder that can't be written is no error.
    """
    path = cache_folder() / f"{key}.safetensors"
    kept = _read(path)
    if kept is not None:
        return kept, True
    encoded = encode_rows()
    with contextlib.suppress(OSError):
        _write(path, encoded)
    return encoded, False


def _read(path: Path) -> Encoded | None:
    """Return the samples in a file, or None if it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as f:
            counts = json.loads(f.metadata()["counts"])
            ids, is_trained, lengths = (f.get_tensor(n) for n in ("ids", "trained", "lengths"))
        if lengths.sum() != len(ids) or len(ids) != counts["tokens"]:
            return None
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None
    samples, start = [], 0
    for n in lengths.tolist():
        sample_ids, mask = ids[start : start + n].tolist(), is_trained[start : start + n].tolist()
        labels = [token if trained else IGNORED for token, trained in zip(sample_ids, mask, strict=True)]
        samples.append(Sample(sample_ids, labels))
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
    # Write under another name and rename: another process may read or write the same file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(save(tensors, {"counts": json.dumps(counts)}))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
