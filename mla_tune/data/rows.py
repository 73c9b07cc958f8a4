"""Find the data that a recipe names, bring it into one kind, and hold a part out for evaluation."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mla_tune.data.files import SUFFIXES, Table, read_file
from mla_tune.data.formats import normalize
from mla_tune.data.row_kinds import Kind, Row
from mla_tune.errors import InputError, did_you_mean
from mla_tune.recipe.schema import DataSection
from mla_tune.resources import EMBEDDED_DATA

EMBEDDED = ("mbpp", "gsm8k")


@dataclass(frozen=True)
class RowSet:
    """Rows to train on and rows to evaluate on, all of one kind.

    prompt: `{"prompt", "completion"}`.  chat: `{"messages": [{"role", "content"}, …]}`, perhaps with `tools`.
    text: `{"text"}`.  tokens: `{"input_ids", "labels"}`.
    """

    train: list[Row]
    held_out: list[Row]
    source: str
    """Where they come from, as a few words for tables."""
    sha256: str
    """Of the content of both sides: the same rows on the same sides have the same hash."""
    kind: Kind
    skipped: list[str] = field(default_factory=list)
    """What is wrong with each row that `on_invalid_row: skip` left out."""


def load_rows(data: DataSection, seed: int) -> RowSet:
    """Rows of `data.path`, and what is held out of them or comes from `data.eval_path`.

    `limit` takes the first rows as they were read, before a part is held out; the embedded sets' held-out part and
    `eval_path` are always whole.  `eval_fraction` holds out whole groups of equal rows, chosen by `seed`, at least
    one row; a lone row stays in training, except that a lone text gives up its end.

    Raises:
        FileError: a local file that is missing or can't be decoded.
        InputError: an unknown name, broken content, or rows that don't fit the format.
    """
    table, source = _read(data.path, data, "train", "data.path")
    skipped: list[str] = []
    kind, train = normalize(table.first(data.limit) if data.limit else table, data, skipped)
    held_out: list[Row] = []
    if data.eval_path is not None or (data.eval_fraction and data.path in EMBEDDED):
        held_out, further = evaluation_rows(data, kind, source, skipped)
        source += further
    elif data.eval_fraction:
        train, held_out = split(train, data.eval_fraction, seed, source)
    return RowSet(train, held_out, source, sha256_of(kind, train, held_out), kind, skipped)


def evaluation_rows(data: DataSection, kind: Kind, source: str, skipped: list[str]) -> tuple[list[Row], str]:
    """Rows of `data.eval_path`, or of an embedded set's held-out part, and what `source` should add.

    Raises `InputError` if they are of another kind than `source`.
    """
    where = data.eval_path if data.eval_path is not None else data.path
    key = "data.eval_path" if data.eval_path is not None else "data.path"
    table, name = _read(where, data, "held_out", key)
    found, rows = normalize(table, data, skipped)
    if found != kind:
        raise InputError(
            f"{key}: {name} has rows of the kind {found}, but data.path: {source} of the kind {kind}; both must be of "
            "one kind"
        )
    return rows, f", evaluated on {name}" if data.eval_path is not None else ""


def _read(where: str, data: DataSection, part: str, key: str) -> tuple[Table, str]:
    """Raw rows, and their source in a few words."""
    if where in EMBEDDED:
        return read_file(EMBEDDED_DATA / f"{where}.{part}.jsonl", key), f"{where} (embedded)"
    path = Path(where).expanduser()
    if is_file_name(where, path):
        return read_file(path, key, data.on_invalid_row == "skip"), where
    if "/" not in where and (hint := did_you_mean(where, EMBEDDED)):
        raise InputError(
            f"{key}: no data set '{where}'{hint} Allowed: {', '.join(EMBEDDED)}, a file ({', '.join(SUFFIXES)}), "
            "or a hub id such as org/name"
        )
    return _read_hub(where, data, key)


def is_file_name(where: str, path: Path) -> bool:
    """Whether a path is meant and not a hub id: `org/name`, or a bare name without a suffix."""
    if path.exists() or path.suffix.lower() in SUFFIXES:
        return True
    if where.startswith((".", "/", "~")) or "\\" in where or where.count("/") > 1 or where.endswith("/"):
        return True
    return path.parent.is_dir() if "/" in where else bool(path.suffix)


def open_hub(name: str, data: DataSection, key: str, streaming: bool = False) -> tuple[Any, str]:
    """A hub data set as `datasets` opens it, and its name for messages."""
    import datasets

    label = " ".join([name, *([data.name] if data.name else []), f"[{data.split}]"])
    try:
        keys: dict[str, Any] = {"streaming": True} if streaming else {}
        found: Any = datasets.load_dataset(name, data.name, split=data.split, **keys)
    # The hub, the network and each file format raise errors of their own; for the user they are one: it can't be had.
    except Exception as err:
        reason = (str(err).strip() or type(err).__name__).splitlines()[0]
        raise InputError(
            f"{key}: '{name}' is no file here, and the hub data set couldn't be read: {reason}. "
            f"Check the id, data.name ({data.name}), data.split ({data.split}) and the network, "
            f"or give a local file ({', '.join(SUFFIXES)})"
        ) from err
    return found, label


def _read_hub(name: str, data: DataSection, key: str) -> tuple[Table, str]:
    found, label = open_hub(name, data, key)
    if not len(found):
        raise InputError(f"{key}: {label} holds no rows")
    count = min(len(found), data.limit) if data.limit and key == "data.path" else len(found)
    return Table(label, found.select(range(count)).to_list(), range(1, count + 1)), label


def split(rows: list[Row], fraction: float, seed: int, source: str = "data") -> tuple[list[Row], list[Row]]:
    """(train, held out), each in the rows' order.  Equal rows stay on one side, so that none is learned by heart.

    Raises:
        InputError: all rows are equal, so that nothing can be held out.
    """
    if len(rows) == 1:
        return _split_text(rows[0], fraction) if "text" in rows[0] else (rows, [])
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(canonical(row), []).append(i)
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
    if not chosen:  # nothing is that small, but something must be held out
        chosen.update(min(order, key=len))
    train = [row for i, row in enumerate(rows) if i not in chosen]
    return train, [row for i, row in enumerate(rows) if i in chosen]


def _split_text(row: Row, fraction: float) -> tuple[list[Row], list[Row]]:
    """Cut a lone text at the last paragraph's end (or line's end) before its last `fraction`."""
    text: str = row["text"]
    end = round(len(text) * (1 - fraction))
    for mark in ("\n\n", "\n"):
        cut = text.rfind(mark, 0, end)
        if text[: max(cut, 0)].strip() and text[cut:].strip():
            return [{"text": text[:cut]}], [{"text": text[cut:].lstrip("\n")}]
    return [row], []


def canonical(row: Row) -> str:
    """A row as one line of JSON with sorted keys: equal rows give equal texts."""
    return json.dumps(row, sort_keys=True)


def sha256_of(kind: Kind, train: list[Row], held_out: list[Row]) -> str:
    digest = hashlib.sha256(kind.encode())
    for side, rows in (("train", train), ("held_out", held_out)):
        digest.update(f"\n{side}".encode())
        for row in rows:
            digest.update(f"\n{canonical(row)}".encode())
    return digest.hexdigest()
