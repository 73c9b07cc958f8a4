"""Bring raw rows of any accepted format into one of three kinds.

    format     columns (prompt, completion, messages and text can be renamed)   kind and normalized row
    prompt     prompt, completion                                               prompt: {prompt, completion}
    alpaca     instruction, output, and input if there is one                   prompt: {prompt, completion}
    chat       messages: a list of {role, content}                              chat: {messages: [{role, content}, …]}
    sharegpt   messages or conversations: a list of {from, value}               chat: {messages: [{role, content}, …]}
    text       text                                                             text: {text}
    tokens     input_ids, and labels if there are some (-100: not trained)      tokens: {input_ids, labels}

A chat may have a column of tools, and messages of the role `tool` and with `tool_calls`, for the template.  Other
columns, and other keys of a message, are not used.
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

UNUSABLE = ("position_ids", "attention_mask", "token_type_ids", "pixel_values", "image", "images", "videos", "audio")
"""Columns that say something about a row which is lost in training on text, and above all when rows are packed."""

_SHOWN = 5
"""How many faulty rows one message names."""


def normalize(
    table: Table, data: DataSection, faults: list[str] | None = None, partial: bool = False
) -> tuple[Kind, list[Row]]:
    """Rows of one kind, in the table's order.

    `faults`: where `data.on_invalid_row` says skip, what is wrong with each row left out is added there.
    `partial`: the table is a piece of a data set, of which all rows may be left out.

    Raises:
        InputError: no format fits the columns, or rows are faulty (and not skipped, or all of them): the first five are
            named, the others counted.
    """
    chosen = detect(table, data) if data.format == "auto" else data.format
    _refuse_columns(table)
    kind, convert = CONVERTERS[chosen]
    rows: list[Row] = []
    found = list(table.faults)
    for i, raw in enumerate(table.rows):
        try:
            if not isinstance(raw, dict):
                raise RowFault(f"must be an object with named columns, found {describe(raw)}")
            rows.append(convert(raw, data))
        except RowFault as fault:
            found.append(f"{table.where(i)}: {fault}")
    if found and (faults is None or data.on_invalid_row == "error" or not (rows or partial)):
        more = f"\n… and {len(found) - _SHOWN} more rows" if len(found) > _SHOWN else ""
        todo = (
            "" if data.on_invalid_row == "skip" else "\ndata.on_invalid_row: skip leaves such rows out, and counts them"
        )
        raise InputError("\n".join(found[:_SHOWN]) + more + todo)
    if faults is not None:
        faults += found
    return kind, rows


def _refuse_columns(table: Table) -> None:
    first = table.rows[0] if table.rows else None
    for name in UNUSABLE if isinstance(first, dict) else ():
        value = first.get(name)  # type: ignore[union-attr]
        if value is None or (name == "attention_mask" and isinstance(value, list) and all(v == 1 for v in value)):
            continue
        raise InputError(
            f"{table.where(0)}: the column '{name}' can't be kept: rows are trained on as text, packed with others, at "
            f"positions of their own; take the column out if the rows are right without it"
        )


def detect(table: Table, data: DataSection) -> str:
    """The format that the first row's columns fit.  Text is the last choice: many sets add it to other columns.

    Raises:
        InputError: none fits, or more than one does.
    """
    first = table.rows[0]
    if not isinstance(first, dict):
        raise InputError(f"{table.where(0)}: must be an object with named columns, found {describe(first)}")
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
    wanted = {"prompt": data.prompt, "completion": data.completion, "messages": data.messages, "text": data.text}
    near = [
        f"data.{key}: {column}"
        for key, name in wanted.items()
        if name not in first and (column := next((c for c in first if did_you_mean(name, [c])), None)) is not None
    ]
    hint = f". Perhaps {', '.join(near)}" if near else ""
    raise InputError(
        f"{table.where(0)}: no format fits the columns found: {column_names(first)}. "
        f"Allowed: {data.prompt} and {data.completion} (prompt); {data.messages} (chat); {data.text} (text); "
        f"instruction, output and perhaps input (alpaca); {CONVERSATIONS} (sharegpt); input_ids (tokens). "
        f"Name your columns with data.prompt and data.completion, data.messages, or data.text{hint}"
    )
