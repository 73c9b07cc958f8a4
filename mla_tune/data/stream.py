"""The training rows of a streamed data set: read, tokenized and packed while training (`data.streaming`).

The stream goes by chunks. A chunk is `data.buffer` records, divided among the sources by their weights; its samples are
shuffled and packed among themselves. The order is drawn from the seed and the chunk's number, so a checkpoint needs to
hold no samples: the number of the chunk, the position of each source at its beginning, and how many of its rows were
trained on are enough to resume.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch.utils.data import IterableDataset

from mla_tune.data.collate import trainer_rows
from mla_tune.data.encode import Encoded, Sample, encode
from mla_tune.data.files import Table
from mla_tune.data.formats import detect_format, normalize
from mla_tune.data.reader import Cursor, RecordReader
from mla_tune.data.row_kinds import Kind, Row
from mla_tune.data.rows import canonical_json, hold_out
from mla_tune.errors import InputError
from mla_tune.recipe.schema import DataSection, Recipe

COUNTS = ("records", "samples", "tokens", "trained_tokens", "truncated", "dropped", "split", "untrained", "skipped")
"""What the stream counts: records read, the samples made of them, and what was cut or left out."""
NAMED = 3
"""How many of the faulty records are kept as messages; the others are counted."""


@dataclass
class StreamState:
    """Where the stream is between two chunks. Checkpoints hold it as JSON, under these names."""

    chunk: int = 0
    """Number of the next chunk, from 0."""
    rows: int = 0
    """Trainer rows of all chunks before it."""
    cursors: list[Cursor] = field(default_factory=list)
    """The position of each source."""
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    """What was counted in all chunks before it, by the names of `COUNTS`."""
    faults: list[str] = field(default_factory=list)
    """Messages about the first `NAMED` records that were left out."""

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> StreamState:
        """Return the state that `dataclasses.asdict` made `saved` of."""
        return cls(**{**saved, "cursors": [Cursor(**c) for c in saved["cursors"]]})

    def add_faults(self, faults: list[str]) -> None:
        """Keep messages about records that were left out, up to `NAMED`, and count all of them."""
        self.counts["skipped"] += len(faults)
        self.faults += faults[: max(0, NAMED - len(self.faults))]


class StreamSource:
    """One streamed data set: its reader, its kind of rows, and the rows held out of it."""

    def __init__(self, data: DataSection, weight: float) -> None:
        """Find the data set. Raises `FileError` or `InputError` if it is missing or its type is not supported."""
        self.data, self.weight = data, weight
        self.reader = RecordReader(data)
        self.kind: Kind | None = None
        """Kind of the rows; known once some were read."""
        self.held_out: set[str] = set()
        """The held-out rows, as `rows.canonical_json` writes them. They are never trained on."""

    def next_rows(self, count: int, cursor: Cursor, state: StreamState) -> list[Row]:
        """Read `count` records, and return those that can be used and aren't held out.

        Advances `cursor`, and counts the records in `state`.
        """
        table = self.reader.read(count, cursor)
        faults: list[str] = []
        rows = self._normalize(table, faults)
        state.counts["records"] += count
        state.add_faults(faults)
        return [row for row in rows if canonical_json(row) not in self.held_out] if self.held_out else rows

    def peek(self, fraction: float, seed: int) -> tuple[list[Row], list[Row], list[str]]:
        """Read the first `data.buffer` records, settle the format of all rows, and hold out `fraction` of these rows.

        Returns:
            The rows to train on, the held-out rows, and a message for each record that can't be used. The stream
            itself begins with the first record all the same.

        Raises:
            FileError, InputError: the records can't be read, or none of them can be used.
        """
        table = self.reader.read(self.data.buffer, Cursor(), one_pass=True)
        faults: list[str] = []
        if not table.rows:
            raise InputError(f"{table.faults[0]}\nall of the first {len(table.faults)} lines are broken")
        rows = self._normalize(table, faults)
        format_name: Any = detect_format(table, self.data) if self.data.format == "auto" else self.data.format
        self.data = self.data.model_copy(update={"format": format_name})
        if not rows:
            raise InputError(f"{faults[0]}\nall of the first {len(faults)} rows were left out for such reasons")
        held_out: list[Row] = []
        if fraction:
            rows, held_out = hold_out(rows, fraction, seed, self.reader.source)
            self.held_out = {canonical_json(row) for row in held_out}
        return rows, held_out, faults

    def _normalize(self, table: Table, faults: list[str]) -> list[Row]:
        """Convert raw rows, and append messages about those left out to `faults`."""
        if not table.rows:
            faults += table.faults
            return []
        skips = self.data.on_invalid_row == "skip"
        self.kind, rows = normalize(table, self.data, faults if skips else None, allow_empty=True)
        return rows


class Stream(IterableDataset):
    """An endless data set of trainer rows (`collate.trainer_rows`), made chunk by chunk.

    With several processes each one makes all rows and yields its part of every global batch: of each global batch,
    process number `rank` yields the rows from rank · batch_size up to (rank + 1) · batch_size.
    """

    def __init__(self, recipe: Recipe, tokenizer: Any, sources: Sequence[StreamSource]) -> None:
        super().__init__()
        self.recipe, self.tokenizer, self.sources = recipe, tokenizer, list(sources)
        self.rank, self.world_size = 0, 1
        self._start = StreamState(cursors=[Cursor() for _ in self.sources])
        """The beginning of the chunk that iteration starts with."""
        self._rows_done = 0
        """Rows of that chunk that were trained on before, and are not yielded."""
        self._chunk_end = self._start
        """The end of the current chunk."""
        self._chunk_starts: deque[StreamState] = deque(maxlen=8)
        """Beginnings of the last chunks. More than one, because the data loader is a batch or two ahead of the step."""

    def set_process(self, *, rank: int, world_size: int) -> None:
        """Set which of how many processes this is."""
        self.rank, self.world_size = rank, world_size

    def state_dict_at(self, rows: int) -> dict[str, Any]:
        """Return what `load_state_dict` needs to resume after the first `rows` rows of all processes together."""
        state = next((s for s in reversed(self._chunk_starts) if s.rows <= rows), self._start)
        return {"state": asdict(state), "done": rows - state.rows}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Make the next iteration begin at the row for which `state_dict_at` was called."""
        self._start, self._rows_done = StreamState.from_dict(saved["state"]), saved["done"]

    def counts_at(self, rows: int) -> dict[str, Any]:
        """Return what was counted up to the end of the chunk that holds row number `rows`.

        The keys are those of `COUNTS`, and `passes` (complete passes over each source) and `faults` (messages about
        the first records left out).
        """
        state = next((s for s in [*self._chunk_starts, self._chunk_end] if s.rows >= rows), self._chunk_end)
        return {**state.counts, "passes": [c.passes for c in state.cursors], "faults": state.faults}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        state, rows_done = copy.deepcopy(self._start), self._rows_done
        self._chunk_starts.clear()
        batch_size = self.recipe.train.batch_size
        last_passes = [c.passes for c in state.cursors]  # at the end of the last chunk that gave a row
        while True:
            self._chunk_starts.append(copy.deepcopy(state))
            first = state.rows
            rows = self._next_chunk(state)
            self._chunk_end = copy.deepcopy(state)
            for i, row in enumerate(rows[rows_done:], start=first + rows_done):
                if i // batch_size % self.world_size == self.rank:
                    yield row
            rows_done = 0
            if state.rows > first:
                last_passes = [c.passes for c in state.cursors]
            elif all(c.passes > before + 1 for c, before in zip(state.cursors, last_passes, strict=True)):
                names = ", ".join(source.reader.name for source in self.sources)
                raise InputError(
                    f"{names}: a whole pass gave no sample to train on; see data.on_overflow and train.max_length; "
                    f"{'; '.join(state.faults)}"
                )

    def _next_chunk(self, state: StreamState) -> list[dict[str, Any]]:
        """Return the trainer rows of the next chunk, and advance `state` past it."""
        samples: list[Sample] = []
        for source, count, cursor in zip(self.sources, self._record_counts(state.chunk), state.cursors, strict=True):
            if count:
                first = cursor.read + 1
                rows = source.next_rows(count, cursor, state)
                encoded = self.encode(source, rows, f"{source.reader.source}, rows from {first} on")
                samples += encoded.samples
                for name in ("tokens", "trained_tokens", "truncated", "dropped", "split", "untrained"):
                    state.counts[name] += getattr(encoded, name)
                state.add_faults(encoded.skipped)
        order = random.Random(f"{self.recipe.train.seed} {state.chunk}")
        order.shuffle(samples)
        rows = trainer_rows(samples, self.recipe.train.max_length, packing=self.recipe.train.packing)
        order.shuffle(rows)  # best-fit packing puts long samples first
        state.counts["samples"] += len(samples)
        state.chunk, state.rows = state.chunk + 1, state.rows + len(rows)
        return rows

    def _record_counts(self, chunk: int) -> list[int]:
        """Return how many records each source gives to a chunk. Summed over chunks, they are in proportion to weights.

        A source's total after n chunks is ⌊n · buffer · weight / Σ weights⌋.
        """
        per_weight = self.recipe.data.buffer / sum(source.weight for source in self.sources)
        return [
            int((chunk + 1) * source.weight * per_weight) - int(chunk * source.weight * per_weight)
            for source in self.sources
        ]

    def encode(self, source: StreamSource, rows: list[Row], part: str) -> Encoded:
        """Encode rows of a source; `part` names them in messages. That none of them can be used is no error."""
        length = self.recipe.train.max_length
        return encode(rows, source.kind or "text", self.tokenizer, source.data, length, part=part, allow_empty=True)
