"""Tokenizers: which one a recipe's model has, and loading it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mla_tune.errors import FileError, InputError
from mla_tune.recipe.schema import ModelSection
from mla_tune.resources import EMBEDDED_MODEL


def tokenizer_source(section: ModelSection) -> str:
    """Folder or hub id; presets use the embedded model's tokenizer.

    Raises `InputError` for a name that stands for published facts without weights (`deepseek-v3`).
    """
    own = section.base if section.preset is None else None
    if own is None or own == "embedded":
        return str(EMBEDDED_MODEL)
    if "/" not in own and not Path(own).expanduser().exists():
        raise InputError(
            f"model.base: '{own}' is known by its config.json alone, without weights or tokenizer: enough for inspect "
            f"and `plan --no-data`. To train, give the folder or the hub id of the checkpoint"
        )
    return own


def load_tokenizer(source: str, trust_remote_code: bool = False) -> Any:
    """A transformers tokenizer with a padding token (the end token where it has none of its own)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # of damaged files transformers and tokenizers let whatever they run into pass
        first = next(iter(str(error).strip().splitlines()), "")
        why = first if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {first}"
        raise FileError(f"{source}: no tokenizer that transformers can load ({why[:300]})") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
