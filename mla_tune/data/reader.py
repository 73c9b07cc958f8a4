"""Read the raw rows of a data set a few at a time, from any position, pass after pass (`data.streaming`).

.jsonl is read line by line, .csv record by record, .parquet by row groups, and a hub data set through the streaming of
`datasets`. A .json or .txt file is one document and is read whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_tune.data.files import Table, csv_records, jsonl_records, read_file, suffix_of
from mla_tune.data.rows import EMBEDDED, is_local_path, open_hub
from mla_tune.errors import FileError, InputError, MlaTuneError
from mla_tune.recipe.schema import DataSection
from mla_tune.resources import EMBEDDED_DATA

_PARQUET_BATCH = 1024
"""Rows of a .parquet file that are in memory at once."""


@dataclass
class Cursor:
    """A position in a data set that is read over and over."""

    passes: int = 0
    """Passes over the data set that are complete."""
    read: int = 0
    """Records read in the current pass."""


class RecordReader:
    """Reads the records of `data.path` over and over.

    To resume at a position it skips the records before it without decoding them.
    """

    def __init__(self, data: DataSection) -> None:
        """Find the data set. Raises `FileError` or `InputError` if it is missing or its type is not supported."""
        self.data, self._skips_broken = data, data.on_invalid_row == "skip"
        self.path: Path | None = None
        self.unit = "row"
        if data.path in EMBEDDED:
            self.path = EMBEDDED_DATA / f"{data.path}.train.jsonl"
            self.name, self.source = str(self.path), f"{data.path} (embedded)"
        elif is_local_path(data.path, Path(data.path).expanduser()):
            self.path = Path(data.path).expanduser()
            self.name = self.source = data.path
        else:
            self.hub, self.name = open_hub(data.path, data, "data.path", streaming=True)
            self.source = self.name
        if self.path is not None and suffix_of(self.path, "data.path") in (".jsonl", ".csv"):
            self.unit = "line"
        self._records: Iterator[tuple[int, Any]] | None = None
        self._position = Cursor()  # of `_records`

    def read(self, count: int, cursor: Cursor, *, one_pass: bool = False) -> Table:
        """Read the next `count` records after `cursor`, and advance `cursor` past them.

        At its end the data set begins again; with `one_pass` reading stops there, with fewer records.

        Raises:
            FileError, InputError: the data set is empty or can't be read; or a record is broken and
                `data.on_invalid_row` is error. Under skip, a broken record is among the table's faults.
        """
        rows: list[Any] = []
        numbers: list[int] = []
        faults: list[str] = []
        if self._records is None or self._position != cursor:
            self._records = self._records_from(cursor.read)
        left = count
        while left:
            found = None
            if self.data.limit is None or cursor.read < self.data.limit:
                found = next(self._records, None)
            if found is None:
                if cursor.read == 0:
                    raise InputError(f"{self.name}: holds no rows")
                if one_pass:
                    break
                cursor.passes, cursor.read = cursor.passes + 1, 0
                self._records = self._records_from(0)
                continue
            number, row = found
            cursor.read += 1
            left -= 1
            if not isinstance(row, MlaTuneError):
                rows.append(row)
                numbers.append(number)
            elif self._skips_broken:
                faults.append(str(row))
            else:
                raise row
        self._position = Cursor(cursor.passes, cursor.read)
        return Table(self.name, rows, numbers, self.unit, faults)

    def _records_from(self, start: int) -> Iterator[tuple[int, Any]]:
        """Return an iterator over (line or row number, row or error) of one pass, without the first `start` records."""
        if self.path is None:
            rows = self.hub.skip(start) if start else self.hub
            return _with_named_errors(enumerate(iter(rows), start=start + 1), self.name)
        suffix = self.path.suffix.lower()
        if suffix == ".jsonl":
            return _jsonl_from(self.path, start)
        if suffix == ".csv":
            return itertools.islice(_csv_records(self.path), start, None)
        if suffix == ".parquet":
            return _parquet_from(self.path, start)
        table = read_file(self.path, "data.path", skip_broken=self._skips_broken)
        return iter(list(zip(table.numbers, table.rows, strict=True))[start:])


def _jsonl_from(path: Path, start: int) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        number = 1
        while start:  # skip records as `jsonl_records` counts them: lines that aren't blank
            line = file.readline()
            if not line:
                return
            number += 1
            start -= bool(line.decode("utf-8-sig", "replace").strip())
        yield from jsonl_records((line.removesuffix(b"\n") for line in file), path, number)


def _csv_records(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            yield from csv_records(file, path)
        except UnicodeDecodeError:
            read_file(path, "data.path")  # raises an error that names the line and the byte
            raise


def _parquet_from(path: Path, start: int) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0  # of the last row read or skipped
    try:
        file = pyarrow.parquet.ParquetFile(path)
        groups = []  # all row groups from the one that holds row start + 1
        for i in range(file.num_row_groups):
            size = file.metadata.row_group(i).num_rows
            if not groups and number + size <= start:
                number += size
            else:
                groups.append(i)
        for batch in file.iter_batches(_PARQUET_BATCH, row_groups=groups) if groups else ():
            if number + len(batch) > start:
                for row in batch.slice(max(0, start - number)).to_pylist():
                    number = max(number, start) + 1
                    yield number, row
            else:
                number += len(batch)
    except pyarrow.ArrowException as err:
        reason = str(err).splitlines()[0].rstrip(".")
        raise FileError(f"{path}: not a complete parquet file: {reason}; download or write it again") from err


def _with_named_errors(records: Iterator[tuple[int, Any]], name: str) -> Iterator[tuple[int, Any]]:
    """Yield `records`, and turn any error into an `InputError` that names the data set and the last row read.

    The hub, the network and each file format have error classes of their own, with no common base.
    """
    last = 0
    while True:
        try:
            last, row = next(records)
        except StopIteration:
            return
        except Exception as err:
            reason = (str(err).strip() or type(err).__name__).splitlines()[0]
            raise InputError(f"{name}: can't be read beyond row {last}: {reason}") from err
        yield last, row
