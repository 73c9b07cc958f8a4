"""A data set that is read as it is needed, from where it was left.

.jsonl is read by lines, .csv by records, .parquet by row groups, a hub data set through `datasets`' streaming;
.json and .txt are one document each and are read whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_tune.data.files import Table, csv_records, jsonl_records, read_file, suffix_of
from mla_tune.data.rows import EMBEDDED, is_file_name, open_hub
from mla_tune.errors import FileError, InputError, MlaTuneError
from mla_tune.recipe.schema import DataSection
from mla_tune.resources import EMBEDDED_DATA

#: Rows of a .parquet file in memory at once.
_BATCH = 1024


@dataclass
class Cursor:
    """Where a data set was left: records `read` in its pass number `passes`."""

    passes: int = 0
    read: int = 0


class RecordReader:
    """`data.path`, over and over.  The rows that a checkpoint has seen are passed over, not decoded."""

    def __init__(self, data: DataSection) -> None:
        """Raises `FileError` or `InputError` for what can't be read at all."""
        self.data, self.skip = data, data.on_invalid_row == "skip"
        self.path: Path | None = None
        self.unit = "row"
        if data.path in EMBEDDED:
            self.path = EMBEDDED_DATA / f"{data.path}.train.jsonl"
            self.name, self.source = str(self.path), f"{data.path} (embedded)"
        elif is_file_name(data.path, Path(data.path).expanduser()):
            self.path = Path(data.path).expanduser()
            self.name = self.source = data.path
        else:
            self.hub, self.name = open_hub(data.path, data, "data.path", streaming=True)
            self.source = self.name
        if self.path is not None and suffix_of(self.path, "data.path") in (".jsonl", ".csv"):
            self.unit = "line"
        self._open: Iterator[tuple[int, Any]] | None = None
        self._at = Cursor()

    def take(self, count: int, cursor: Cursor, once: bool = False) -> Table:
        """The next `count` records after `cursor`, which moves on; at its end the data set begins again.

        `once`: it does not, and fewer may come.  A broken record is among the table's faults where
        `data.on_invalid_row` is skip, and raised elsewhere.
        """
        rows: list[Any] = []
        places: list[int] = []
        faults: list[str] = []
        if self._open is None or self._at != cursor:
            self._open = self._records(cursor.read)
        left = count
        while left:
            found = None
            if self.data.limit is None or cursor.read < self.data.limit:
                found = next(self._open, None)
            if found is None:
                if cursor.read == 0:
                    raise InputError(f"{self.name}: holds no rows")
                if once:
                    break
                cursor.passes, cursor.read = cursor.passes + 1, 0
                self._open = self._records(0)
                continue
            place, row = found
            cursor.read += 1
            left -= 1
            if not isinstance(row, MlaTuneError):
                rows.append(row)
                places.append(place)
            elif self.skip:
                faults.append(str(row))
            else:
                raise row
        self._at = Cursor(cursor.passes, cursor.read)
        return Table(self.name, rows, places, self.unit, faults)

    def _records(self, start: int) -> Iterator[tuple[int, Any]]:
        """(place, row or error) of the records after the first `start`."""
        if self.path is None:
            rows = self.hub.skip(start) if start else self.hub
            return _told(enumerate(iter(rows), start=start + 1), self.name)
        suffix = self.path.suffix.lower()
        if suffix == ".jsonl":
            return _jsonl(self.path, start)
        if suffix == ".csv":
            return itertools.islice(_csv(self.path), start, None)
        if suffix == ".parquet":
            return _parquet(self.path, start)
        table = read_file(self.path, "data.path", self.skip)
        return iter(list(zip(table.places, table.rows, strict=True))[start:])


def _jsonl(path: Path, start: int) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        number = 1
        while start:  # as `jsonl_records` counts: lines that aren't blank
            line = file.readline()
            if not line:
                return
            number += 1
            start -= bool(line.decode("utf-8-sig", "replace").strip())
        yield from jsonl_records((line.removesuffix(b"\n") for line in file), path, number)


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            yield from csv_records(file, path)
        except UnicodeDecodeError:
            read_file(path, "data.path")  # names the line and the byte
            raise


def _parquet(path: Path, start: int) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        groups = []
        for i in range(file.num_row_groups):
            size = file.metadata.row_group(i).num_rows
            if not groups and number + size <= start:
                number += size
            else:
                groups.append(i)
        for batch in file.iter_batches(_BATCH, row_groups=groups) if groups else ():
            if number + len(batch) > start:
                for row in batch.slice(max(0, start - number)).to_pylist():
                    number = max(number, start) + 1
                    yield number, row
            else:
                number += len(batch)
    except pyarrow.ArrowException as err:
        reason = str(err).splitlines()[0].rstrip(".")
        raise FileError(f"{path}: isn't a whole parquet file: {reason}; fetch or write it again") from err


def _told(records: Iterator[tuple[int, Any]], name: str) -> Iterator[tuple[int, Any]]:
    """The hub, the network and each file format raise errors of their own; for the user they are one."""
    last = 0
    while True:
        try:
            last, row = next(records)
        except StopIteration:
            return
        except Exception as err:
            reason = (str(err).strip() or type(err).__name__).splitlines()[0]
            raise InputError(f"{name}: can't be read on after row {last}: {reason}") from err
        yield last, row
