"""Read a local file into a table of raw rows, each with the place it came from.

    .jsonl    one object a line; blank lines are skipped
    .json     a list of objects
    .csv      a header line, then one row a record; every cell is a string
    .parquet  one row a record
    .txt      the whole file is one row with the column `text`; encoding cuts it into pieces later

Text is UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mla_tune.errors import FileError, InputError, MlaTuneError, did_you_mean
from mla_tune.user_files import decode, read_bytes

# The csv module refuses cells of more than 128 KiB unless told otherwise; a document may be longer.
_CSV_CELL = 1 << 30


@dataclass(frozen=True)
class Table:
    """Raw rows and where they stand."""

    name: str
    """What it was read from, for messages."""
    rows: list[Any]
    """One decoded record each; not yet checked to be objects."""
    places: Sequence[int]
    """The line or row number of each, from 1."""
    unit: str = "row"
    """What `places` counts: `line` or `row`."""
    faults: list[str] = field(default_factory=list)
    """What is wrong with each line that isn't among the rows, with its place; only where lines may be skipped."""

    def where(self, index: int) -> str:
        """Where row `index` stands, for messages: file and line, or row number."""
        return f"{self.name}: {self.unit} {self.places[index]}"

    def first(self, count: int) -> Table:
        """A table of the first `count` rows."""
        return Table(self.name, self.rows[:count], self.places[:count], self.unit, self.faults)


def read_file(path: Path, key: str, skip: bool = False) -> Table:
    """The rows of a local file.

    Args:
        path: the file.
        key: the recipe's key that named it, for messages.
        skip: put a broken line of .jsonl or .csv among the table's `faults` instead of raising.

    Raises:
        FileError: missing, a folder, not UTF-8, or a damaged parquet file.
        InputError: a suffix that isn't read, broken JSON or CSV, or no row at all.
    """
    table = _READERS[suffix_of(path, key)](path, skip)
    if not table.rows and table.faults:
        raise InputError(f"{table.faults[0]}\nall {len(table.faults)} lines of {path} are broken, so none can be used")
    if not table.rows:
        raise InputError(f"{path}: holds no rows ({path.stat().st_size} bytes); {key} needs at least one")
    return table


def suffix_of(path: Path, key: str) -> str:
    """The suffix of a file that is there and can be read, or the error that says why not."""
    if not path.is_file():
        raise FileError(f"{key}: {path}: {_missing(path)}")
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        allowed = ", ".join(_READERS)
        raise InputError(
            f"{key}: {path}: the suffix '{path.suffix}' isn't one that is read; allowed: {allowed}. "
            "Convert the file, or rename it if it is one of these"
        )
    return suffix


def _missing(path: Path) -> str:
    if path.is_dir():
        return f"is a folder; name one file in it ({', '.join(SUFFIXES)})"
    if not path.parent.is_dir():
        return f"no such file; there is no folder {path.parent} either"
    names = sorted(p.name for p in path.parent.iterdir() if p.is_file())
    hint = did_you_mean(path.name, names)
    return f"no such file{hint or f'; nothing in {path.parent.resolve()} has a name like it'}"


def _bytes(path: Path) -> bytes:
    return read_bytes(path, "a data set", most=None)


def _text(path: Path) -> str:
    return decode(_bytes(path), str(path))


def _json_fault(text: str, err: json.JSONDecodeError) -> str:
    near = text[max(0, err.pos - 15) : err.pos + 15]
    return f"{err.msg} near {near!r}" if near else f"{err.msg}; nothing stands there"


