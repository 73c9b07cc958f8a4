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

import json
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from mla_tune.data.files import Table
from mla_tune.errors import InputError, did_you_mean
from mla_tune.recipe.schema import DataSection

Kind: TypeAlias = Literal["prompt", "chat", "text", "tokens"]
Row: TypeAlias = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
EXTRAS = ("tool_calls", "tool_call_id", "name", "reasoning_content")
"""Keys of a message that templates read beside role and content; kept as they are."""
UNUSABLE = ("position_ids", "attention_mask", "token_type_ids", "pixel_values", "image", "images", "videos", "audio")
"""Columns that say something about a row which is lost in training on text, and above all when rows are packed."""
CONVERSATIONS = "conversations"
"""Where ShareGPT-like sets keep the chat; read when the configured column isn't there."""

_SHOWN = 5
"""How many faulty rows one message names."""


class _Fault(Exception):
    """What is wrong with one row; the caller knows where the row stands."""


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
    kind, convert = _CONVERTERS[chosen]
    rows: list[Row] = []
    found = list(table.faults)
    for i, raw in enumerate(table.rows):
        try:
            if not isinstance(raw, dict):
                raise _Fault(f"must be an object with named columns, found {_what(raw)}")
            rows.append(convert(raw, data))
        except _Fault as fault:
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
        raise InputError(f"{table.where(0)}: must be an object with named columns, found {_what(first)}")
    fits: list[str] = []
    if data.prompt in first and data.completion in first:
        fits.append("prompt")
    if "instruction" in first and "output" in first:
        fits.append("alpaca")
    if (column := _chat_column(first, data)) is not None:
        fits.append("sharegpt" if _is_sharegpt(first[column]) else "chat")
    if not fits and "input_ids" in first:
        fits.append("tokens")
    if not fits and data.text in first:
        fits.append("text")
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise InputError(
            f"{table.name}: its columns ({_names(first)}) fit the formats {' and '.join(fits)}; "
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
        f"{table.where(0)}: no format fits the columns found: {_names(first)}. "
        f"Allowed: {data.prompt} and {data.completion} (prompt); {data.messages} (chat); {data.text} (text); "
        f"instruction, output and perhaps input (alpaca); {CONVERSATIONS} (sharegpt); input_ids (tokens). "
        f"Name your columns with data.prompt and data.completion, data.messages, or data.text{hint}"
    )


def _chat_column(row: Row, data: DataSection) -> str | None:
    return next((c for c in (data.messages, CONVERSATIONS) if c in row), None)


def _is_sharegpt(messages: Any) -> bool:
    return isinstance(messages, list) and bool(messages) and isinstance(messages[0], dict) and "from" in messages[0]


def _from_prompt(raw: Row, data: DataSection) -> Row:
    prompt = _string(raw, data.prompt, "data.prompt")
    return {"prompt": prompt, "completion": _filled(raw, data.completion, "data.completion")}


def _from_alpaca(raw: Row, data: DataSection) -> Row:
    prompt = _string(raw, "instruction")
    if raw.get("input") is not None and (extra := _string(raw, "input")):
        prompt = f"{prompt}\n\n{extra}"
    return {"prompt": prompt, "completion": _filled(raw, "output")}


def _from_text(raw: Row, data: DataSection) -> Row:
    return {"text": _filled(raw, data.text, "data.text")}


def _from_chat(raw: Row, data: DataSection) -> Row:
    return _chat(raw, data, "role", "content", {role: role for role in ROLES})


def _from_sharegpt(raw: Row, data: DataSection) -> Row:
    return _chat(raw, data, "from", "value", SHAREGPT_ROLES)


