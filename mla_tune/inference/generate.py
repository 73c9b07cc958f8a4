"""`generate`: answer one prompt or many in one call, with merged or unmerged adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mla_tune.inference.requests import GenerateResult, GenerationSettings, Request
from mla_tune.inference.session import Session

#: A prompt as text, or the messages of a chat.
Prompt = str | list[dict[str, Any]]


def generate(
    model: str | Path,
    prompts: Prompt | Sequence[Prompt],
    *,
    adapters: Mapping[str, str | Path] | None = None,
    adapter: str | Sequence[str | None] | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    raw: bool = False,
    batch_size: int = 8,
    attention: str = "auto",
) -> list[GenerateResult]:
    """Answer prompts with attention in the latent space; return one result for each prompt, in their order.

    `model`: a model folder, a run folder (its merged model, else its base with its adapter), an adapter folder,
    "embedded", or a hub id.  `prompts`: a text, the messages of a chat (dictionaries with `role` and `content`), or a
    list of either.  `adapters`: names and folders of unmerged adapters to load.  `adapter`: the adapter that answers:
    one name for all prompts, or a list with one for each.  None is the model without an adapter; but if `adapter` is
    not given and exactly one adapter is loaded (from `model` or `adapters`), that one answers.

    `max_new_tokens`: maximum length of an answer.  `temperature`: 0 takes the most likely token; above 0, tokens are
    sampled with `seed` from the most likely ones that together have the probability `top_p`.  `raw`: do not apply the
    chat template.  `batch_size`: number of prompts answered at once.  `attention`: "auto", "absorbed" or "expanded", as
    for `mla_tune.absorb`.

    Raises `InputError` for an unknown adapter or a prompt that does not fit the model's window, `FileError` for a
    folder that is missing or damaged.
    """
    session = Session(str(model), {name: str(folder) for name, folder in (adapters or {}).items()}, attention)
    one_chat = isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], dict)
    prompt_list: list[Any] = [prompts] if isinstance(prompts, str) or one_chat else list(prompts)
    if adapter is None and len(session.adapters) == 1:
        adapter = session.adapters[0]
    names = [adapter] * len(prompt_list) if adapter is None or isinstance(adapter, str) else list(adapter)
    requests = [
        Request(prompt, adapter=name) if isinstance(prompt, str) else Request(messages=prompt, adapter=name)
        for prompt, name in zip(prompt_list, names, strict=True)
    ]
    settings = GenerationSettings(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, raw=raw, batch_size=batch_size
    )
    return session.answer(requests, settings)
