"""The two streams of every command: results go to standard output, everything else to standard error."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from rich.console import Console

#: Results that a user asked for.
out = Console(highlight=False)
#: Progress, notes, warnings, errors.
err = Console(stderr=True, highlight=False)


def print_json(document: Any) -> None:
    """Print `document` as one JSON document on standard output."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def human_bytes(n: float) -> str:
    """Write a number of bytes for people, in powers of ten, with three significant digits: `1536` → `1.54 KB`."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(n) < 1000 or unit == "TB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.3g} {unit}" if n < 1000 else f"{n:,.0f} {unit}"
        n /= 1000
    raise AssertionError


def human_count(n: float) -> str:
    """Write a count for people: `671026404352` → `671.03 B`; `12800` → `12.8 K`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(n) >= size:
            return f"{n / size:,.2f}".rstrip("0").rstrip(".") + f" {unit}"
    return f"{n:,.0f}"


def hush_imports() -> None:
    """Silence bitsandbytes on import: it warns that the package `kernels` is missing, which nothing here needs.

    PEFT imports bitsandbytes whenever it is installed.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
