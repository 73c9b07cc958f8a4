"""The four kinds of rows."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

Kind: TypeAlias = Literal["prompt", "chat", "text", "tokens"]
Row: TypeAlias = dict[str, Any]

IGNORED = -100
"""The label of a token that doesn't count."""
