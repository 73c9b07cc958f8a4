"""Files that a user names: whatever bytes they hold, the result is text, a JSON document, or a named error.

Recipes, config.json, adapter_config.json, indexes, run.json, manifests, prompts and data all come through here.
Every error is a `FileError` that says where (file, line, byte), what is wrong, and what to do.
"""

from __future__ import annotations

import codecs
import json
import math
import re
import stat
from pathlib import Path
from typing import Any, NoReturn

from mla_tune.errors import FileError

#: Bytes beyond which a file is not taken for text: the largest index of a published checkpoint has some 20 MB.
MAX_TEXT = 1 << 28
#: What to do about a damaged file.
AGAIN = "Download or save it again"
#: Byte order marks of text that is not UTF-8.  UTF-32's little-endian mark begins with UTF-16's, so it comes first.
_OTHER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
#: JSON's escape of half a character beyond U+FFFF; without its other half it is no text.
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_bytes(path: Path, what: str, where: str | None = None, *, most: int | None = MAX_TEXT) -> bytes:
    """The contents of a regular file of at most `most` bytes (None: of any size).

    `what` says in an error what the file is ("the adapter's configuration"); `where` names it there instead of `path`.
    Raises `FileError` for a file that is missing, too large, a folder, a pipe or a device, or that can't be read.
    """
    where = where or str(path)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise FileError(f"{where}: is a folder, and {what} is a file")
        if not stat.S_ISREG(status.st_mode):
            raise FileError(f"{where}: is a pipe, a device or a socket; save {what} in a file and name that")
        if most is not None and status.st_size > most:
            raise FileError(f"{where}: has {status.st_size:,} bytes, too many for {what}; is another file meant?")
        return path.read_bytes()
    except FileError:
        raise
    except FileNotFoundError:
        raise FileError(f"{where}: no such file: {what} is missing") from None
    except OSError as error:
        raise FileError(f"{where}: can't be read: {error.strerror}") from None
    except ValueError as error:  # a NUL byte in the path
        raise FileError(f"{where!r}: is no path: {error}") from None


def read_text(path: Path, what: str, where: str | None = None) -> str:
    """The text of a UTF-8 file, without a byte order mark.  Arguments and errors as for `read_bytes`; raises
    `FileError` for bytes that are not UTF-8 and for binary files too."""
    where = where or str(path)
    data = read_bytes(path, what, where)
    text = decode(data, where)
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise FileError(
            f"{where}: line {line}: a NUL byte, which no text holds: this is a binary file, or UTF-16 without a byte "
            f"order mark, and {what} is UTF-8 text"
        )
    return text


def decode(data: bytes, where: str, line: int = 1) -> str:
    """UTF-8 bytes, with or without a byte order mark → text.

    `line`: the number of the first line, for messages.  Raises `FileError` with line and byte for anything else.
    """
    for mark, name in _OTHER_MARKS:
        if data.startswith(mark):
            raise FileError(
                f"{where}: line {line}, byte 1: 0x{data[0]:02x} isn't UTF-8; text must be UTF-8, and this is {name}. "
                f"Convert it, for example with `iconv -f {name} -t UTF-8`"
            )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # `error.start` doesn't count a byte order mark; `error.object` is what was left to decode.
        before = error.object[: error.start]
        line += before.count(b"\n")
        column = error.start - (before.rfind(b"\n") + 1) + 1
        raise FileError(
            f"{where}: line {line}, byte {column}: 0x{error.object[error.start]:02x} isn't UTF-8; text must be UTF-8. "
            f"Convert it, for example with `iconv -f WINDOWS-1252 -t UTF-8`"
        ) from error


def read_json(path: Path, what: str, where: str | None = None, *, unique: bool = False) -> Any:
    """The JSON document in a file.

    `unique`: refuse an object with a key twice, of which other programs see only the last.  Arguments and errors as for
    `read_text`; raises `FileError` with line and column for what is not JSON (`NaN` and `Infinity` are not).
    """
    return parse_json(read_text(path, what, where), where or str(path), what, unique=unique)


def read_json_object(path: Path, what: str, where: str | None = None, *, unique: bool = False) -> dict[str, Any]:
    """As `read_json`, for a file that must hold a JSON object (`{…}`)."""
    document = read_json(path, what, where, unique=unique)
    if not isinstance(document, dict):
        raise FileError(f"{where or path}: {what} must hold a JSON object, not {_kind(document)}")
    return document


def parse_json(text: str, where: str, what: str, *, unique: bool = False, todo: str = AGAIN) -> Any:
    """A JSON document in `text`; arguments and errors as for `read_json`.  `todo`: what an error tells to do."""
    if not text.strip():
        raise FileError(f"{where}: is empty: {what} must hold JSON. {todo}")

    def refuse(why: str) -> NoReturn:
        raise FileError(f"{where}: {what} is not valid JSON ({why}). {todo}")

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            refuse(f"the key {twice!r} stands twice in one object")
        return found

    def number(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else refuse(f"{digits[:20]} is beyond the range of numbers")

    try:
        document = json.loads(
            text,
            parse_constant=lambda name: refuse(f"{name} is no JSON number"),
            parse_float=number,
            object_pairs_hook=unique_keys if unique else None,
        )
    except json.JSONDecodeError as error:
        line = f":{error.lineno}" if "\n" in text else ""
        why = f"{error.msg}, column {error.colno}"
        raise FileError(f"{where}{line}: {what} is not valid JSON ({why}). {todo}") from None
    except RecursionError:
        refuse("it is nested too deeply")
    except FileError:
        raise
    except ValueError as error:  # a whole number of thousands of digits
        refuse(str(error))
    if _ESCAPED_SURROGATE.search(text) and (half := _SURROGATE.search(json.dumps(document, ensure_ascii=False))):
        refuse(f"it holds half a character, \\u{ord(half[0]):04x}")
    return document


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")
