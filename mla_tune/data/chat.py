"""Render chats with a tokenizer's chat template, and find the tokens of the assistant's turns."""

from __future__ import annotations

import re
from itertools import takewhile
from typing import TYPE_CHECKING, Any, TypeAlias

from mla_tune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages: TypeAlias = list[dict[str, Any]]
"""The turns of a chat, each with `role` and `content`."""
Tools: TypeAlias = list[Any] | None
"""JSON schemas of the tools that a chat may call."""

# transformers decides with this same expression whether a template marks the assistant's tokens.
_GENERATION = re.compile(r"\{\%-?\s*generation\s*-?\%\}")


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text, without bos or eos. A long text causes no warning."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def template_marks_assistant(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template marks the assistant's tokens with `{% generation %}`."""
    return bool(_GENERATION.search(tokenizer.get_chat_template()))


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, generation_prompt: bool = False, tools: Tools = None
) -> str:
    """Return a chat as text, rendered with the chat template.

    Args:
        tokenizer: the tokenizer with the template.
        messages: the turns.
        generation_prompt: end the text with the header of the assistant's next turn.
        tools: the tools that the chat may call.

    Raises:
        InputError: the template refuses these messages, or doesn't render the tools.
    """
    return _apply_template(tokenizer, messages, tools, tokenize=False, add_generation_prompt=generation_prompt)


def marked_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools = None
) -> tuple[list[int], list[bool]]:
    """Return (ids, mask) of a chat whose template marks the assistant's tokens.

    The mask is true inside the template's `{% generation %}` blocks. Raises `InputError` as `render` does.
    """
    out = _apply_template(
        tokenizer, messages, tools, return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False}
    )
    return out["input_ids"], [bool(m) for m in out["assistant_masks"]]


def turn_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools = None
) -> tuple[list[int], list[bool]]:
    """Return (ids, mask) of a chat whose template has no marks; the mask is true on the assistant's turns.

    A turn begins where the rendered messages before it (with a generation prompt) end, and ends where the rendered
    messages up to and including it end, so it includes its end token. A token that spans the border between prompt and
    turn belongs to the turn.

    Raises:
        InputError: the template renders earlier messages differently once the chat continues, it leaves out a part of
            what the assistant said, or it refuses the messages.
    """
    text = render(tokenizer, messages, tools=tools)
    ids = tokens_of(tokenizer, text)
    mask = [False] * len(ids)
    text_without_spaces = "".join(text.split())
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if "".join(message["content"].split()) not in text_without_spaces:
            raise InputError(
                f"the chat template leaves out a part of message {i + 1} (the assistant's), so it wouldn't be learned; "
                "many templates leave out the reasoning before </think>: remove it from the rows, use another "
                "template, or (prompt and completion) set data.template: none"
            )
        start = _prefix_length(tokenizer, messages[:i], tools, text, ids, generation_prompt=True)
        end = len(ids)
        if i + 1 < len(messages):
            end = _prefix_length(tokenizer, messages[: i + 1], tools, text, ids, generation_prompt=False)
        mask[start:end] = [True] * (end - start)
    return ids, mask


def _prefix_length(
    tokenizer: PreTrainedTokenizerBase,
    prefix: Messages,
    tools: Tools,
    text: str,
    ids: list[int],
    *,
    generation_prompt: bool,
) -> int:
    """Return how many of the chat's `ids` belong to its first messages, `prefix`.

    `text` is the whole rendered chat. With `generation_prompt` the header of the assistant's turn belongs to them too.
    Raises `InputError` if the text of `prefix` is no prefix of `text`.
    """
    if not prefix:
        return 0
    prefix_text = render(tokenizer, prefix, tools=tools)
    if not text.startswith(prefix_text):
        raise InputError(
            f"the chat template renders the first {len(prefix)} messages otherwise once the chat continues, so the "
            "assistant's tokens can't be found; mark them in the template with {% generation %}, set "
            "data.train_on: all, or (prompt and completion) data.template: none"
        )
    if generation_prompt:
        # It may end in text that the finished turn lacks (an opened <think>): count only the tokens that agree.
        prefix_text = render(tokenizer, prefix, generation_prompt=True, tools=tools)
    pairs = zip(tokens_of(tokenizer, prefix_text), ids, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools, **kwargs: Any) -> Any:
    """Call `tokenizer.apply_chat_template`.

    Raises `InputError` if the template refuses the messages, or ignores tools or tool calls that they have.
    """
    from jinja2 import TemplateError

    template = tokenizer.get_chat_template()
    has_calls = any(m.get("tool_calls") for m in messages)
    for word, is_used in (("tools", bool(tools)), ("tool_calls", has_calls)):
        if is_used and word not in template:
            raise InputError(
                f"the chat has {word}, which the tokenizer's chat template doesn't render, so they wouldn't be "
                "learned; use a template that renders them, or remove them from the rows"
            )
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, **kwargs)
    except TemplateError as err:
        roles = ", ".join(m["role"] for m in messages)
        raise InputError(
            f"the tokenizer's chat template refuses the messages ({roles}): {err}; change their order or roles, "
            "or use another template"
        ) from err
