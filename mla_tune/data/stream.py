"""Rows for training that are read, tokenized and packed as they are needed (`data.streaming`).

The stream goes by chunks of `data.buffer` records: those of each source by its weight, then shuffled and packed among
themselves.  The order is drawn from the seed and the chunk's number, so a checkpoint holds no samples: the chunk, where
each source was at its beginning, and how many of its rows are done, say where to go on.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch.utils.data import IterableDataset

from mla_tune.data.collate import rows_for
from mla_tune.data.encode import Encoded, Sample, encode
from mla_tune.data.files import Table
from mla_tune.data.formats import detect, normalize
from mla_tune.data.reader import Cursor, RecordReader
from mla_tune.data.row_kinds import Kind, Row
from mla_tune.data.rows import canonical, split
from mla_tune.errors import InputError
from mla_tune.recipe.schema import DataSection, Recipe

#: Counts of what became of records, and how many faults are kept in words.
COUNTS = ("records", "samples", "tokens", "trained_tokens", "truncated", "dropped", "split", "untrained", "skipped")
NAMED = 3


@dataclass
class StreamState:
    """Where the stream is at the beginning of a chunk: its number, the rows before it, and what they were made of."""

    chunk: int = 0
    rows: int = 0
    cursors: list[Cursor] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    faults: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, saved: dict[str, Any]) -> StreamState:
        """From what `asdict` made of it."""
        return cls(**{**saved, "cursors": [Cursor(**c) for c in saved["cursors"]]})


class StreamSource:
    """One source: its reader, and its rows as samples."""

    def __init__(self, data: DataSection, weight: float) -> None:
        self.data, self.weight = data, weight
        self.reader = RecordReader(data)
        self.kind: Kind | None = None
        #: Rows that are held out, as `rows.canonical` writes them.
        self.held_out: set[str] = set()

    def rows(self, count: int, cursor: Cursor, state: StreamState) -> list[Row]:
        """The next records that can be used, without those that are held out."""
        table = self.reader.take(count, cursor)
        faults: list[str] = []
        rows = self._normalized(table, faults)
        state.counts["records"] += count
        state.counts["skipped"] += len(faults)
        state.faults += faults[: max(0, NAMED - len(state.faults))]
        return [row for row in rows if canonical(row) not in self.held_out] if self.held_out else rows

    def peek(self, fraction: float, seed: int) -> tuple[list[Row], list[Row], list[str]]:
        """Of the first `data.buffer` records those to train on and those held out, which no chunk will hold, and what
        is wrong with others."""
        table = self.reader.take(self.data.buffer, Cursor(), once=True)
        faults: list[str] = []
        if not table.rows:
            raise InputError(f"{table.faults[0]}\nall of the first {len(table.faults)} lines are broken")
        rows = self._normalized(table, faults)
        self.data = self.data.model_copy(update={"format": self._format(table)})
        if not rows:
            raise InputError(f"{faults[0]}\nall of the first {len(faults)} rows are left out for such reasons")
        held_out: list[Row] = []
        if fraction:
            rows, held_out = split(rows, fraction, seed, self.reader.source)
            self.held_out = {canonical(row) for row in held_out}
        return rows, held_out, faults

    def _format(self, table: Table) -> Any:
        return detect(table, self.data) if self.data.format == "auto" else self.data.format

    def _normalized(self, table: Table, faults: list[str]) -> list[Row]:
        if not table.rows:
            faults += table.faults
            return []
        skip = self.data.on_invalid_row == "skip"
        kind, rows = normalize(table, self.data, faults if skip else None, partial=True)
        self.kind = kind
        return rows


class Stream(IterableDataset):
    """Trainer rows (`collate.rows_for`) without end.  Of `processes` each has its part of a global batch: `batch` rows
    after those of the processes before it."""

    def __init__(self, recipe: Recipe, tokenizer: Any, origins: Sequence[StreamSource]) -> None:
        super().__init__()
        self.recipe, self.tokenizer, self.origins = recipe, tokenizer, list(origins)
        self.rank, self.processes = 0, 1
        self._start = StreamState(cursors=[Cursor() for _ in self.origins])
        self._done = 0
        self._after = self._start  # the end of the chunk under way
        #: Beginnings of the last chunks: a loader is a batch or two ahead of the step.
        self._states: deque[StreamState] = deque(maxlen=8)

    def share(self, rank: int, processes: int) -> None:
        """Which of how many processes this is."""
        self.rank, self.processes = rank, processes

    def state_dict_at(self, rows: int) -> dict[str, Any]:
        """What `load_state_dict` needs after so many rows, of all processes together, were trained on."""
        state = next((s for s in reversed(self._states) if s.rows <= rows), self._start)
        return {"state": asdict(state), "done": rows - state.rows}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Begin where `state_dict_at` was asked."""
        self._start, self._done = StreamState.of(saved["state"]), saved["done"]

    def counts_at(self, rows: int) -> dict[str, Any]:
        """Records and samples read for so many rows (in whole chunks), and the first faults in words."""
        state = next((s for s in [*self._states, self._after] if s.rows >= rows), self._after)
        return {**state.counts, "passes": [c.passes for c in state.cursors], "faults": state.faults}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        state, done = copy.deepcopy(self._start), self._done
        self._states.clear()
        batch = self.recipe.train.batch_size
        passes = [c.passes for c in state.cursors]  # as they were when there was last a row
        while True:
            self._states.append(copy.deepcopy(state))
            first = state.rows
            rows = self._chunk(state)
            self._after = copy.deepcopy(state)
            for i, row in enumerate(rows[done:], start=first + done):
                if i // batch % self.processes == self.rank:
                    yield row
            done = 0
            if state.rows > first:
                passes = [c.passes for c in state.cursors]
            elif all(c.passes > before + 1 for c, before in zip(state.cursors, passes, strict=True)):
                names = ", ".join(o.reader.name for o in self.origins)
                raise InputError(f"{names}: a whole pass left no sample to train on; {'; '.join(state.faults)}")

    def _chunk(self, state: StreamState) -> list[dict[str, Any]]:
        """The rows of the next chunk; `state` moves on to the one after it."""
        samples: list[Sample] = []
        for origin, count, cursor in zip(self.origins, self._records_of(state.chunk), state.cursors, strict=True):
            if count:
                first = cursor.read + 1
                rows = origin.rows(count, cursor, state)
                encoded = self.encoded(origin, rows, f"{origin.reader.source}, rows from {first} on")
                samples += encoded.samples
                for name in ("tokens", "trained_tokens", "truncated", "dropped", "split", "untrained"):
                    state.counts[name] += getattr(encoded, name)
                state.counts["skipped"] += len(encoded.skipped)
                state.faults += encoded.skipped[: max(0, NAMED - len(state.faults))]
        order = random.Random(f"{self.recipe.train.seed} {state.chunk}")
        order.shuffle(samples)
        rows = rows_for(samples, self.recipe.train.max_length, self.recipe.train.packing)
        order.shuffle(rows)  # best-fit packing puts long samples first
        state.counts["samples"] += len(samples)
        state.chunk, state.rows = state.chunk + 1, state.rows + len(rows)
        return rows

    def _records_of(self, chunk: int) -> list[int]:
        """How many of the chunk's records each source gives; over all chunks by weight."""
        share = self.recipe.data.buffer / sum(o.weight for o in self.origins)
        return [int((chunk + 1) * o.weight * share) - int(chunk * o.weight * share) for o in self.origins]

    def encoded(self, origin: StreamSource, rows: list[Row], part: str) -> Encoded:
        """Rows of a source as samples; that none of so few can be used is no error."""
        length = self.recipe.train.max_length
        return encode(rows, origin.kind or "text", self.tokenizer, origin.data, length, part, partial=True)
