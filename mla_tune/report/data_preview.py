"""The text of `mla-tune data`: samples with the trained tokens marked, counts, a histogram of lengths, and packing."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from mla_tune.console import out

MAX_CHARACTERS = 1200
"""The most characters of a sample that are shown; the middle of a longer one is left out."""


def print_preview(found: dict[str, Any]) -> None:
    """Print the document that `data.preview.preview` returns."""
    colored = out.color_system is not None
    for source in found["sources_shown"]:
        for number, sample in enumerate(source["samples"], start=1):
            out.print(f"── {source['source']}, {source['kind']}, sample {number}", markup=False, style="bold")
            out.print(_marked_text(sample, colored), soft_wrap=True)
    if any(s["samples"] for s in found["sources_shown"]):
        marks = "colored" if colored else "between ⟦ and ⟧"
        out.print(f"Trained tokens are {marks}.\n")
    for side, name in (("train", "train"), ("held_out", "held out")):
        if side in found:
            _print_counts(name + ", first rows of the stream" * (side == "train" and "streamed" in found), found[side])
    if "skipped" in found:
        out.print(f"left out: {found['skipped']['rows']} rows (data.on_invalid_row: skip)")
    for s in found.get("sources", []):
        share = s["used"] / found["train"]["used"]
        out.print(
            f"source {s['source']}: {s['samples']:,} samples; an epoch has {s['used']:,} from it ({share:.1%})",
            markup=False,
        )
    out.print(f"\nlengths in tokens (mean {found['mean']:,.0f}, longest {found['longest']:,})")
    _print_histogram(found["lengths"])
    p = found["packing"]
    if p["on"]:
        out.print(
            f"packing: {p['samples']:,} samples in {p['rows']:,} rows of {found['max_length']:,} tokens, "
            f"{p['filled']:.0%} full; without packing {p['samples'] / p['rows']:.1f} times as many rows, "
            f"{p['filled_without']:.0%} full",
            soft_wrap=True,
        )
    else:
        out.print(f"packing: off; rows of {found['max_length']:,} tokens would be {p['filled']:.0%} full")


def _print_counts(name: str, counts: dict[str, Any]) -> None:
    """Print a line about the training rows or the held-out rows: samples, tokens, and what was cut or left out."""
    share = counts["trained_tokens"] / counts["tokens"] if counts["tokens"] else 0
    words = [
        f"{counts['samples']:,} samples in {counts['rows']:,} rows",
        f"{counts['tokens']:,} tokens, {share:.0%} of them trained",
    ]
    for key, noun, what in (
        ("truncated", "row", "cut off"),
        ("split", "row", "split"),
        ("untrained", "piece", "left out without a trained token"),
        ("dropped", "row", "left out as too long"),
    ):
        if counts[key]:
            words.append(f"{counts[key]:,} {noun}{'s' if counts[key] != 1 else ''} {what}")
    out.print(f"{name}: {', '.join(words)}", soft_wrap=True)


def _print_histogram(bars: list[dict[str, int]]) -> None:
    """Print a bar for each range of lengths; the longest bar has 40 characters."""
    most = max(b["samples"] for b in bars)
    width = len(str(bars[-1]["to"]))
    for b in bars:
        bar = "█" * round(40 * b["samples"] / most) or ("▏" if b["samples"] else "")
        out.print(f"{b['from']:>{width}}–{b['to']:<{width}}  {bar} {b['samples']:,}", markup=False, highlight=False)


def _marked_text(sample: list[dict[str, Any]], colored: bool) -> Text:
    """Return a sample's text with the trained parts on green, or without colors between ⟦ and ⟧."""
    text = Text()
    for span in sample:
        if colored:
            text.append(span["text"], style="black on green" if span["trained"] else "")
        else:
            text.append(f"⟦{span['text']}⟧" if span["trained"] else span["text"])
    if len(text) > MAX_CHARACTERS:
        half = MAX_CHARACTERS // 2
        left_out = len(text) - MAX_CHARACTERS
        text = Text.assemble(text[:half], (f" … {left_out:,} characters left out … ", "dim"), text[-half:])
    return text
