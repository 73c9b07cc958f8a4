"""Convert a raw row of one format into a row of a kind, with one converter for each value of `data.format`.

    format     columns                                              kind
    prompt     prompt, completion                                   prompt
    alpaca     instruction, output, and optionally input            prompt
    chat       messages: a list of {role, content}                  chat
    sharegpt   messages or conversations: a list of {from, value}   chat
    text       text                                                 text
    tokens     input_ids, and optionally labels (-100: ignored)     tokens

`row_kinds` lists the kinds. The recipe's keys `data.prompt`, `completion`, `messages`, `tools` and `text` rename the
columns of those names. A chat may have a column of tools, and messages of the role `tool` and with `tool_calls`, for
the chat template. Other columns, and other keys of a message, are not used.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from mla_tune.data.row_kinds import IGNORED, Kind, Row
from mla_tune.errors import did_you_mean
from mla_tune.recipe.schema import DataSection

ROLES = ("system", "user", "assistant", "tool")
"""Roles of the messages in a chat."""
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
"""Role in the ShareGPT format → the role of the same message in a chat."""
EXTRA_MESSAGE_KEYS = ("tool_calls", "tool_call_id", "name", "reasoning_content")
"""Keys of a message besides role and content that chat templates read; they are kept unchanged."""
CONVERSATIONS = "conversations"
"""Column that holds the chat in many ShareGPT data sets; read where the column `data.messages` is missing."""


class RowFault(Exception):
    """What is wrong with one row. The message does not say which row it is; the caller adds that."""


def chat_column(row: Row, data: DataSection) -> str | None:
    """Return the name of the column that holds a row's chat, or None."""
    return next((c for c in (data.messages, CONVERSATIONS) if c in row), None)


def is_sharegpt(messages: Any) -> bool:
    """Return whether the first message of a chat has the ShareGPT form {from, value}."""
    return isinstance(messages, list) and bool(messages) and isinstance(messages[0], dict) and "from" in messages[0]


def column_names(row: Row) -> str:
    """Return the names of a row's columns, for messages."""
    return ", ".join(map(str, row)) or "none"


def describe(value: Any) -> str:
    """Return the type and the beginning of a value, for messages: `the string 'abc'`."""
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


def _convert_prompt(raw: Row, data: DataSection) -> Row:
    prompt = _string_in(raw, data.prompt, "data.prompt")
    return {"prompt": prompt, "completion": _nonempty_string_in(raw, data.completion, "data.completion")}


def _convert_alpaca(raw: Row, data: DataSection) -> Row:
    prompt = _string_in(raw, "instruction")
    if raw.get("input") is not None and (extra := _string_in(raw, "input")):
        prompt = f"{prompt}\n\n{extra}"
    return {"prompt": prompt, "completion": _nonempty_string_in(raw, "output")}


def _convert_text(raw: Row, data: DataSection) -> Row:
    return {"text": _nonempty_string_in(raw, data.text, "data.text")}


def _convert_chat(raw: Row, data: DataSection) -> Row:
    return _chat(raw, data, "role", "content", {role: role for role in ROLES})


def _convert_sharegpt(raw: Row, data: DataSection) -> Row:
    return _chat(raw, data, "from", "value", SHAREGPT_ROLES)


def _chat(raw: Row, data: DataSection, role_key: str, content_key: str, roles: dict[str, str]) -> Row:
    """Convert a chat whose messages have the keys `role_key` and `content_key`; `roles` maps their roles to ours."""
    column = chat_column(raw, data)
    if column is None:
        raise _missing_column(raw, data.messages, "data.messages")
    found = raw[column]
    if not isinstance(found, list):
        raise RowFault(f"{column}: must be a list of {{{role_key}, {content_key}}}, found {describe(found)}")
    if not found:
        raise RowFault(f"{column}: the list is empty; a chat needs at least one message")
    messages = [_message(message, f"{column}[{i}]", role_key, content_key, roles) for i, message in enumerate(found)]
    has_answer = any(m["role"] == "assistant" and (m["content"].strip() or m.get("tool_calls")) for m in messages)
    if data.train_on == "completion" and not has_answer:
        raise RowFault(
            f"{column}: no assistant's turn has content, so there is nothing to learn; remove the row or set "
            "data.train_on: all"
        )
    tools = _tools(raw, data)
    return {"messages": messages, **({"tools": tools} if tools else {})}


