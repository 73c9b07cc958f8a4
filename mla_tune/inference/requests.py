"""`--prompts FILE.jsonl`: one request a line."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mla_tune.errors import FileError, InputError
from mla_tune.user_files import parse_json, read_text

#: What a user calls the model without an adapter.
BASE_NAME = "base"


@dataclass(frozen=True, slots=True)
class Request:
    """One thing to answer: a `prompt`, or the `messages` of a chat.  `adapter` is a name of the session, or None for
    the base."""

    prompt: str | None = None
    messages: list[dict[str, str]] | None = None
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """`temperature` 0 is greedy.  `raw` leaves the chat template out."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    raw: bool = False
    batch: int = 8


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """One answer."""

    #: The prompt, or the last message of a chat.
    prompt: str
    #: The answer.
    text: str
    #: Number of new tokens.
    tokens: int
    #: Seconds that the answer's batch took.
    seconds: float
    #: What ended it: the end of the text, or the limit on tokens.
    stopped: str
    #: The adapter that answered; None for the model without one.
    adapter: str | None = None
    #: Rows of the batch.
    batch: int = 1

    def to_json(self) -> dict[str, Any]:
        """The answer as `mla-tune generate --json` prints it."""
        return asdict(self)


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
