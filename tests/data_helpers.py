"""A byte-level BPE tokenizer with the embedded model's special tokens and chat template, trained in a blink."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from mla_tune.recipe.schema import DataSection

ROOT = Path(__file__).resolve().parent.parent
# Border merges are what tests need: " the", "\n\n" and "ab" are tokens of their own here.
CORPUS = ["the cat sat on the mat.\n\nabab abba baab the end\n\n" * 20, "def f(x):\n    return x + 1\n" * 20]


@cache
def pretrain_script() -> Any:
    spec = importlib.util.spec_from_file_location("pretrain_tiny", ROOT / "scripts/pretrain_tiny.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_tokenizer(template: str | None = "embedded") -> Any:
    """`template`: the embedded model's, another, or None."""
    tokenizer = pretrain_script().train_tokenizer([("prose", text) for text in CORPUS], 320)
    if template != "embedded":
        tokenizer.chat_template = template
    return tokenizer


def section(**keys: Any) -> DataSection:
    return DataSection(**keys)


def no_marks(template: str) -> str:
    """The template without its {% generation %} marks, rendering the same text."""
    return template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
