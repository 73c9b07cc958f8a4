"""Render chats with a tokenizer's template, and find the tokens of the assistant's turns."""

from __future__ import annotations

import re
from itertools import takewhile
from typing import TYPE_CHECKING, Any, TypeAlias

from mla_tune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages: TypeAlias = list[dict[str, Any]]
Tools: TypeAlias = list[Any] | None

# The expression by which transformers itself decides whether a template marks the assistant's tokens.
_GENERATION = re.compile(r"\{\%-?\s*generation\s*-?\%\}")


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text as it stands: no bos, no eos, no warning about a long one."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def marks_assistant(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template says with `{% generation %}` which part is the assistant's."""
    return bool(_GENERATION.search(tokenizer.get_chat_template()))


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, generation_prompt: bool = False, tools: Tools = None
) -> str:
    """The chat as text, with the tools that it may call.

    Raises:
        InputError: the template refuses these messages.
    """
    return _apply(tokenizer, messages, tools, tokenize=False, add_generation_prompt=generation_prompt)


def marked_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools = None
) -> tuple[list[int], list[bool]]:
    """(ids, mask) of a chat; the mask is true inside the template's `{% generation %}` blocks."""
    out = _apply(tokenizer, messages, tools, return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False})
    return out["input_ids"], [bool(m) for m in out["assistant_masks"]]


def turn_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools = None
) -> tuple[list[int], list[bool]]:
    """(ids, mask) of a chat; the mask is true on the assistant's turns, each with its end token.

    For templates that don't mark them: a turn is what a longer chat has beyond the prompt before it.  A token that
    spans the border between prompt and turn belongs to the turn.

    Raises:
        InputError: the template rewrites earlier text when the chat goes on, or leaves out what the assistant said.
    """
    text = render(tokenizer, messages, tools=tools)
    ids = tokens_of(tokenizer, text)
    mask = [False] * len(ids)
    squeezed = "".join(text.split())
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if "".join(message["content"].split()) not in squeezed:
            raise InputError(
                f"the chat template leaves out a part of message {i + 1} (the assistant's), so it wouldn't be learned; "
                "many templates do that with reasoning before </think>: take it out of the rows, use another template, "
                "or (prompt and completion) set data.template: none"
            )
        start, end = _border(tokenizer, messages[:i], tools, text, ids, True), len(ids)
        if i + 1 < len(messages):
            end = _border(tokenizer, messages[: i + 1], tools, text, ids, False)
        mask[start:end] = [True] * (end - start)
    return ids, mask


def _border(
    tokenizer: PreTrainedTokenizerBase, head: Messages, tools: Tools, text: str, ids: list[int], prompt: bool
) -> int:
    """How many of `ids` the chat's beginning `head` takes up; `prompt`: with the header of the assistant's turn."""
    if not head:
        return 0
    opening = render(tokenizer, head, tools=tools)
    if not text.startswith(opening):
        raise InputError(
            f"the chat template renders the first {len(head)} messages otherwise once the chat goes on, so the "
            "assistant's tokens can't be told apart; mark them in the template with {% generation %}, set "
            "data.train_on: all, or (prompt and completion) data.template: none"
        )
    # A generation prompt may end in text that the finished turn lacks (an opened <think>): only what agrees counts.
    pairs = zip(tokens_of(tokenizer, render(tokenizer, head, True, tools) if prompt else opening), ids, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools, **kwargs: Any) -> Any:
    from jinja2 import TemplateError

    template = tokenizer.get_chat_template()
    calls = any(m.get("tool_calls") for m in messages)
    for word, asked in (("tools", bool(tools)), ("tool_calls", calls)):
        if asked and word not in template:
            raise InputError(
                f"the chat has {word}, of which the tokenizer's chat template knows nothing, so they wouldn't be "
                f"learned; use a template that renders them, or take them out of the rows"
            )
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, **kwargs)
    except TemplateError as err:
        roles = ", ".join(m["role"] for m in messages)
        raise InputError(
            f"the tokenizer's chat template refuses the messages ({roles}): {err}; change their order or roles, "
            "or use another template"
        ) from err