def _chat(raw: Row, data: DataSection, role_key: str, content_key: str, roles: dict[str, str]) -> Row:
    column = _chat_column(raw, data)
    if column is None:
        raise _missing(raw, data.messages, "data.messages")
    found = raw[column]
    if not isinstance(found, list):
        raise _Fault(f"{column}: must be a list of {{{role_key}, {content_key}}}, found {_what(found)}")
    if not found:
        raise _Fault(f"{column}: the list is empty; a chat needs at least one message")
    messages: list[dict[str, str]] = []
    for i, message in enumerate(found):
        at = f"{column}[{i}]"
        if not isinstance(message, dict):
            raise _Fault(f"{at}: must be an object {{{role_key}, {content_key}}}, found {_what(message)}")
        if missing := [k for k in (role_key, content_key) if k not in message]:
            raise _Fault(f"{at}: has no '{missing[0]}'; its keys are {_names(message)}")
        role = message[role_key]
        if not isinstance(role, str) or role not in roles:
            hint = did_you_mean(role, roles) if isinstance(role, str) else ""
            raise _Fault(f"{at}: unknown {role_key} {role!r}{hint or ';'} allowed: {', '.join(roles)}")
        extras = {k: message[k] for k in EXTRAS if message.get(k) is not None}
        content = message[content_key]
        if content is None and extras.get("tool_calls"):
            content = ""  # a turn that only calls a tool
        messages.append({"role": roles[role], "content": _checked(content, f"{at}.{content_key}"), **extras})
    said = [m for m in messages if m["role"] == "assistant" and (m["content"].strip() or m.get("tool_calls"))]
    if data.train_on == "completion" and not said:
        raise _Fault(
            f"{column}: no assistant's turn with content, so nothing to learn; remove the row or set data.train_on: all"
        )
    tools = _tools(raw, data)
    return {"messages": messages, **({"tools": tools} if tools else {})}


def _tools(raw: Row, data: DataSection) -> list[Any]:
    """The tools that a chat may call, as JSON schemas; a column of text holds them as JSON."""
    found = raw.get(data.tools)
    if isinstance(found, str):
        try:
            found = json.loads(found) if found.strip() else None
        except json.JSONDecodeError as err:
            raise _Fault(f"{data.tools}: column {err.colno}: not JSON: {err.msg}") from err
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise _Fault(f"{data.tools}: must be a list of JSON schemas, found {_what(found)}")
    return found


def _from_tokens(raw: Row, data: DataSection) -> Row:
    ids, labels = raw.get("input_ids"), raw.get("labels")
    if not _is_ids(ids) or not ids:
        raise _Fault(f"input_ids: must be a list of token ids, found {_what(ids)}")
    if labels is None:
        return {"input_ids": ids, "labels": list(ids)}
    if not isinstance(labels, list) or len(labels) != len(ids):
        raise _Fault(f"labels: must be a list of {len(ids)} ids or -100, as input_ids is, found {_what(labels)}")
    wrong = next((i for i, (a, b) in enumerate(zip(ids, labels, strict=True)) if b not in (a, -100)), None)
    if wrong is not None:
        raise _Fault(f"labels[{wrong}] is {labels[wrong]}, neither input_ids[{wrong}] ({ids[wrong]}) nor -100")
    if all(label == -100 for label in labels[1:]):
        raise _Fault("labels: all are -100, so nothing to learn; remove the row")
    return {"input_ids": ids, "labels": labels}


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value)


_CONVERTERS: dict[str, tuple[Kind, Callable[[Row, DataSection], Row]]] = {
    "prompt": ("prompt", _from_prompt),
    "alpaca": ("prompt", _from_alpaca),
    "chat": ("chat", _from_chat),
    "sharegpt": ("chat", _from_sharegpt),
    "text": ("text", _from_text),
    "tokens": ("tokens", _from_tokens),
}


def _string(raw: Row, column: str, key: str | None = None) -> str:
    if column not in raw:
        raise _missing(raw, column, key)
    return _checked(raw[column], column)


def _filled(raw: Row, column: str, key: str | None = None) -> str:
    value = _string(raw, column, key)
    if not value.strip():
        raise _Fault(f"{column} is empty, so nothing to learn; fill it or remove the row")
    return value


def _checked(value: Any, name: str) -> str:
    if not isinstance(value, str):
        todo = "fill it or remove the row" if value is None else "write it as a string"
        if isinstance(value, list):
            todo = "a list of messages belongs to data.format: chat"
        raise _Fault(f"{name} must be a string, found {_what(value)}; {todo}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as err:
            raise _Fault(f"{name}: character {err.start} is half a surrogate pair; write the whole character") from err
    return value


def _missing(raw: Row, column: str, key: str | None) -> _Fault:
    todo = f"; name the right column with {key}" if key else "; data.format: alpaca needs instruction and output"
    return _Fault(
        f"no column '{column}'{did_you_mean(column, map(str, raw)) or ';'} columns found: {_names(raw)}{todo}"
    )


def _names(row: Row) -> str:
    return ", ".join(map(str, row)) or "none"


def _what(value: Any) -> str:
    """A value as one would name it in a message, cut to a few words."""
    shown = repr(value) if len(repr(value)) <= 40 else repr(value)[:37] + "…"
    names = {
        str: "the string",
        list: "the list",
        dict: "the object",
        bool: "the value",
        int: "the number",
        float: "the number",
    }
    return "nothing (null)" if value is None else f"{names.get(type(value), 'the value')} {shown}"
