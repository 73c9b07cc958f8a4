"""What `mla-tune merge-absorb` and `mla-tune verify` print: the plan, the result, and what was proven.

Every function takes the document that `--json` prints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from mla_tune.console import human_bytes, human_count, out

#: At most so many wrong tensors and files are listed.
LISTED = 20
#: Columns of the labels before the lines on the proof.
_LABEL_WIDTH = 10


def print_merge_plan(plan: dict[str, Any]) -> None:
    """Print what a merge would do (`--dry-run`): tensors, files, bytes, memory and time."""

    def say(line: str) -> None:
        out.print(line, soft_wrap=True)

    names = ", ".join(_weighted(Path(a["path"]).name, a["weight"]) for a in plan["adapters"])
    say(f"{names} merged into {plan['model_type']} ({plan['base']})")
    roles = ", ".join(f"{role} {count:,}" for role, count in plan["roles"].items())
    say(f"changes  {plan['tensors_changed']:,} of {plan['tensors']:,} tensors: {roles}")
    say(f"files    {len(plan['files_written']):,} written, {len(plan['files_linked']):,} shared with the base")
    total = f"{human_bytes(plan['bytes_total'])} in the output"
    if plan["absorbed_bytes"]:
        total += f", {human_bytes(plan['absorbed_bytes'])} of it absorbed tensors"
    say(f"bytes    {human_bytes(plan['bytes_read'])} read, {human_bytes(plan['bytes_written'])} written; {total}")
    memory = human_bytes(plan["memory"])
    say(f"memory   about {memory} for the merge; the proof adds 250 MB (torch) and, for logits, one layer")
    say(f"time     about {_duration(plan['seconds'])} on a disk of {human_bytes(plan['disk_rate'])}/s")
    for line in plan["notes"]:
        say(f"note     {line}")
    say(f"output   {plan['output']}; dry run: read headers only, wrote nothing")


def print_merge(result: dict[str, Any]) -> None:
    """Print the result of a merge: how much of the change survived rounding, the proof, and where the output is."""
    methods = " + ".join(
        a["method"] if a["weight"] == 1 else f"{a['weight']:g} × {a['method']}" for a in result["adapters"]
    )
    table = Table(title=f"{methods} merged into {result['model_type']}, {result['dtype']}", title_justify="left")
    table.add_column("role")
    for name in ("matrices", "tensors", "‖Δ‖/‖W‖", "retained", "least", "cosine"):
        table.add_column(name, justify="right")
    for row in result["roles"]:
        shares = (_share(row["relative"], 2), _share(row["retained"], 1), _share(row["least"], 1))
        cosine = "–" if row["cosine"] is None else f"{row['cosine']:.4f}"
        table.add_row(row["role"], f"{row['matrices']:,}", f"{row['tensors']:,}", *shares, cosine)
    if result["roles"]:
        out.print(table)
        out.print("retained: share of the change Δ that survives rounding; least: of one tensor", soft_wrap=True)
        if all(row["retained"] is None for row in result["roles"]):
            out.print("The adapter is zero: the merged model is the base.")
    for line in result["notes"]:
        out.print(f"note: {line}", soft_wrap=True)
    if result["proof"] is None:
        out.print("not proven (--no-verify): run `mla-tune verify` on the output", soft_wrap=True)
    else:
        print_proof(result["proof"], result["logits"])
    size = f"{human_bytes(result['bytes'])} of weights"
    if linked := result["files_linked"]:
        size += f" ({linked} of {linked + result['files_written']} files shared with the base)"
    if result["absorbed"]:
        size += f", {human_bytes(result['absorbed']['bytes'])} of absorbed tensors"
    folder = Path(result["output"])
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    out.print(f"wrote {shown}: {size}", soft_wrap=True)
    out.print(f'next: mla-tune generate {shown} --prompt "…"', soft_wrap=True)


def print_verification(result: dict[str, Any]) -> None:
    """Print the result of `verify`: what was proven, or a table of the tensors and files that are wrong."""
    names = ", ".join(_weighted(Path(a["path"]).name, a["weight"]) for a in result["adapters"])
    out.print(escape(f"{result['output']}: {names} merged into {result['base']}"), soft_wrap=True)
    for note in result["notes"]:
        out.print(escape(f"note: {note}"), soft_wrap=True)
    proof = result["proof"]
    if not proof["failed"]:
        print_proof(proof, result["logits"])
        return
    table = Table(box=SIMPLE_HEAD)
    table.add_column("tensor or file", no_wrap=True)
    table.add_column("what is wrong")
    for failure in proof["failures"][:LISTED]:
        table.add_row(escape(failure["key"]), escape(failure["what"]))
    out.print(table)
    if proof["failed"] > LISTED:
        out.print(f"and {proof['failed'] - LISTED:,} more")


def print_proof(proof: dict[str, Any], logits: dict[str, Any] | None) -> None:
    """Print what was proven (`ProofReport.to_json`) and what the logits showed (`LogitsReport.to_json`)."""
    out.print("proven by reading the output again and comparing it with base and adapter:", soft_wrap=True)
    if proof["worst_ulp"] <= 0.5:
        result = "each is base + adapter, rounded to nearest"
    else:
        result = f"each within {proof['worst_ulp']:.3g} ulp of base + adapter"
    _say("changed", f"{_count(proof['recomputed'], 'tensor')}, {human_count(proof['numbers'])} numbers: {result}")
    files = f"; {_count(proof['same_files'], 'file')} shared" if proof["same_files"] else ""
    _say("unchanged", f"{_count(proof['unchanged'], 'tensor')}: each equals the base's, byte for byte{files}")
    if proof["absorbed"]:
        modules = _count(proof["absorbed"], "attention module")
        _say("absorbed", f"{modules}: tensors match the merged weights they come from")
    _print_logits(logits)


def _print_logits(logits: dict[str, Any] | None) -> None:
    if logits is None:
        _say("logits", "not compared (--no-logits)")
        return
    if not logits["ran"]:
        _say("logits", f"not compared: {logits['reason']}")
        return
    pairs = {
        "base + adapter (PEFT) vs merged": logits["merged"],
        "merged vs absorbed attention": logits["absorbed"],
    }
    label = "logits"
    for pair, found in pairs.items():
        if found is None:
            continue
        tokens, error = logits["tokens"], f"{found['max_error']:.2g} (largest logit {found['largest']:.3g})"
        _say(label, f"{pair}: same top token {found['top1'] * tokens:.0f} of {tokens} times;")
        _say("", f"largest difference {error}, KL divergence {found['kl']:.2g}")
        label = ""
    if logits["merged"] is not None and logits["merged"]["top1"] < 0.99:
        _say("", "Rounded weights change logits a little, most where a router picks another expert.")
        _say("", "The proof is in the numbers compared above, not in the logits.")
    if logits["idle"]:
        _say("", "The adapter changes no logit, so this comparison can't tell whether it was merged.")
    if logits["reason"]:
        _say("", f"Not everything was compared: {logits['reason']}")


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


def _weighted(name: str, weight: float) -> str:
    return name if weight == 1 else f"{name} × {weight:g}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _share(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}%}"


def _say(label: str, text: str) -> None:
    """Print a label and a text in two columns; on a terminal the text wraps within its column."""
    if not out.is_terminal:
        out.print(escape(f"{label:{_LABEL_WIDTH}}{text}"), soft_wrap=True)
        return
    grid = Table.grid()
    grid.add_column(width=_LABEL_WIDTH)
    grid.add_column()
    grid.add_row(label, escape(text))
    out.print(grid)
