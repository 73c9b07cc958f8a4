"""Rows → samples: token ids, and for each token whether it counts towards the loss.

A model predicts token i from the tokens before it, so the first token of a sample is never predicted: its label is
always -100.  That makes `trained_tokens` exact, and keeps a packed sample from being predicted by its neighbor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mla_tune.data.row_kinds import IGNORED, Kind, Row
from mla_tune.data.tokenize_rows import TokenizedRow, row_location, tokenize_rows
from mla_tune.errors import InputError
from mla_tune.recipe.schema import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence; `labels[i]` is `input_ids[i]` or -100, and `labels[0]` is -100."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Encoded:
    """Samples, and what became of the rows."""

    samples: list[Sample]
    truncated: int
    """Rows whose end was cut off."""
    dropped: int
    """Rows left out as too long."""
    tokens: int
    """Tokens of all samples."""
    trained_tokens: int
    """Tokens that count towards the loss."""
    split: int = 0
    """Rows cut into several samples."""
    untrained: int = 0
    """Pieces of split rows left out, because none of their tokens counts."""
    skipped: list[str] = field(default_factory=list)
    """What is wrong with each row that `on_invalid_row: skip` left out."""


def encode(
    rows: list[Row],
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    data: DataSection,
    max_length: int,
    part: str = "data",
    partial: bool = False,
) -> Encoded:
    """Tokenize rows and mask what doesn't count.

    prompt: rendered as a user's and an assistant's turn, or (template none) bos + prompt + completion + eos, tokenized
    apart so that no token spans the border.  chat: rendered by the template.  text: bos + text + eos.  Rendered ids are
    those of `tokenizer.apply_chat_template`.  tokens: as they are.

    A text longer than `max_length` is cut into several samples unless `on_overflow` is drop or error, and any other row
    where it says split.  Each piece begins with the last token of the piece before it, so that every token but the
    first is predicted once; a piece without trained tokens is left out, and counted.

    Args:
        max_length: tokens a sample at most.
        part: which rows these are, for messages.
        partial: they are a piece of a data set, of which no token may be left to train on.

    Raises:
        InputError: the tokenizer lacks a template or an end token, the template refuses a row, a row is too long for
            what `on_overflow` says, or no token is left to train on.  No rows at all is no error.
    """
    tokenized = tokenize_rows(rows, kind, tokenizer, data, part)
    samples: list[Sample] = []
    truncated = dropped = split = untrained = 0
    skipped: list[str] = []
    misfits: list[tuple[int, TokenizedRow]] = []
    for number, row in enumerate(tokenized, start=1):
        if isinstance(row, InputError):
            skipped.append(str(row))
        elif len(row.ids) <= max_length:
            samples.append(_sample(row, 0, max_length))
        elif data.on_overflow == "drop":
            dropped += 1
        elif data.on_overflow == "split" or (kind == "text" and data.on_overflow != "error"):
            split += 1
            pieces = [_sample(row, start, max_length) for start in range(0, len(row.ids) - 1, max_length - 1)]
            kept = [piece for piece in pieces if any(label != IGNORED for label in piece.labels)]
            untrained += len(pieces) - len(kept)
            samples += kept
        elif data.on_overflow == "error" or row.answer >= max_length:
            misfits.append((number, row))
        else:
            truncated += 1
            samples.append(_sample(row, 0, max_length))
    if misfits and data.on_invalid_row == "skip" and data.on_overflow != "error":
        skipped += [_too_long(rows, [misfit], data, max_length, part) for misfit in misfits]
        misfits = []
    if misfits:
        raise InputError(_too_long(rows, misfits, data, max_length, part))
    trained = sum(len(s.labels) - s.labels.count(IGNORED) for s in samples)
    if rows and len(skipped) == len(rows) and not partial:
        raise InputError(f"{skipped[0]}\nall {len(rows)} rows are left out for such reasons, so none can be used")
    if rows and not trained and not partial:
        why = (
            f"all {dropped} rows are longer than train.max_length ({max_length} tokens) and were dropped; raise it"
            if dropped == len(rows)
            else f"all labels are masked in all {len(samples)} samples: nothing would be learned; see data.train_on, "
            "and whether the chat template's {% generation %} part holds the assistant's turns"
        )
        raise InputError(f"{part}: {why}")
    tokens = sum(len(s.input_ids) for s in samples)
    return Encoded(samples, truncated, dropped, tokens, trained, split, untrained, skipped)


def _sample(row: TokenizedRow, start: int, max_length: int) -> Sample:
    ids, counts = row.ids[start : start + max_length], row.counts[start : start + max_length]
    labels = [token if count else IGNORED for token, count in zip(ids, counts, strict=True)]
    labels[0] = IGNORED
    return Sample(ids, labels)


def _too_long(
    rows: list[Row], misfits: list[tuple[int, TokenizedRow]], data: DataSection, length: int, part: str
) -> str:
    number, row = misfits[0]
    if data.on_overflow == "error":
        fault = f"{len(row.ids)} tokens, but train.max_length is {length} and data.on_overflow says error"
    else:
        fault = (
            f"its first {row.answer} tokens are prompt and train.max_length is {length}, "
            "so no token of the completion would be left"
        )
    longest = max(len(r.ids) for _, r in misfits)
    others = f" ({len(misfits)} such rows, the longest of {longest} tokens)" if len(misfits) > 1 else ""
    todo = f"set data.on_overflow: drop to leave such rows out, or train.max_length: {longest} to keep them whole"
    return f"{row_location(rows, number, part)}: {fault}{others}; {todo}"
