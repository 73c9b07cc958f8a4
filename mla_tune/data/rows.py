"""Load the rows that a recipe names, from a file or the hub, as one kind, and hold some out for evaluation."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mla_tune.data.files import SUFFIXES, Table, read_file
from mla_tune.data.formats import normalize
from mla_tune.data.row_kinds import Kind, Row, kind_of
from mla_tune.errors import InputError, did_you_mean
from mla_tune.recipe.schema import DataSection
from mla_tune.resources import EMBEDDED_DATA

EMBEDDED = ("mbpp", "gsm8k")
"""Names of the data sets that ship with mla-tune."""


@dataclass(frozen=True)
class RowSet:
    """Rows to train on and rows to evaluate on, all of one kind (`row_kinds`)."""

    train: list[Row]
    """Rows to train on."""
    held_out: list[Row]
    """Rows to evaluate on."""
    source: str
    """Name of the data set, for tables: a path, a hub id, or an embedded set."""
    sha256: str
    """Hash of the content of both lists: equal training rows and equal held-out rows give an equal hash."""
    kind: Kind
    """Kind of all rows."""
    skipped: list[str] = field(default_factory=list)
    """For each row that `data.on_invalid_row: skip` left out, a message that says what is wrong with it."""


def load_rows(data: DataSection, seed: int) -> RowSet:
    """Load the rows of `data.path`, and the held-out rows: those of `data.eval_path`, or a part of `data.path`.

    `data.limit` takes the first rows before any are held out. It applies neither to `data.eval_path` nor to the fixed
    held-out rows of the embedded sets. `hold_out` describes which rows `data.eval_fraction` and `seed` choose.

    Raises:
        FileError: a local file is missing or can't be decoded.
        InputError: the name is unknown, the content is broken, or rows don't fit the format.
    """
    table, source = _read_table(data.path, data, "train", "data.path")
    skipped: list[str] = []
    kind, train = normalize(table.first(data.limit) if data.limit else table, data, skipped)
    held_out: list[Row] = []
    if data.eval_path is not None or (data.eval_fraction and data.path in EMBEDDED):
        held_out, suffix = load_evaluation_rows(data, kind, source, skipped)
        source += suffix
    elif data.eval_fraction:
        train, held_out = hold_out(train, data.eval_fraction, seed, source)
    return RowSet(train, held_out, source, hash_rows(kind, train, held_out), kind, skipped)


def load_evaluation_rows(data: DataSection, kind: Kind, source: str, skipped: list[str]) -> tuple[list[Row], str]:
    """Load the rows of `data.eval_path`, or the fixed held-out rows of an embedded set.

    Args:
        data: the recipe's data section.
        kind: the kind of the training rows.
        source: the name of the training rows, for messages.
        skipped: messages about rows that are left out are appended to this list.

    Returns:
        The rows, and the text to append to `source` in tables.

    Raises:
        FileError: a local file is missing or can't be decoded.
        InputError: the rows are of another kind than the training rows, or can't be used.
    """
    name = data.eval_path if data.eval_path is not None else data.path
    key = "data.eval_path" if data.eval_path is not None else "data.path"
    table, label = _read_table(name, data, "held_out", key)
    found, rows = normalize(table, data, skipped)
    if found != kind:
        raise InputError(
            f"{key}: {label} has rows of the kind {found}, but data.path: {source} has rows of the kind {kind}; both "
            "must have the same kind"
        )
    return rows, f", evaluated on {label}" if data.eval_path is not None else ""


def _read_table(name: str, data: DataSection, part: str, key: str) -> tuple[Table, str]:
    """Read the raw rows of an embedded set, a local file or a hub data set, and return them with a name for tables.

    `part` (`train`, `held_out`) chooses a part of an embedded set; `key` is the recipe's key that holds `name`.
    """
    if name in EMBEDDED:
        return read_file(EMBEDDED_DATA / f"{name}.{part}.jsonl", key), f"{name} (embedded)"
    path = Path(name).expanduser()
    if is_local_path(name, path):
        return read_file(path, key, skip_broken=data.on_invalid_row == "skip"), name
    if "/" not in name and (hint := did_you_mean(name, EMBEDDED)):
        raise InputError(
            f"{key}: no data set '{name}'{hint} Allowed: {', '.join(EMBEDDED)}, a file ({', '.join(SUFFIXES)}), "
            "or a hub id such as org/name"
        )
    return _read_hub(name, data, key)


def is_local_path(name: str, path: Path) -> bool:
    """Return whether `name` is meant as a local path, not as a hub id (`org/name`, or a bare name without a suffix).

    `path` is `name` with `~` expanded.
    """
    if path.exists() or path.suffix.lower() in SUFFIXES:
        return True
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or name.endswith("/"):
        return True
    return path.parent.is_dir() if "/" in name else bool(path.suffix)


def open_hub(name: str, data: DataSection, key: str, *, streaming: bool = False) -> tuple[Any, str]:
    """Open a hub data set with `datasets`, and return it with its name for messages.

    `key` is the recipe's key that holds `name`. Raises `InputError` if the data set can't be opened.
    """
    import datasets

    label = " ".join([name, *([data.name] if data.name else []), f"[{data.split}]"])
    try:
        keys: dict[str, Any] = {"streaming": True} if streaming else {}
        found: Any = datasets.load_dataset(name, data.name, split=data.split, **keys)
    # The hub, the network and each file format have error classes of their own, with no common base.
    except Exception as err:
        reason = (str(err).strip() or type(err).__name__).splitlines()[0]
        raise InputError(
            f"{key}: there is no file '{name}', and the hub data set couldn't be read: {reason}. "
            f"Check the id, data.name ({data.name}), data.split ({data.split}) and the network, "
            f"or give a local file ({', '.join(SUFFIXES)})"
        ) from err
    return found, label


def _read_hub(name: str, data: DataSection, key: str) -> tuple[Table, str]:
    """Read a hub data set; of `data.path` only the first `data.limit` rows."""
    found, label = open_hub(name, data, key)
    if not len(found):
        raise InputError(f"{key}: {label} holds no rows")
    count = min(len(found), data.limit) if data.limit and key == "data.path" else len(found)
    return Table(label, found.select(range(count)).to_list(), range(1, count + 1)), label


def hold_out(rows: list[Row], fraction: float, seed: int, source: str = "data") -> tuple[list[Row], list[Row]]:
    """Divide rows into (training rows, held-out rows), each in the order of `rows`.

    Equal rows stay together, so that no held-out row is trained on. Groups of equal rows are chosen in an order drawn
    from `seed` until `fraction` of the rows are held out; at least one group is. A single row stays in training, but
    of a single text the end is held out.

    Raises:
        InputError: all rows are equal, so that none can be held out; `source` names them.
    """
    if len(rows) == 1:
        return _hold_out_end(rows[0], fraction) if kind_of(rows[0]) == "text" else (rows, [])
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(canonical_json(row), []).append(i)
    if len(groups) == 1:
        raise InputError(
            f"{source}: all {len(rows)} rows are equal, so none can be held out; "
            "set data.eval_fraction: 0 or give data.eval_path"
        )
    wanted = min(round(fraction * len(rows)), len(rows) - 1)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    chosen: set[int] = set()
    for group in order:
        if len(chosen) + len(group) <= wanted:
            chosen.update(group)
    if not chosen:  # every group is larger than wanted, but at least one must be held out
        chosen.update(min(order, key=len))
    train = [row for i, row in enumerate(rows) if i not in chosen]
    return train, [row for i, row in enumerate(rows) if i in chosen]


def _hold_out_end(row: Row, fraction: float) -> tuple[list[Row], list[Row]]:
    """Cut a text at the last end of a paragraph, else of a line, that leaves at least its last `fraction` held out.

    A text without such a place stays in training as a whole.
    """
    text: str = row["text"]
    end = round(len(text) * (1 - fraction))
    for mark in ("\n\n", "\n"):
        cut = text.rfind(mark, 0, end)
        if text[: max(cut, 0)].strip() and text[cut:].strip():
            return [{"text": text[:cut]}], [{"text": text[cut:].lstrip("\n")}]
    return [row], []


def canonical_json(row: Row) -> str:
    """Return a row as one line of JSON with sorted keys, so that equal rows give equal texts."""
    return json.dumps(row, sort_keys=True)


def hash_rows(kind: Kind, train: list[Row], held_out: list[Row]) -> str:
    """Return the SHA-256 of the rows' kind, the training rows and the held-out rows, as hexadecimal digits."""
    digest = hashlib.sha256(kind.encode())
    for side, rows in (("train", train), ("held_out", held_out)):
        digest.update(f"\n{side}".encode())
        for row in rows:
            digest.update(f"\n{canonical_json(row)}".encode())
    return digest.hexdigest()
