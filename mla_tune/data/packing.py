"""Pack samples of different lengths into rows of one length, by best-fit decreasing.

Samples are placed in order of decreasing length. Each goes into the open row with the least free space that still holds
it, else into a new row. This needs at most 11/9 of the smallest possible number of rows, plus four (Johnson, Demers,
Ullman, Garey, Graham 1974, "Worst-case performance bounds for simple one-dimensional packing algorithms").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mla_tune.errors import InputError


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Return rows, each a list of indices of samples. Indices rise within a row, and rows are sorted by first index.

    Open rows are grouped by their free space. Bit s of the integer `spaces` is set if a row with s free tokens is open,
    so the best fit is the lowest set bit at or above the sample's length: O(n · max_length / 64) with a very small
    constant.

    Args:
        lengths: tokens of each sample, 1 to `max_length`.
        max_length: the most tokens of a row.

    Raises:
        InputError: a sample is empty or longer than a row.
    """
    for i, length in enumerate(lengths):
        if not 0 < length <= max_length:
            raise InputError(f"sample {i} has {length} tokens; a row takes 1 to {max_length}")
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(max_length)]  # free tokens → indices into rows
    spaces = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[i]
        fits = spaces >> length
        if fits:
            space = length + (fits & -fits).bit_length() - 1
            row = open_rows[space].pop()
            if not open_rows[space]:
                spaces ^= 1 << space
            rows[row].append(i)
        else:
            space, row = max_length, len(rows)
            rows.append([i])
        if left := space - length:
            open_rows[left].append(row)
            spaces |= 1 << left
    return sorted(sorted(row) for row in rows)


@dataclass(frozen=True)
class PackingReport:
    """How full rows are without packing and with it."""

    samples: int
    """Rows without packing."""
    rows: int
    """Rows with packing."""
    fill_before: float
    """Share of tokens that aren't padding if each sample had a row of `max_length` tokens to itself."""
    fill: float
    """Share of tokens that aren't padding in the packed rows."""


def packing_report(lengths: Sequence[int], rows: int, max_length: int) -> PackingReport:
    """Return the report for `rows` rows of `max_length` tokens that hold samples of these lengths."""
    tokens = sum(lengths)
    fill_before, fill = (tokens / (n * max_length) if n else 0.0 for n in (len(lengths), rows))
    return PackingReport(len(lengths), rows, fill_before, fill)
