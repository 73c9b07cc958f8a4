"""Detect the format of raw rows, and convert them into rows of one kind.

`converters` has the table of formats, `row_kinds` the table of kinds.
"""

from __future__ import annotations

from mla_tune.data.converters import (
    CONVERSATIONS,
    CONVERTERS,
    RowFault,
    chat_column,
    column_names,
    describe,
    is_sharegpt,
)
from mla_tune.data.files import Table
from mla_tune.data.row_kinds import Kind, Row
from mla_tune.errors import InputError, did_you_mean
from mla_tune.recipe.schema import DataSection

UNSUPPORTED_COLUMNS = (
    "position_ids",
    "attention_mask",
    "token_type_ids",
    "pixel_values",
    "image",
    "images",
    "videos",
    "audio",
)
"""Columns that are refused, because training on packed text would silently ignore what they say about a row."""

_MOST_NAMED = 5
"""The most faulty rows that one message names; the others are counted."""


def normalize(
    table: Table, data: DataSection, faults: list[str] | None = None, *, allow_empty: bool = False
) -> tuple[Kind, list[Row]]:
    """Convert raw rows into rows of one kind, in the table's order, and return the kind with them.

    Args:
        table: the raw rows.
        data: the recipe's data section.
        faults: under `data.on_invalid_row: skip`, a message for each row left out is appended to this list. None:
            a faulty row is always an error.
        allow_empty: under `skip`, accept that all rows are left out, as may happen in one chunk of a stream.

    Raises:
        InputError: no format fits the columns; or rows are faulty and may not be skipped, or all of them are. The first
            five are named, the others counted.
    """
    format_name = detect_format(table, data) if data.format == "auto" else data.format
    _check_columns(table)
    kind, convert = CONVERTERS[format_name]
    rows: list[Row] = []
    found = list(table.faults)
    for i, raw in enumerate(table.rows):
        try:
            if not isinstance(raw, dict):
                raise RowFault(f"must be an object with named columns, found {describe(raw)}")
            rows.append(convert(raw, data))
        except RowFault as fault:
            found.append(f"{table.location(i)}: {fault}")
    may_skip = faults is not None and data.on_invalid_row == "skip" and (rows or allow_empty)
    if found and not may_skip:
        raise InputError(_faults_message(found, data))
    if faults is not None:
        faults += found
    return kind, rows


def _faults_message(faults: list[str], data: DataSection) -> str:
    """Return a message that names the first faulty rows, counts the others, and says how to leave them out."""
    lines = faults[:_MOST_NAMED]
    if len(faults) > _MOST_NAMED:
        lines.append(f"… and {len(faults) - _MOST_NAMED} more rows")
    if data.on_invalid_row != "skip":
        lines.append("data.on_invalid_row: skip leaves such rows out, and counts them")
    return "\n".join(lines)


def _check_columns(table: Table) -> None:
    """Raise `InputError` if the first row has a column that can't be kept. An attention mask of ones is harmless."""
    first = table.rows[0] if table.rows else None
    if not isinstance(first, dict):
        return
    for name in UNSUPPORTED_COLUMNS:
        value = first.get(name)
        if value is None or (name == "attention_mask" and isinstance(value, list) and all(v == 1 for v in value)):
            continue
        raise InputError(
            f"{table.location(0)}: the column '{name}' can't be kept: rows are trained on as text and packed with "
            "other rows, which changes their positions; remove the column if the rows are right without it"
        )


def detect_format(table: Table, data: DataSection) -> str:
    """Return the format that fits the columns of the first row.

    `text` and `tokens` are considered only where no other format fits, because many data sets add a column `text` to
    the columns of another format.

    Raises:
        InputError: no format fits, or more than one does.
    """
    first = table.rows[0]
    if not isinstance(first, dict):
        raise InputError(f"{table.location(0)}: must be an object with named columns, found {describe(first)}")
    fits: list[str] = []
    if data.prompt in first and data.completion in first:
        fits.append("prompt")
    if "instruction" in first and "output" in first:
        fits.append("alpaca")
    if (column := chat_column(first, data)) is not None:
        fits.append("sharegpt" if is_sharegpt(first[column]) else "chat")
    if not fits and "input_ids" in first:
        fits.append("tokens")
    if not fits and data.text in first:
        fits.append("text")
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise InputError(
            f"{table.name}: its columns ({column_names(first)}) fit the formats {' and '.join(fits)}; "
            "say which with data.format"
        )
    raise InputError(_no_format_message(table, first, data))


def _no_format_message(table: Table, first: Row, data: DataSection) -> str:
    """Return the message about columns that fit no format: what was found, what is allowed, and a likely remedy."""
    wanted = {"prompt": data.prompt, "completion": data.completion, "messages": data.messages, "text": data.text}
    near = [
        f"data.{key}: {column}"
        for key, name in wanted.items()
        if name not in first and (column := next((c for c in first if did_you_mean(name, [c])), None)) is not None
    ]
    hint = f". Perhaps {', '.join(near)}" if near else ""
    return (
        f"{table.location(0)}: no format fits the columns found: {column_names(first)}. "
        f"Allowed: {data.prompt} and {data.completion} (prompt); {data.messages} (chat); {data.text} (text); "
        f"instruction, output and optionally input (alpaca); {CONVERSATIONS} (sharegpt); input_ids (tokens). "
        f"Name your columns with data.prompt and data.completion, data.messages, or data.text{hint}"
    )
