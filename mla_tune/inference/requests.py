"""`--prompts FILE.jsonl`: one request a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mla_tune.errors import FileError, InputError
from mla_tune.inference.session import BASE_NAME, Request
from mla_tune.user_files import parse_json, read_text

_FIELDS = {"prompt", "messages", "adapter"}


def read_requests(file: Path, default: str | None) -> list[Request]:
    """The requests of a file: `prompt` or `messages`, and `adapter` (`base`: none; absent: `default`).

    Raises `FileError` for a file that can't be read and `InputError` naming the line that is wrong.
    """
    lines = read_text(file, "the file of prompts").split("\n")  # U+2028 and its like may stand inside a JSON string
    requests = [_request(line, f"{file}:{n}", default) for n, line in enumerate(lines, 1) if line.strip()]
    if not requests:
        raise InputError(f"{file}: holds no requests: one JSON object a line, with prompt or messages")
    return requests


def _request(line: str, where: str, default: str | None) -> Request:
    try:
        row: Any = parse_json(line, where, "the request", todo="One JSON object a line was expected")
    except FileError as error:
        raise InputError(str(error)) from None
    if not isinstance(row, dict) or not row.keys() <= _FIELDS or ("prompt" in row) == ("messages" in row):
        raise InputError(f"{where}: an object with either prompt or messages, and adapter if you like, was expected")
    prompt, messages, adapter = row.get("prompt"), row.get("messages"), row.get("adapter", default)
    if prompt is not None and not (isinstance(prompt, str) and prompt.strip()):
        raise InputError(f"{where}: prompt must be a text that is not empty")
    if messages is not None and not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
        raise InputError(f"{where}: messages must be a list of objects with role and content, both texts")
    if not (adapter is None or isinstance(adapter, str)):
        raise InputError(f"{where}: adapter must be a name")
    return Request(prompt, messages, None if adapter == BASE_NAME else adapter)


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)
