"""The table of row kinds agrees with the converters and the tokenization."""

from __future__ import annotations

from typing import Any

import pytest

from mla_tune.data.converters import CONVERTERS
from mla_tune.data.encode import encode
from mla_tune.data.row_kinds import ROW_KINDS, excerpt, kind_of
from tests.helpers.data import make_tokenizer, section

RAW: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": "the cat", "completion": "sat"},
    "alpaca": {"instruction": "the cat", "output": "sat"},
    "chat": {"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "sat"}]},
    "text": {"text": "the cat"},
    "tokens": {"input_ids": [5, 6, 7]},
}
TOOLS = [{"type": "function"}]


@pytest.mark.parametrize("format_name", CONVERTERS)
def test_each_format_gives_rows_with_the_keys_of_its_kind(format_name: str) -> None:
    kind, convert = CONVERTERS[format_name]
    for extra in ({}, {"tools": TOOLS}):
        row = convert(RAW[format_name] | extra, section())
        assert set(ROW_KINDS[kind].keys) <= set(row) <= {*ROW_KINDS[kind].keys, *ROW_KINDS[kind].optional_keys}
        assert kind_of(row) == kind
        assert excerpt(row) == ("3 tokens" if kind == "tokens" else "'the cat'")


def test_each_kind_has_a_format_and_can_be_encoded() -> None:
    assert {kind for kind, _ in CONVERTERS.values()} == set(ROW_KINDS)
    for format_name, (kind, convert) in CONVERTERS.items():
        encoded = encode([convert(RAW[format_name], section())], kind, make_tokenizer(), section(), 32)
        assert encoded.trained_tokens > 0


def test_first_keys_identify_kinds() -> None:
    for kind, description in ROW_KINDS.items():
        others = {key for other in ROW_KINDS if other != kind for key in ROW_KINDS[other].keys}
        assert description.keys[0] not in others
