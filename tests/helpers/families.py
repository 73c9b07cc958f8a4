"""Checkpoints of the tiny families for whole commands: weights as transformers saves them, and a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.helpers.tiny_families import VOCABULARY, tiny

_CHARACTERS = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'-()\n"


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, of the tiny families' vocabulary."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *_CHARACTERS]
    assert len(words) <= VOCABULARY
    model = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = Split("", "isolated")  # type: ignore[assignment]
    model.decoder = decoders.Fuse()  # type: ignore[assignment]
    model.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def checkpoint(name: str, folder: Path, seed: int = 0) -> Path:
    """A folder with the tiny family `name` in its own names on disk, and a tokenizer."""
    tiny(name, seed=seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def rows(file: Path, count: int = 12) -> Path:
    """A data set of `count` short rows."""
    lines = [
        json.dumps({"text": f"Row {i} of {count}: the quick brown fox jumps, {i * 7} times."}) for i in range(count)
    ]
    file.write_text("\n".join(lines))
    return file
