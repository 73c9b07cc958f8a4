"""The content of `mla-tune data`: samples as text with the trained parts marked, lengths, and packing."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from mla_tune.data.encode import Sample
from mla_tune.data.packing import packing_report
from mla_tune.data.prepare import Prepared
from mla_tune.data.row_kinds import IGNORED
from mla_tune.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BARS = 10
"""Bars of the histogram."""


def preview(prepared: Prepared, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, shown: int) -> dict[str, Any]:
    """Return the document that `mla-tune data --json` prints.

    It holds the counts of `Prepared.summary`, the first `shown` samples of each source as `[{"text", "trained"}, …]`, a
    histogram of lengths in tokens, and how many rows packing makes of the samples.
    """
    length = recipe.train.max_length
    shown_sources = []
    for source in prepared.sources:
        samples = source.train.samples
        shown_sources.append(
            {
                "source": source.rows.source,
                "kind": source.rows.kind,
                "samples": [spans(sample, tokenizer) for sample in samples[:shown]],
            }
        )
    lengths = [len(s.input_ids) for source in prepared.sources for s in source.train.samples]
    rows = prepared.count("train")
    report = packing_report(lengths, rows, length)
    return {
        **prepared.summary(),
        "sources_shown": shown_sources,
        "max_length": length,
        "lengths": histogram(lengths, length),
        "longest": max(lengths),
        "mean": sum(lengths) / len(lengths),
        "packing": {
            "on": recipe.train.packing,
            "samples": report.samples,
            "rows": rows,
            "filled_without": report.fill_before,
            "filled": report.fill if recipe.train.packing else report.fill_before,
        },
    }


def spans(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Return a sample's text, divided into stretches of trained and of untrained tokens.

    A character whose tokens lie in two stretches appears as U+FFFD in both.
    """
    pairs = zip(sample.input_ids, (label != IGNORED for label in sample.labels), strict=True)
    found = []
    for trained, group in groupby(pairs, key=lambda pair: pair[1]):
        ids = [i for i, _ in group]
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        found.append({"text": text, "trained": trained})
    return found


def histogram(lengths: list[int], longest: int) -> list[dict[str, int]]:
    """Return how many samples have `from` to `to` tokens, both included, for `BARS` ranges of equal width.

    The ranges cover 1 to `longest`.
    """
    width = -(-longest // BARS)
    counts = [0] * BARS
    for n in lengths:
        counts[min((n - 1) // width, BARS - 1)] += 1
    return [
        {"from": i * width + 1, "to": min((i + 1) * width, longest), "samples": c}
        for i, c in enumerate(counts)
        if i * width < longest
    ]
