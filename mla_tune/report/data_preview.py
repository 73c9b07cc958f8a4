"""`mla-tune data` as a person reads it."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from mla_tune.console import out

#: Characters of a sample that are shown; its middle is left out beyond that.
SHOWN = 1200


def print_preview(found: dict[str, Any]) -> None:
    """Samples, counts, histogram, packing, of `data.preview.view`."""
    colored = out.color_system is not None
    for source in found["sources_shown"]:
        for number, sample in enumerate(source["samples"], start=1):
            out.print(f"── {source['source']}, {source['kind']}, sample {number}", markup=False, style="bold")
            out.print(_text(sample, colored), soft_wrap=True)
    if any(s["samples"] for s in found["sources_shown"]):
        marks = "colored" if colored else "between ⟦ and ⟧"
        out.print(f"Trained tokens are {marks}.\n")
    for side, name in (("train", "train"), ("held_out", "held out")):
        if side in found:
            _print_counts(name + ", the stream's first" * (side == "train" and "streamed" in found), found[side])
    if "skipped" in found:
        out.print(f"left out: {found['skipped']['rows']} rows (data.on_invalid_row: skip)")
    for s in found.get("sources", []):
        share = s["used"] / found["train"]["used"]
        out.print(
            f"source {s['source']}: {s['used']:,} of an epoch's samples ({share:.1%}), {s['samples']:,} there",
            markup=False,
        )
    out.print(f"\nlengths in tokens (mean {found['mean']:,.0f}, longest {found['longest']:,})")
    _print_histogram(found["lengths"])
    p = found["packing"]
    if p["on"]:
        out.print(
            f"packing: {p['samples']:,} samples in {p['rows']:,} rows of {found['max_length']:,}, {p['filled']:.0%} "
            f"full; a row for each sample would be {p['filled_without']:.0%} full, with "
            f"{p['samples'] / p['rows']:.1f} times as many rows",
            soft_wrap=True,
        )
    else:
        out.print(f"packing: off; rows of {found['max_length']:,} tokens would be {p['filled']:.0%} full")


def _print_counts(name: str, d: dict[str, Any]) -> None:
    share = d["trained_tokens"] / d["tokens"] if d["tokens"] else 0
    words = [f"{d['samples']:,} samples in {d['rows']:,} rows, {d['tokens']:,} tokens, {share:.0%} of them trained"]
    for key, what in (
        ("truncated", "cut off"),
        ("split", "split"),
        ("untrained", "pieces without a trained token left out"),
        ("dropped", "left out as too long"),
    ):
        if d[key]:
            words.append(f"{d[key]:,} {what}")
    out.print(f"{name}: {', '.join(words)}", soft_wrap=True)


def _print_histogram(bars: list[dict[str, int]]) -> None:
    most = max(b["samples"] for b in bars)
    width = len(str(bars[-1]["to"]))
    for b in bars:
        bar = "█" * round(40 * b["samples"] / most) or ("▏" if b["samples"] else "")
        out.print(f"{b['from']:>{width}}–{b['to']:<{width}}  {bar} {b['samples']:,}", markup=False, highlight=False)


def _text(sample: list[dict[str, Any]], colored: bool) -> Text:
    text = Text()
    for span in sample:
        if colored:
            text.append(span["text"], style="black on green" if span["trained"] else "")
        else:
            text.append(f"⟦{span['text']}⟧" if span["trained"] else span["text"])
    if len(text) > SHOWN:
        half = SHOWN // 2
        text = Text.assemble(text[:half], (f" … {len(text) - SHOWN:,} characters … ", "dim"), text[-half:])
    return text
