"""Find and load the tokenizer of a recipe's model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mla_tune.errors import FileError, InputError
from mla_tune.recipe.schema import ModelSection
from mla_tune.resources import EMBEDDED_MODEL


def tokenizer_source(section: ModelSection) -> str:
    """The folder or hub id of the tokenizer; presets use the embedded model's.

    Raises `InputError` for a model of which mla-tune knows the config.json only (`deepseek-v3`).
    """
    own = section.base if section.preset is None else None
    if own is None or own == "embedded":
        return str(EMBEDDED_MODEL)
    if "/" not in own and not Path(own).expanduser().exists():
        raise InputError(
            f"model.base: of '{own}' only the config.json is known here, without weights or tokenizer: enough for "
            "inspect and `plan --no-data`. To train, give the folder or the hub id of the checkpoint"
        )
    return own


def load_tokenizer(source: str, trust_remote_code: bool = False) -> Any:
    """Load a tokenizer with transformers.  One without a padding token pads with the end token.

    Raises `FileError` where transformers can't load it.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # damaged files make transformers and tokenizers raise errors of any class
        first = next(iter(str(error).strip().splitlines()), "")
        why = first if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {first}"
        raise FileError(f"{source}: no tokenizer that transformers can load ({why[:300]})") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