def _message(message: Any, location: str, role_key: str, content_key: str, roles: dict[str, str]) -> dict[str, Any]:
    """Convert one message of a chat; `location` (`messages[3]`) is where it is, for messages of errors."""
    if not isinstance(message, dict):
        raise RowFault(f"{location}: must be an object {{{role_key}, {content_key}}}, found {describe(message)}")
    if missing := [k for k in (role_key, content_key) if k not in message]:
        raise RowFault(f"{location}: has no '{missing[0]}'; its keys are {column_names(message)}")
    role = message[role_key]
    if not isinstance(role, str) or role not in roles:
        hint = did_you_mean(role, roles) if isinstance(role, str) else ""
        raise RowFault(f"{location}: unknown {role_key} {role!r}{hint or ';'} allowed: {', '.join(roles)}")
    extras = {k: message[k] for k in EXTRA_MESSAGE_KEYS if message.get(k) is not None}
    content = message[content_key]
    if content is None and extras.get("tool_calls"):
        content = ""  # a turn that only calls a tool
    return {"role": roles[role], "content": _check_string(content, f"{location}.{content_key}"), **extras}


def _tools(raw: Row, data: DataSection) -> list[Any]:
    """Return the JSON schemas of the tools that a chat may call. The column may hold the list as JSON text."""
    found = raw.get(data.tools)
    if isinstance(found, str):
        try:
            found = json.loads(found) if found.strip() else None
        except json.JSONDecodeError as err:
            raise RowFault(f"{data.tools}: column {err.colno}: not JSON: {err.msg}") from err
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise RowFault(f"{data.tools}: must be a list of JSON schemas, found {describe(found)}")
    return found


def _convert_tokens(raw: Row, data: DataSection) -> Row:
    ids, labels = raw.get("input_ids"), raw.get("labels")
    if not _is_ids(ids) or not ids:
        raise RowFault(f"input_ids: must be a list of token ids, found {describe(ids)}")
    if labels is None:
        return {"input_ids": ids, "labels": list(ids)}
    if not isinstance(labels, list) or len(labels) != len(ids):
        raise RowFault(f"labels: must be a list of {len(ids)} ids or -100, as input_ids is, found {describe(labels)}")
    pairs = enumerate(zip(ids, labels, strict=True))
    wrong = next((i for i, (token, label) in pairs if label not in (token, IGNORED)), None)
    if wrong is not None:
        raise RowFault(f"labels[{wrong}] is {labels[wrong]}, neither input_ids[{wrong}] ({ids[wrong]}) nor -100")
    if all(label == IGNORED for label in labels[1:]):
        raise RowFault("labels: all after the first are -100, so there is nothing to learn; remove the row")
    return {"input_ids": ids, "labels": labels}


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value)


CONVERTERS: dict[str, tuple[Kind, Callable[[Row, DataSection], Row]]] = {
    "prompt": ("prompt", _convert_prompt),
    "alpaca": ("prompt", _convert_alpaca),
    "chat": ("chat", _convert_chat),
    "sharegpt": ("chat", _convert_sharegpt),
    "text": ("text", _convert_text),
    "tokens": ("tokens", _convert_tokens),
}
"""Format → the kind of its rows, and the function that converts a raw row. The function raises `RowFault`."""


def _string_in(raw: Row, column: str, key: str | None = None) -> str:
    """Return the string in a column; `key` is the recipe's key that names the column, if there is one."""
    if column not in raw:
        raise _missing_column(raw, column, key)
    return _check_string(raw[column], column)


def _nonempty_string_in(raw: Row, column: str, key: str | None = None) -> str:
    value = _string_in(raw, column, key)
    if not value.strip():
        raise RowFault(f"{column} is empty, so there is nothing to learn; fill it or remove the row")
    return value


def _check_string(value: Any, name: str) -> str:
    """Return `value` if it is a string that can be encoded as UTF-8."""
    if not isinstance(value, str):
        remedy = "fill it or remove the row" if value is None else "write it as a string"
        if isinstance(value, list):
            remedy = "a list of messages needs data.format: chat"
        raise RowFault(f"{name} must be a string, found {describe(value)}; {remedy}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as err:
            fault = f"{name}: character {err.start} is half a surrogate pair; write the whole character"
            raise RowFault(fault) from err
    return value


def _missing_column(raw: Row, column: str, key: str | None) -> RowFault:
    """Return the fault of a row that lacks a column."""
    remedy = f"; name the right column with {key}" if key else "; data.format: alpaca needs instruction and output"
    hint = did_you_mean(column, map(str, raw)) or ";"
    return RowFault(f"no column '{column}'{hint} columns found: {column_names(raw)}{remedy}")
