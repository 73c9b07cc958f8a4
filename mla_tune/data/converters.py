"""Convert one raw row of a format into a row of its kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from mla_tune.data.row_kinds import Kind, Row
from mla_tune.errors import did_you_mean
from mla_tune.recipe.schema import DataSection

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
EXTRAS = ("tool_calls", "tool_call_id", "name", "reasoning_content")
"""Keys of a message that templates read beside role and content; kept as they are."""
CONVERSATIONS = "conversations"
"""Where ShareGPT-like sets keep the chat; read when the configured column isn't there."""


class RowFault(Exception):
    """What is wrong with one row; the caller knows where the row stands."""


def chat_column(row: Row, data: DataSection) -> str | None:
    return next((c for c in (data.messages, CONVERSATIONS) if c in row), None)


def is_sharegpt(messages: Any) -> bool:
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
    column = chat_column(raw, data)
    if column is None:
        raise _missing(raw, data.messages, "data.messages")
    found = raw[column]
    if not isinstance(found, list):
        raise RowFault(f"{column}: must be a list of {{{role_key}, {content_key}}}, found {describe(found)}")
    if not found:
        raise RowFault(f"{column}: the list is empty; a chat needs at least one message")
    messages: list[dict[str, str]] = []
    for i, message in enumerate(found):
        at = f"{column}[{i}]"
        if not isinstance(message, dict):
            raise RowFault(f"{at}: must be an object {{{role_key}, {content_key}}}, found {describe(message)}")
        if missing := [k for k in (role_key, content_key) if k not in message]:
            raise RowFault(f"{at}: has no '{missing[0]}'; its keys are {column_names(message)}")
        role = message[role_key]
        if not isinstance(role, str) or role not in roles:
            hint = did_you_mean(role, roles) if isinstance(role, str) else ""
            raise RowFault(f"{at}: unknown {role_key} {role!r}{hint or ';'} allowed: {', '.join(roles)}")
        extras = {k: message[k] for k in EXTRAS if message.get(k) is not None}
        content = message[content_key]
        if content is None and extras.get("tool_calls"):
            content = ""  # a turn that only calls a tool
        messages.append({"role": roles[role], "content": _checked(content, f"{at}.{content_key}"), **extras})
    said = [m for m in messages if m["role"] == "assistant" and (m["content"].strip() or m.get("tool_calls"))]
    if data.train_on == "completion" and not said:
        raise RowFault(
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
            raise RowFault(f"{data.tools}: column {err.colno}: not JSON: {err.msg}") from err
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise RowFault(f"{data.tools}: must be a list of JSON schemas, found {describe(found)}")
    return found


def _from_tokens(raw: Row, data: DataSection) -> Row:
    ids, labels = raw.get("input_ids"), raw.get("labels")
    if not _is_ids(ids) or not ids:
        raise RowFault(f"input_ids: must be a list of token ids, found {describe(ids)}")
    if labels is None:
        return {"input_ids": ids, "labels": list(ids)}
    if not isinstance(labels, list) or len(labels) != len(ids):
        raise RowFault(f"labels: must be a list of {len(ids)} ids or -100, as input_ids is, found {describe(labels)}")
    wrong = next((i for i, (a, b) in enumerate(zip(ids, labels, strict=True)) if b not in (a, -100)), None)
    if wrong is not None:
        raise RowFault(f"labels[{wrong}] is {labels[wrong]}, neither input_ids[{wrong}] ({ids[wrong]}) nor -100")
    if all(label == -100 for label in labels[1:]):
        raise RowFault("labels: all are -100, so nothing to learn; remove the row")
    return {"input_ids": ids, "labels": labels}


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value)


CONVERTERS: dict[str, tuple[Kind, Callable[[Row, DataSection], Row]]] = {
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
        raise RowFault(f"{column} is empty, so nothing to learn; fill it or remove the row")
    return value


def _checked(value: Any, name: str) -> str:
    if not isinstance(value, str):
        todo = "fill it or remove the row" if value is None else "write it as a string"
        if isinstance(value, list):
            todo = "a list of messages belongs to data.format: chat"
        raise RowFault(f"{name} must be a string, found {describe(value)}; {todo}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as err:
            raise RowFault(
                f"{name}: character {err.start} is half a surrogate pair; write the whole character"
            ) from err
    return value


def _missing(raw: Row, column: str, key: str | None) -> RowFault:
    todo = f"; name the right column with {key}" if key else "; data.format: alpaca needs instruction and output"
    return RowFault(
        f"no column '{column}'{did_you_mean(column, map(str, raw)) or ';'} columns found: {column_names(raw)}{todo}"
    )


def column_names(row: Row) -> str:
    return ", ".join(map(str, row)) or "none"


def describe(value: Any) -> str:
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
