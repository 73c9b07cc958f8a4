"""Render and tokenize rows, and find the tokens of each row that are trained.

`row_kinds` lists how each kind is rendered. The ids of a rendered row are those of `tokenizer.apply_chat_template`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mla_tune.data.chat import marked_tokens, render, template_marks_assistant, tokens_of, turn_tokens
from mla_tune.data.row_kinds import IGNORED, Kind, Row, excerpt
from mla_tune.errors import InputError
from mla_tune.recipe.schema import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """The tokens of one row, before the row is fitted to `train.max_length`."""

    ids: list[int]
    """Token ids."""
    is_trained: list[bool]
    """For each token, whether the loss counts it."""
    completion_start: int = 0
    """Index of the completion's first token; truncation must leave it in the sample. 0 where there is no prompt."""


@dataclass(frozen=True, slots=True)
class _Settings:
    """The recipe and the tokenizer, as far as the tokens of a row depend on them."""

    tokenizer: PreTrainedTokenizerBase
    uses_template: bool
    """Whether rows are rendered with the chat template."""
    trains_all: bool
    """`data.train_on: all`: prompts are trained too."""

    @property
    def bos(self) -> list[int]:
        """The beginning-of-sequence token, or nothing where the tokenizer has none."""
        token: Any = self.tokenizer.bos_token_id
        return [] if token is None else [token]


def tokenize_rows(
    rows: list[Row], kind: Kind, tokenizer: PreTrainedTokenizerBase, data: DataSection, part: str
) -> Iterator[TokenizedRow | InputError]:
    """Yield the tokens of each row, or the error of a row that can't be used under `data.on_invalid_row: skip`.

    Args:
        rows: rows of the kind `kind`.
        kind: their kind.
        tokenizer: the model's tokenizer.
        data: the recipe's data section.
        part: what the rows are ("training rows"), for messages.

    Raises:
        InputError: the tokenizer lacks a chat template or an eos token; `data.template: none` with chats; or a row
            can't be used and `data.on_invalid_row` is error.
    """
    settings = _Settings(tokenizer, _uses_template(kind, tokenizer, data), data.train_on == "all")
    if not settings.uses_template and kind != "tokens" and tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no eos token to end a row with; set eos_token in its tokenizer_config.json")
    for number, row in enumerate(rows, start=1):
        try:
            yield _TOKENIZERS[kind](row, settings)
        except InputError as err:
            located = InputError(f"{row_location(rows, number, part)}: {err}")
            if data.on_invalid_row == "error":
                raise located from err
            yield located


def row_location(rows: list[Row], number: int, part: str) -> str:
    """Return where row `number` (from 1) is, for messages.

    The row's beginning is quoted, because after rows were held out the number isn't the line of a file.
    """
    return f"{part}: row {number} ({excerpt(rows[number - 1])})"


def _uses_template(kind: Kind, tokenizer: PreTrainedTokenizerBase, data: DataSection) -> bool:
    """Return whether rows are rendered with the chat template. Raises `InputError` if they must be and can't."""
    has_template = bool(tokenizer.chat_template)
    if kind == "chat" and data.template == "none":
        raise InputError("data.template: none can't join the turns of a chat; use auto or chat")
    wants_template = data.template == "chat" or (data.template == "auto" and has_template)
    uses_template = kind == "chat" or (kind == "prompt" and wants_template)
    if uses_template and not has_template:
        remedy = "set data.template: none, or " if kind == "prompt" else ""
        raise InputError(f"data.template: the tokenizer has no chat template; {remedy}use a model that has one")
    return uses_template


def _tokenize_prompt(row: Row, settings: _Settings) -> TokenizedRow:
    tokenizer = settings.tokenizer
    if settings.uses_template:
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        ids, is_completion = turn_tokens(tokenizer, turns)
    else:
        # Prompt and completion are tokenized separately, so that no token spans the border between them.
        prompt = [*settings.bos, *tokens_of(tokenizer, row["prompt"])]
        ids = [*prompt, *tokens_of(tokenizer, row["completion"]), tokenizer.eos_token_id]
        is_completion = [i >= len(prompt) for i in range(len(ids))]
    return _with_completion(ids, is_completion, settings)


def _tokenize_chat(row: Row, settings: _Settings) -> TokenizedRow:
    tokenizer = settings.tokenizer
    if settings.trains_all:
        ids = tokens_of(tokenizer, render(tokenizer, row["messages"], tools=row.get("tools")))
        return TokenizedRow(ids, [True] * len(ids))
    find_turns = marked_tokens if template_marks_assistant(tokenizer) else turn_tokens
    ids, is_completion = find_turns(tokenizer, row["messages"], row.get("tools"))
    return _with_completion(ids, is_completion, settings)


def _tokenize_text(row: Row, settings: _Settings) -> TokenizedRow:
    ids = [*settings.bos, *tokens_of(settings.tokenizer, row["text"]), settings.tokenizer.eos_token_id]
    return TokenizedRow(ids, [True] * len(ids))


def _tokenize_tokens(row: Row, settings: _Settings) -> TokenizedRow:
    ids, vocabulary = row["input_ids"], len(settings.tokenizer)
    if max(ids) >= vocabulary:
        raise InputError(
            f"input_ids: token {max(ids)} is outside the tokenizer's vocabulary of {vocabulary} entries; "
            "was the row made with another tokenizer?"
        )
    is_trained = [settings.trains_all or label != IGNORED for label in row["labels"]]
    return TokenizedRow(ids, is_trained, is_trained.index(True))


def _with_completion(ids: list[int], is_completion: list[bool], settings: _Settings) -> TokenizedRow:
    start = is_completion.index(True) if True in is_completion else 0
    return TokenizedRow(ids, [True] * len(ids) if settings.trains_all else is_completion, start)


_TOKENIZERS: dict[Kind, Callable[[Row, _Settings], TokenizedRow]] = {
    "prompt": _tokenize_prompt,
    "chat": _tokenize_chat,
    "text": _tokenize_text,
    "tokens": _tokenize_tokens,
}
