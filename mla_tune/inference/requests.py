"""What a session is asked and what it returns: requests, settings and results; and the reader of `--prompts` files."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mla_tune.errors import FileError, InputError
from mla_tune.user_files import parse_json, read_text

#: The user's name for the model without an adapter.
BASE_NAME = "base"
#: Keys of a line in a file of requests.
_FIELDS = {"prompt", "messages", "adapter"}


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt or chat to answer: either `prompt` or `messages` is given."""

    prompt: str | None = None
    """A prompt as text."""
    messages: list[dict[str, str]] | None = None
    """The messages of a chat, each with `role` and `content`."""
    adapter: str | None = None
    """Name of the session's adapter that answers; None for the model without an adapter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSettings:
    """How a session answers its requests."""

    max_new_tokens: int = 128
    """Maximum length of an answer."""
    temperature: float = 0.0
    """0 takes the most likely token; above 0, tokens are sampled."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together have this probability."""
    seed: int = 0
    """Seed of sampling."""
    raw: bool = False
    """Whether prompts are continued as they are, without the chat template."""
    batch_size: int = 8
    """Number of requests answered at once."""


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """One answer."""

    prompt: str
    """The prompt, or the last message of a chat."""
    text: str
    """The answer."""
    tokens: int
    """Number of new tokens."""
    seconds: float
    """Seconds that the whole batch of this answer took."""
    stopped: str
    """What ended the answer: `end of text`, or `length` (`max_new_tokens`)."""
    adapter: str | None = None
    """The adapter that answered; None for the model without an adapter."""
    batch: int = 1
    """Number of rows in the batch."""

    def to_json(self) -> dict[str, Any]:
        """Return the answer as `mla-tune generate --json` prints it."""
        return asdict(self)


def read_requests(file: Path, default: str | None) -> list[Request]:
    """Read requests from a file with one JSON object a line.

    Each has `prompt` or `messages`, and may have `adapter`: the name of an adapter, or `base` for none.  A line without
    `adapter` is answered by the adapter `default`.

    Raises `FileError` for a file that can't be read and `InputError` naming the line that is wrong.
    """
    lines = read_text(file, "the file of prompts").split("\n")  # not splitlines: a JSON string may contain U+2028
    requests = [_parse_request(line, f"{file}:{n}", default) for n, line in enumerate(lines, 1) if line.strip()]
    if not requests:
        raise InputError(f"{file}: holds no requests: expected one JSON object a line, with prompt or messages")
    return requests


def _parse_request(line: str, where: str, default: str | None) -> Request:
    """Return the request of one line; `where` names file and line in messages."""
    try:
        row: Any = parse_json(line, where, "the request", todo="One JSON object a line was expected")
    except FileError as error:
        raise InputError(str(error)) from None
    if not isinstance(row, dict) or not row.keys() <= _FIELDS or ("prompt" in row) == ("messages" in row):
        raise InputError(f"{where}: expected an object with either prompt or messages, and optionally adapter")
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
