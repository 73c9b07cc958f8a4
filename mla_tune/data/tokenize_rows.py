"""Rows → token ids, and for each token whether it counts towards the loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mla_tune.data.chat import marked_tokens, marks_assistant, render, tokens_of, turn_tokens
from mla_tune.data.row_kinds import IGNORED, Kind, Row
from mla_tune.errors import InputError
from mla_tune.recipe.schema import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """A row before it is cut: `counts[i]` says whether token i is trained; `answer` is the first that must stay."""

    ids: list[int]
    counts: list[bool]
    answer: int = 0


def row_location(rows: list[Row], number: int, part: str) -> str:
    """Rows are told by their beginning too: after a split the number isn't the line of a file."""
    row = rows[number - 1]
    if "input_ids" in row:
        return f"{part}: row {number} ({len(row['input_ids'])} tokens)"
    text = row["messages"][0]["content"] if "messages" in row else row.get("prompt", row.get("text", ""))
    begin = " ".join(text[:200].split())
    return f"{part}: row {number} ('{begin[:40]}{'…' if len(begin) > 40 else ''}')"


def tokenize_rows(
    rows: list[Row], kind: Kind, tokenizer: PreTrainedTokenizerBase, data: DataSection, part: str
) -> Iterator[TokenizedRow | InputError]:
    """Each row's tokens; where bad rows are skipped, the error of one instead."""
    has_template = bool(tokenizer.chat_template)
    chat = kind == "chat" or (
        kind == "prompt" and (data.template == "chat" or (data.template == "auto" and has_template))
    )
    if kind == "chat" and data.template == "none":
        raise InputError("data.template: none can't join the turns of a chat; use auto or chat")
    if chat and not has_template:
        todo = "set data.template: none, or " if kind == "prompt" else ""
        raise InputError(f"data.template: the tokenizer has no chat template; {todo}take a model that has one")
    if not chat and kind != "tokens" and tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no eos token to end a row with; set one in its tokenizer_config.json")
    for number, row in enumerate(rows, start=1):
        try:
            yield _row(row, kind, chat, tokenizer, data.train_on == "all")
        except InputError as err:
            told = InputError(f"{row_location(rows, number, part)}: {err}")
            if data.on_invalid_row == "error":
                raise told from err
            yield told


def _row(row: Row, kind: Kind, chat: bool, tokenizer: PreTrainedTokenizerBase, count_all: bool) -> TokenizedRow:
    if kind == "tokens":
        return _from_ids(row, len(tokenizer), count_all)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if kind == "text":
        ids = [*bos, *tokens_of(tokenizer, row["text"]), tokenizer.eos_token_id]
        return TokenizedRow(ids, [True] * len(ids))
    if kind == "chat":
        if count_all:
            ids = tokens_of(tokenizer, render(tokenizer, row["messages"], tools=row.get("tools")))
            return TokenizedRow(ids, [True] * len(ids))
        split = marked_tokens if marks_assistant(tokenizer) else turn_tokens
        ids, counts = split(tokenizer, row["messages"], row.get("tools"))
    elif chat:
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        ids, counts = turn_tokens(tokenizer, turns)
    else:
        head = [*bos, *tokens_of(tokenizer, row["prompt"])]
        ids = [*head, *tokens_of(tokenizer, row["completion"]), tokenizer.eos_token_id]
        counts = [i >= len(head) for i in range(len(ids))]
    answer = counts.index(True) if True in counts else 0
    return TokenizedRow(ids, [True] * len(ids) if count_all else counts, answer)


def _from_ids(row: Row, vocabulary: int, count_all: bool) -> TokenizedRow:
    ids = row["input_ids"]
    if max(ids) >= vocabulary:
        raise InputError(f"token {max(ids)} is beyond the tokenizer's {vocabulary} entries; is it another tokenizer's?")
    counts = [count_all or label != IGNORED for label in row["labels"]]
    return TokenizedRow(ids, counts, counts.index(True))
