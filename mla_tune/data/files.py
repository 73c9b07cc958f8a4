"""Read a local file into a table of raw rows, each with its line or row number.

    .jsonl    one object per line; blank lines are skipped
    .json     a list of objects
    .csv      a header line, then one row per record; every cell is a string
    .parquet  one row per record
    .txt      the whole file is one row with the column `text`; `encode` splits it into samples

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

# By default the csv module refuses cells of more than 128 KiB; a document may be longer.
_MAX_CSV_CELL = 1 << 30


@dataclass(frozen=True)
class Table:
    """Raw rows and where they come from."""

    name: str
    """The file or data set, for messages."""
    rows: list[Any]
    """The decoded records. Nothing has checked yet that they are objects."""
    numbers: Sequence[int]
    """For each row its line or row number, from 1."""
    unit: str = "row"
    """What `numbers` counts: `line` or `row`."""
    faults: list[str] = field(default_factory=list)
    """For each broken line that was skipped, a message that says where it is and what is wrong with it."""

    def location(self, index: int) -> str:
        """Return where the row at `index` is, for messages: the name and the line or row number."""
        return f"{self.name}: {self.unit} {self.numbers[index]}"

    def first(self, count: int) -> Table:
        """Return a table of the first `count` rows."""
        return Table(self.name, self.rows[:count], self.numbers[:count], self.unit, self.faults)


def read_file(path: Path, key: str, *, skip_broken: bool = False) -> Table:
    """Read the rows of a local file.

    Args:
        path: the file.
        key: the recipe's key that names the file, for messages.
        skip_broken: add a broken line of .jsonl or .csv to the table's `faults` instead of raising.

    Raises:
        FileError: the file is missing, a folder, not UTF-8, or a damaged parquet file.
        InputError: the suffix is not supported, JSON or CSV is broken, or there is no row.
    """
    table = _READERS[suffix_of(path, key)](path, skip_broken)
    if not table.rows and table.faults:
        raise InputError(f"{table.faults[0]}\nall {len(table.faults)} lines of {path} are broken, so none can be used")
    if not table.rows:
        raise InputError(f"{path}: holds no rows ({path.stat().st_size} bytes); {key} needs at least one")
    return table


def suffix_of(path: Path, key: str) -> str:
    """Return the suffix of a file, in lower case.

    Raises:
        FileError: the file is missing, or a folder.
        InputError: the suffix is not supported.
    """
    if not path.is_file():
        raise FileError(f"{key}: {path}: {_why_missing(path)}")
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        allowed = ", ".join(_READERS)
        raise InputError(
            f"{key}: {path}: the suffix '{path.suffix}' is not supported; allowed: {allowed}. "
            "Convert the file, or rename it if it has one of these formats"
        )
    return suffix


def _why_missing(path: Path) -> str:
    """Return why there is no file at `path`, with the nearest name in the folder."""
    if path.is_dir():
        return f"is a folder; name one file in it ({', '.join(SUFFIXES)})"
    if not path.parent.is_dir():
        return f"no such file; there is no folder {path.parent} either"
    names = sorted(p.name for p in path.parent.iterdir() if p.is_file())
    hint = did_you_mean(path.name, names)
    return f"no such file{hint or f'; no file in {path.parent.resolve()} has a similar name'}"


def _bytes(path: Path) -> bytes:
    return read_bytes(path, "a data set", most=None)


def _text(path: Path) -> str:
    return decode(_bytes(path), str(path))


def _json_fault(text: str, err: json.JSONDecodeError) -> str:
    """Return what is wrong with JSON text, and the text around the fault."""
    near = text[max(0, err.pos - 15) : err.pos + 15]
    return f"{err.msg} near {near!r}" if near else f"{err.msg}; the text is empty"


def jsonl_records(lines: Iterable[bytes], path: Path, first: int = 1) -> Iterator[tuple[int, Any]]:
    """Yield (line number, row) of every line that isn't blank, where the first line has the number `first`.

    For a broken line the row is an `InputError` or `FileError` instead, which is not raised.
    """
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
        except (RecursionError, ValueError) as err:  # nested too deeply; an integer of thousands of digits
            fault = InputError(f"{path}: line {number}: not JSON that can be read: {err}")
            fault.__cause__ = err
            yield number, fault
        except FileError as err:
            yield number, err


def _read_jsonl(path: Path, skip_broken: bool) -> Table:
    data = _bytes(path)
    # Check the encoding of the whole file, unless single lines may be skipped. UTF-16 would break every line.
    if not skip_broken or data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        decode(data, str(path))
    # Not splitlines(), which also splits at U+2028 and similar characters; JSON strings may hold those unescaped.
    return _table(path, jsonl_records(data.split(b"\n"), path), skip_broken)


def _table(path: Path, records: Iterable[tuple[int, Any]], skip_broken: bool) -> Table:
    """Collect (line number, row or error) into a table; raise the first error unless broken lines are skipped."""
    rows: list[Any] = []
    numbers: list[int] = []
    faults: list[str] = []
    for number, row in records:
        if isinstance(row, MlaTuneError):
            if not skip_broken:
                raise row
            faults.append(str(row))
        else:
            rows.append(row)
            numbers.append(number)
    return Table(str(path), rows, numbers, "line", faults)


def _read_json(path: Path, skip_broken: bool) -> Table:
    text = _text(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as err:
        is_jsonl = err.msg == "Extra data" and err.lineno > 1
        remedy = "It seems to hold one object per line: name it .jsonl"
        if not is_jsonl:
            remedy = "The file must be one list of objects"
        raise InputError(
            f"{path}: line {err.lineno}, column {err.colno}: not JSON: {_json_fault(text, err)}. {remedy}"
        ) from err
    except (RecursionError, ValueError) as err:  # nested too deeply; an integer of thousands of digits
        raise InputError(f"{path}: not JSON that can be read: {err}") from err
    if not isinstance(rows, list):
        found = f"an object with the keys {', '.join(map(str, rows))}" if isinstance(rows, dict) else repr(rows)[:60]
        raise InputError(f"{path}: must be a list of objects, found {found}; the file must hold only the list")
    return Table(str(path), rows, range(1, len(rows) + 1))


def csv_records(lines: Iterable[str], path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, row) of every record.

    For a record with more or fewer cells than the header the row is an `InputError` instead, which is not raised.

    Raises:
        InputError: the header names a column twice, or the text isn't CSV, so that no further record can be found.
    """
    limit = csv.field_size_limit(_MAX_CSV_CELL)
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader, [])
        if repeated := sorted({name for name in header if header.count(name) > 1}):
            raise InputError(
                f"{path}: line 1: the header names {', '.join(repeated)} twice; give each column its own name"
            )
        number = reader.line_num + 1  # a record may span several lines; this is its first
        for cells in reader:
            if cells and len(cells) != len(header):
                yield (
                    number,
                    InputError(
                        f"{path}: line {number}: {len(cells)} cells, but the header has {len(header)} "
                        f"({', '.join(header)}); a cell with a comma or a line break needs quotes around it"
                    ),
                )
            elif cells:
                yield number, dict(zip(header, cells, strict=True))
            number = reader.line_num + 1
    except csv.Error as err:
        raise InputError(f"{path}: line {reader.line_num}: not CSV: {err}; is a closing quote missing?") from err
    finally:
        csv.field_size_limit(limit)


def _read_csv(path: Path, skip_broken: bool) -> Table:
    return _table(path, csv_records(io.StringIO(_text(path), newline=""), path), skip_broken)


def _read_parquet(path: Path, skip_broken: bool) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as err:
        reason = str(err).splitlines()[0].rstrip(".")
        raise FileError(f"{path}: not a complete parquet file: {reason}; download or write it again") from err
    return Table(str(path), rows, range(1, len(rows) + 1))


def _read_txt(path: Path, skip_broken: bool) -> Table:
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
"""Suffixes of the files that can be read."""
