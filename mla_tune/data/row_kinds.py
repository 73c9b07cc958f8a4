"""The four kinds of rows: prompt, chat, text and tokens, with the keys of each.

`formats` converts every input format into rows of one of these kinds, and `tokenize_rows` tokenizes them:

    kind     keys                   how a row becomes tokens
    prompt   prompt, completion     a user turn and an assistant turn, rendered with the tokenizer's chat template;
                                    without a template: bos + prompt + completion + eos
    chat     messages, tools (opt.) all turns, rendered with the tokenizer's chat template
    text     text                   bos + text + eos
    tokens   input_ids, labels      no rendering: the ids are used unchanged
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Kind: TypeAlias = Literal["prompt", "chat", "text", "tokens"]
Row: TypeAlias = dict[str, Any]
"""One row of a kind: a dictionary with the keys that `ROW_KINDS` lists for it."""

IGNORED = -100
"""The label of a token that the loss ignores, as in PyTorch's cross-entropy."""


@dataclass(frozen=True, slots=True)
class RowKind:
    """What the rows of one kind have in common."""

    keys: tuple[str, ...]
    """Keys that every row has. No other kind has the first one, so it identifies the kind."""
    optional_keys: tuple[str, ...] = ()
    """Keys that a row may have besides."""
    is_split_by_default: bool = False
    """Whether a row that is too long is split into several samples also under `data.on_overflow: truncate`."""


ROW_KINDS: dict[Kind, RowKind] = {
    "prompt": RowKind(("prompt", "completion")),
    "chat": RowKind(("messages",), optional_keys=("tools",)),
    "text": RowKind(("text",), is_split_by_default=True),
    "tokens": RowKind(("input_ids", "labels")),
}


def kind_of(row: Row) -> Kind:
    """Return the kind of a row, which its keys identify."""
    return next(kind for kind, description in ROW_KINDS.items() if description.keys[0] in row)


def excerpt(row: Row) -> str:
    """Return the beginning of a row's text in quotes, or its number of tokens, to identify it in a message."""
    kind = kind_of(row)
    if kind == "tokens":
        return f"{len(row['input_ids'])} tokens"
    text = row["messages"][0]["content"] if kind == "chat" else row[kind]
    beginning = " ".join(text[:200].split())
    return f"'{beginning[:40]}{'…' if len(beginning) > 40 else ''}'"