def jsonl_records(lines: Iterable[bytes], path: Path, first: int = 1) -> Iterator[tuple[int, Any]]:
    """(line number, row) of every line that isn't blank, from line `first` on; of a broken one the `InputError`."""
    for number, line in enumerate(lines, start=first):
        try:
            text = decode(line, str(path), number)
            if text.strip():
                yield number, json.loads(text)
        except json.JSONDecodeError as err:
            place = f"{path}: line {number}, column {err.colno}"
            fault = InputError(
                f"{place}: not JSON: {_json_fault(err.doc, err)}. Each line must be one whole JSON object"
            )
            fault.__cause__ = err
            yield number, fault
        except (RecursionError, ValueError) as err:  # nested too deeply; a whole number of thousands of digits
            fault = InputError(f"{path}: line {number}: not JSON that can be read: {err}")
            fault.__cause__ = err
            yield number, fault
        except FileError as err:
            yield number, err


def _read_jsonl(path: Path, skip: bool) -> Table:
    data = _bytes(path)
    if not skip or data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        decode(data, str(path))
    # Not splitlines(): U+2028 and its like may stand unescaped inside a JSON string.
    return _table(path, jsonl_records(data.split(b"\n"), path), skip)


def _table(path: Path, records: Iterable[tuple[int, Any]], skip: bool) -> Table:
    rows: list[Any] = []
    places: list[int] = []
    faults: list[str] = []
    for place, row in records:
        if isinstance(row, MlaTuneError):
            if not skip:
                raise row
            faults.append(str(row))
        else:
            rows.append(row)
            places.append(place)
    return Table(str(path), rows, places, "line", faults)


def _read_json(path: Path, skip: bool) -> Table:
    text = _text(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as err:
        lines = err.msg == "Extra data" and err.lineno > 1
        todo = "It looks like one object a line: name it .jsonl" if lines else "The file must be one list of objects"
        raise InputError(
            f"{path}: line {err.lineno}, column {err.colno}: not JSON: {_json_fault(text, err)}. {todo}"
        ) from err
    except (RecursionError, ValueError) as err:  # nested too deeply; a whole number of thousands of digits
        raise InputError(f"{path}: not JSON that can be read: {err}") from err
    if not isinstance(rows, list):
        found = f"an object with the keys {', '.join(map(str, rows))}" if isinstance(rows, dict) else repr(rows)[:60]
        raise InputError(f"{path}: must be a list of objects, found {found}; put the list alone in the file")
    return Table(str(path), rows, range(1, len(rows) + 1))


def csv_records(lines: Iterable[str], path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, row) of every record; of one with other cells than the header the `InputError`.

    Raises `InputError` for a header that names a column twice, and for text that isn't CSV, after which nothing can be
    told apart.
    """
    limit = csv.field_size_limit(_CSV_CELL)
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader, [])
        if twice := sorted({name for name in header if header.count(name) > 1}):
            raise InputError(
                f"{path}: line 1: the header names {', '.join(twice)} twice; give each column its own name"
            )
        place = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                yield (
                    place,
                    InputError(
                        f"{path}: line {place}: {len(cells)} cells, but the header has {len(header)} "
                        f"({', '.join(header)}); a cell with a comma or a line break needs quotes around it"
                    ),
                )
            elif cells:
                yield place, dict(zip(header, cells, strict=True))
            place = reader.line_num + 1
    except csv.Error as err:
        raise InputError(f"{path}: line {reader.line_num}: not CSV: {err}; is a quote left open?") from err
    finally:
        csv.field_size_limit(limit)


def _read_csv(path: Path, skip: bool) -> Table:
    return _table(path, csv_records(io.StringIO(_text(path), newline=""), path), skip)


def _read_parquet(path: Path, skip: bool) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as err:
        reason = str(err).splitlines()[0].rstrip(".")
        raise FileError(f"{path}: isn't a whole parquet file: {reason}; fetch or write it again") from err
    return Table(str(path), rows, range(1, len(rows) + 1))


def _read_txt(path: Path, skip: bool) -> Table:
    text = _text(path)
    return Table(str(path), [{"text": text}] if text.strip() else [], (1,))


_READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".txt": _read_txt,
}
SUFFIXES: tuple[str, ...] = tuple(_READERS)
