"""The text of `mla-tune merge-absorb` and `mla-tune verify`: the plan, the result, and what was proven.

Every function takes the document that `--json` prints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from mla_tune.console import human_bytes, human_count, out

#: Most tensors and files that are listed as wrong.
LISTED = 20


def print_merge_plan(plan: dict[str, Any]) -> None:
    """Print what a merge would do (`--dry-run`): files, bytes, memory, time."""

    def say(line: str) -> None:
        out.print(line, soft_wrap=True)

    names = ", ".join(_weighted(Path(a["path"]).name, a["weight"]) for a in plan["adapters"])
    say(f"{names} into {plan['model_type']} ({plan['base']})")
    roles = ", ".join(f"{role} {count:,}" for role, count in plan["roles"].items())
    say(f"changes  {plan['tensors_changed']:,} of {plan['tensors']:,} tensors: {roles}")
    say(f"files    {len(plan['files_written']):,} written, {len(plan['files_linked']):,} linked to the base's")
    total = f"{human_bytes(plan['bytes_total'])} in the output"
    if plan["absorbed_bytes"]:
        total += f", {human_bytes(plan['absorbed_bytes'])} of them absorbed tensors"
    say(f"bytes    {human_bytes(plan['bytes_read'])} read, {human_bytes(plan['bytes_written'])} written; {total}")
    memory = human_bytes(plan["memory"])
    say(f"memory   about {memory} for the merge; the proof adds 250 MB for torch, and a layer for the logits")
    say(f"time     about {_duration(plan['seconds'])} on a disk of {human_bytes(plan['disk_rate'])}/s")
    for line in plan["notes"]:
        say(f"note     {line}")
    say(f"output   {plan['output']}; nothing was read but headers, nothing was written")


def print_merge(result: dict[str, Any]) -> None:
    """Print the result of a merge: retention by role, the proof, and where the output lies."""
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
        if all(row["retained"] is None for row in result["roles"]):
            out.print("The adapter is zero: the merged model is the base.")
    for line in result["notes"]:
        out.print(f"note: {line}", soft_wrap=True)
    if result["proof"] is None:
        out.print("not proven (--no-verify): run `mla-tune verify` on the output", soft_wrap=True)
    else:
        print_proof(result["proof"], result["logits"])
    files = f"{human_bytes(result['bytes'])} of weights"
    if linked := result["files_linked"]:
        files += f" ({linked} of {linked + result['files_written']} files linked to the base's)"
    if result["absorbed"]:
        files += f", {human_bytes(result['absorbed']['bytes'])} absorbed"
    folder = Path(result["output"])
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    out.print(f"{files} in {shown}", soft_wrap=True)
    out.print(f'next: mla-tune generate {shown} --prompt "…"', soft_wrap=True)


def print_verification(result: dict[str, Any]) -> None:
    """Print the result of `verify`: the tensors and files that are wrong, or what was proven."""
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
    """Print what was proven and what the logits said (`ProofReport.to_json`, `LogitsReport.to_json`)."""
    near = "each the nearest to the exact sum" if proof["worst_ulp"] <= 0.5 else f"within {proof['worst_ulp']:.3g} ulp"
    _say(f"proven   {proof['recomputed']:,} tensors computed again, {human_count(proof['numbers'])} numbers, {near}")
    same = proof["same_files"]
    shared = f", {same:,} file{'s' * (same != 1)} shared with the base" if same else ""
    unchanged = f"{proof['unchanged']:,} tensors are the base's, byte for byte{shared}"
    if proof["absorbed"]:
        unchanged += f"; absorbed tensors of {proof['absorbed']:,} modules follow from what was written"
    _say(f"         {unchanged}")
    if logits is None:
        _say("logits   not compared (--no-logits)")
        return
    if not logits["ran"]:
        _say(f"logits   not compared: {logits['reason']}")
        return
    for i, c in enumerate(c for c in (logits["merged"], logits["absorbed"]) if c is not None):
        error = f"off by at most {c['max_error']:.2g} of {c['largest']:.3g}"
        figures = f"{error}, KL {c['kl']:.2g}, top-1 {c['top1']:.1%}"
        _say(f"{'' if i else 'logits':8} {c['reference']} → {c['other']}: {figures}")
    if logits["merged"] is not None and logits["merged"]["top1"] < 0.99:
        _say("         rounding moves logits, most where a router's choice tips over: the numbers are the proof")
    if logits["idle"]:
        _say("         the adapter changes no logit: these can't tell a merge from none")
    if logits["reason"]:
        _say(f"         not everything was compared: {logits['reason']}")


def _weighted(name: str, weight: float) -> str:
    return name if weight == 1 else f"{name} × {weight:g}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _share(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}%}"


def _say(line: str) -> None:
    """Print a label of 9 columns and a text, which wraps below itself where the terminal is narrow."""
    if not out.is_terminal:
        out.print(escape(line), soft_wrap=True)
        return
    grid = Table.grid()
    grid.add_column(width=9)
    grid.add_column()
    grid.add_row(line[:9], escape(line[9:]))
    out.print(grid)
