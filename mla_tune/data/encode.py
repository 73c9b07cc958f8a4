"""Turn rows into samples of at most `train.max_length` tokens, with labels, and count what was left out.

A model predicts token i from the tokens before it, so the first token of a sample is never predicted: its label is
always -100. That makes `Encoded.trained_tokens` exact, and in a packed row it keeps the sample before from being
trained to predict that token.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from mla_tune.data.row_kinds import IGNORED, ROW_KINDS, Kind, Row
from mla_tune.data.tokenize_rows import TokenizedRow, row_location, tokenize_rows
from mla_tune.errors import InputError
from mla_tune.recipe.schema import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Outcome: TypeAlias = Literal["fits", "dropped", "split", "truncated", "refused"]
"""What became of a row under `data.on_overflow`."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence to train or evaluate on."""

    input_ids: list[int]
    """Token ids."""
    labels: list[int]
    """For each token its id where the loss counts it, else -100. The first label is always -100."""

    @property
    def trained_tokens(self) -> int:
        """Number of tokens that the loss counts."""
        return len(self.labels) - self.labels.count(IGNORED)


@dataclass(frozen=True)
class Encoded:
    """The samples made of some rows, and counts of what became of those rows."""

    samples: list[Sample]
    """All samples, in the order of the rows."""
    truncated: int
    """Rows whose end was cut off."""
    dropped: int
    """Rows left out because they are too long."""
    tokens: int
    """Tokens of all samples."""
    trained_tokens: int
    """Tokens that the loss counts."""
    split: int = 0
    """Rows split into several samples."""
    untrained: int = 0
    """Pieces of split rows that were left out because the loss counts none of their tokens."""
    skipped: list[str] = field(default_factory=list)
    """For each row that `data.on_invalid_row: skip` left out, a message that says what is wrong with it."""


def encode(
    rows: list[Row],
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    data: DataSection,
    max_length: int,
    *,
    part: str = "data",
    allow_empty: bool = False,
) -> Encoded:
    """Tokenize rows, mask what the loss doesn't count, and fit each row to `max_length` as `data.on_overflow` says.

    Args:
        rows: rows of the kind `kind`.
        kind: their kind.
        tokenizer: the model's tokenizer.
        data: the recipe's data section.
        max_length: the most tokens of a sample.
        part: what the rows are ("training rows"), for messages.
        allow_empty: accept that no trained token is left, as may happen in one chunk of a stream.

    Raises:
        InputError: the tokenizer lacks a chat template or an eos token, the template refuses a row, a row is too long
            and `data.on_overflow` doesn't allow it, or (unless `allow_empty`) no trained token is left. An empty list
            of rows is no error.
    """
    samples: list[Sample] = []
    outcomes: Counter[_Outcome] = Counter()
    untrained = 0
    skipped: list[str] = []
    refused: list[tuple[int, TokenizedRow]] = []
    for number, row in enumerate(tokenize_rows(rows, kind, tokenizer, data, part), start=1):
        if isinstance(row, InputError):
            skipped.append(str(row))
            continue
        outcome, cut = _fit(row, kind, data, max_length)
        outcomes[outcome] += 1
        if outcome == "refused":
            refused.append((number, row))
        kept = [piece for piece in cut if piece.trained_tokens] if outcome == "split" else cut
        untrained += len(cut) - len(kept)
        samples += kept
    if refused and data.on_invalid_row == "skip" and data.on_overflow != "error":
        skipped += [_too_long(rows, [numbered], data, max_length, part) for numbered in refused]
    elif refused:
        raise InputError(_too_long(rows, refused, data, max_length, part))
    encoded = Encoded(
        samples,
        truncated=outcomes["truncated"],
        dropped=outcomes["dropped"],
        tokens=sum(len(sample.input_ids) for sample in samples),
        trained_tokens=sum(sample.trained_tokens for sample in samples),
        split=outcomes["split"],
        untrained=untrained,
        skipped=skipped,
    )
    if rows and not allow_empty:
        _check_something_is_trained(encoded, len(rows), max_length, part)
    return encoded


def _fit(row: TokenizedRow, kind: Kind, data: DataSection, max_length: int) -> tuple[_Outcome, list[Sample]]:
    """Make samples of at most `max_length` tokens of one row.

    A piece of a split row begins with the last token of the piece before it, so that every token of the row but the
    first is predicted exactly once.
    """
    if len(row.ids) <= max_length:
        return "fits", [_sample(row, 0, max_length)]
    if data.on_overflow == "drop":
        return "dropped", []
    if data.on_overflow == "split" or (ROW_KINDS[kind].is_split_by_default and data.on_overflow != "error"):
        return "split", [_sample(row, start, max_length) for start in range(0, len(row.ids) - 1, max_length - 1)]
    if data.on_overflow == "error" or row.completion_start >= max_length:
        return "refused", []
    return "truncated", [_sample(row, 0, max_length)]


def _sample(row: TokenizedRow, start: int, max_length: int) -> Sample:
    """Return the sample of up to `max_length` tokens that begins at token `start`."""
    ids, is_trained = row.ids[start : start + max_length], row.is_trained[start : start + max_length]
    labels = [token if trained else IGNORED for token, trained in zip(ids, is_trained, strict=True)]
    labels[0] = IGNORED
    return Sample(ids, labels)


def _too_long(
    rows: list[Row], refused: list[tuple[int, TokenizedRow]], data: DataSection, max_length: int, part: str
) -> str:
    """Return the message about rows that are too long, given with their numbers: it names the first of them."""
    number, row = refused[0]
    if data.on_overflow == "error":
        fault = f"{len(row.ids)} tokens, but train.max_length is {max_length} and data.on_overflow is error"
    else:
        fault = (
            f"its first {row.completion_start} tokens are prompt and train.max_length is {max_length}, "
            "so no token of the completion would be left"
        )
    longest = max(len(r.ids) for _, r in refused)
    others = f" ({len(refused)} such rows, the longest of {longest} tokens)" if len(refused) > 1 else ""
    remedy = f"set data.on_overflow: drop to leave such rows out, or train.max_length: {longest} to keep them whole"
    return f"{row_location(rows, number, part)}: {fault}{others}; {remedy}"


def _check_something_is_trained(encoded: Encoded, rows: int, max_length: int, part: str) -> None:
    """Raise `InputError` if the loss counts no token of the samples made of `rows` rows."""
    if len(encoded.skipped) == rows:
        raise InputError(f"{encoded.skipped[0]}\nall {rows} rows were left out for such reasons, so none can be used")
    if encoded.trained_tokens:
        return
    if encoded.dropped == rows:
        raise InputError(
            f"{part}: all {rows} rows are longer than train.max_length ({max_length} tokens) and were dropped; raise it"
        )
    raise InputError(
        f"{part}: all labels are masked in all {len(encoded.samples)} samples: nothing would be learned; see "
        "data.train_on, and whether the chat template's {% generation %} part holds the assistant's turns"
    )
