"""Let the model answer a few held-out prompts, before and after training, for report.html.

Decoding is greedy, one prompt at a time.  The training does not change: no random number is drawn, modes and attention
are restored, and a run with samples is bit-equal to one without.  All processes of a run have to take part, since a
sharded model gathers its weights in every forward pass.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mla_tune.data.chat import render, tokens_of
from mla_tune.data.row_kinds import IGNORED, Row
from mla_tune.errors import InputError
from mla_tune.model.load import DTYPES, Loaded
from mla_tune.recipe.schema import Recipe

#: The most tokens of an answer.
NEW_TOKENS = 64
#: The most tokens of a prompt; longer ones are passed over, so that answers take little time of a short run.
LONGEST = 1024


@dataclass(frozen=True, slots=True)
class SamplePrompt:
    """A held-out prompt."""

    #: The tokens that the model gets.
    ids: list[int]
    #: The prompt as text, for the report.
    prompt: str
    #: What the row says comes next.
    reference: str


def sample_prompts(recipe: Recipe, rows: list[Row], tokenizer: Any, window: int | None) -> list[SamplePrompt]:
    """Return the prompts of the first `output.samples` rows that leave room for an answer.

    `window` is the number of positions that the model has; None: no bound.
    """
    room = min(LONGEST, (window or LONGEST + NEW_TOKENS) - NEW_TOKENS)
    found: list[SamplePrompt] = []
    for row in rows:
        if len(found) == recipe.output.samples:
            break
        question = prompt_of_row(row, tokenizer, recipe.data.template)
        if question is not None and len(question.ids) <= room:
            found.append(question)
    return found


def prompt_of_row(row: Row, tokenizer: Any, template: str) -> SamplePrompt | None:
    """Return the prompt of a row: a chat up to the assistant's last turn, the first half of a text, or the tokens
    before the first trained one.

    None for a row without a prompt: a chat without an assistant's turn, or a text of one token.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if "messages" in row:
        turns: list[dict[str, Any]] = row["messages"]
        last = max((i for i, m in enumerate(turns) if m["role"] == "assistant"), default=0)
        if not last:
            return None
        shown = "\n\n".join(f"{m['role']}: {m['content']}" for m in turns[:last])
        return _rendered(tokenizer, turns[:last], shown, turns[last]["content"], row.get("tools"))
    if "prompt" in row:
        if template == "chat" or (template == "auto" and tokenizer.chat_template):
            return _rendered(tokenizer, [{"role": "user", "content": row["prompt"]}], row["prompt"], row["completion"])
        ids = [*bos, *tokens_of(tokenizer, row["prompt"])]
        return SamplePrompt(ids, row["prompt"], row["completion"]) if ids else None
    if "input_ids" in row:
        ids, labels = list(row["input_ids"]), row.get("labels")
        half = next((i for i, label in enumerate(labels) if label != IGNORED), 0) if labels else 0
        bos, half = [], half if half > 1 else min(len(ids) // 2, LONGEST // 4)
    else:
        ids = tokens_of(tokenizer, row["text"])
        half = min(len(ids) // 2, LONGEST // 4)
    if not half:
        return None
    prompt, reference = tokenizer.decode(ids[:half]), tokenizer.decode(ids[half : half + NEW_TOKENS])
    return SamplePrompt([*bos, *ids[:half]], prompt, reference)


def _rendered(
    tokenizer: Any, turns: list[dict[str, Any]], prompt: str, reference: str, tools: Any = None
) -> SamplePrompt | None:
    try:
        text = render(tokenizer, turns, generation_prompt=True, tools=tools)
    except InputError:  # a template that takes whole chats only
        return None
    return SamplePrompt(tokens_of(tokenizer, text), prompt, reference)


def answer_prompts(model: Any, loaded: Loaded, tokenizer: Any, asked: list[SamplePrompt]) -> tuple[list[str], float]:
    """Return an answer of at most `NEW_TOKENS` tokens to each prompt, and the seconds that all took."""
    began = time.monotonic()
    ends = _ends(loaded.model, tokenizer)
    with _as_for_reading(model):
        texts = [tokenizer.decode(_greedy(model, q.ids, ends, loaded), skip_special_tokens=True) for q in asked]
    return texts, round(time.monotonic() - began, 2)


def _greedy(model: Any, ids: list[int], ends: set[int], loaded: Loaded) -> list[int]:
    past, new = None, list(ids)
    answered: list[int] = []
    while len(answered) < NEW_TOKENS:
        with torch.autocast(loaded.device.type, DTYPES[loaded.dtype], enabled=loaded.dtype != "float32"):
            out = model(input_ids=torch.tensor([new], device=loaded.device), past_key_values=past, use_cache=True)
        token = int(out.logits[0, -1].argmax())
        if token in ends:
            break
        answered.append(token)
        past, new = out.past_key_values, [token]
    return answered


def _ends(model: Any, tokenizer: Any) -> set[int]:
    said = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return {t for t in [tokenizer.eos_token_id, *(said if isinstance(said, list) else [said])] if t is not None}


@contextmanager
def _as_for_reading(model: Any) -> Iterator[None]:
    """Within this context the model generates: eval mode, no gradient, nothing compiled, attention with a cache.

    The packed attention has none: it needs the borders of samples.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    modes = {module: module.training for module in model.modules()}
    attention = base.config.get_text_config()._attn_implementation
    try:
        model.eval()
        if attention != "eager":
            base.set_attn_implementation("sdpa")
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        base.set_attn_implementation(attention)
        for module, training in modes.items():
            module.training = training
