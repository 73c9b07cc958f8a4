"""Tokenizers: which one a recipe's model has, and loading it."""

from __future__ import annotations

from typing import Any

from mla_tune.errors import FileError
from mla_tune.recipe.schema import ModelSection
from mla_tune.resources import EMBEDDED_MODEL


def tokenizer_source(section: ModelSection) -> str:
    """Folder or hub id; presets use the embedded model's tokenizer."""
    own = section.base if section.preset is None else None
    return str(EMBEDDED_MODEL) if own in (None, "embedded") else str(own)


def load_tokenizer(source: str, trust_remote_code: bool = False) -> Any:
    """A transformers tokenizer with a padding token (the end token where it has none of its own)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise FileError(f"{source}: no tokenizer that transformers can load ({first})") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
