"""report.html and loss.png of a run; the page is one file that needs no network and no script."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from mla_tune.checkpoint.atomic_files import replacing
from mla_tune.console import human_bytes, human_count
from mla_tune.report.commands import commands, working_folder
from mla_tune.runs.folder import RunFolder
from mla_tune.runs.metrics import Curves, read_curves
from mla_tune.runs.record import RunRecord, TrainedParameters

TEMPLATE = Path(__file__).with_name("report.html.jinja")
#: Rows of the table of skipped steps; the rest is counted.
LISTED = 20


def write_report(folder: RunFolder, record: RunRecord) -> None:
    """Write report.html and, if a step was logged, loss.png into a run folder.

    `record` are the contents of run.json; the curves are read from metrics.jsonl.

    Raises `OSError` where they can't be written.
    """
    from mla_tune.report.plots import plot_run

    picture = None
    try:
        plot_run(folder.metrics, folder.plot, record)
        picture = base64.b64encode(folder.plot.read_bytes()).decode()
    except ValueError:  # stopped before the first step
        folder.plot.unlink(missing_ok=True)
    with replacing(folder.report) as stream:
        stream.write(render(folder.root, record, read_curves(folder.metrics), picture).encode())


def render(root: Path, record: RunRecord, curves: Curves, picture: str | None) -> str:
    """Return the HTML page; `picture` is loss.png in base64, or None where no step was logged."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=root.resolve().name,
        state=record.state,
        error=record.error,
        summary=summary(record, curves),
        roles=role_rows(record),
        trained=record.adapter,
        picture=picture,
        samples=record.samples,
        data=data_rows(record),
        source=(record.data or {}).get("source"),
        spikes=[
            {"step": step, "loss": _short(loss), "norm": _short(norm), "cut": dict(curves.cuts).get(step)}
            for step, loss, norm in curves.spikes[:LISTED]
        ],
        more_spikes=max(0, curves.skipped - LISTED),
        skipped=curves.skipped,
        environment=list(record.environment.items()),
        kernels=list((record.kernels or {}).items()),
        cd=working_folder(record),
        commands=commands(root, record),
    )


def summary(record: RunRecord, curves: Curves) -> list[tuple[str, str]]:
    """List pairs (what, figure) on the whole run, for the first table of the page."""
    found: list[tuple[str, str]] = []
    loss = record.held_out_loss
    if loss is not None and loss.before is not None:
        text = f"{loss.before:.4f} before training"
        if loss.after is not None:
            text = f"{loss.before:.4f} → {loss.after:.4f} ({(loss.after / loss.before - 1) * 100:+.1f} %)"
        found.append(("held-out loss", f"{text}, nats a token"))
    else:
        found.append(("held-out loss", "no rows were held out"))
    if curves.best and len(curves.held_out) > 1:
        found.append(("lowest held-out loss", f"{curves.best[1]:.4f} at step {curves.best[0]:,}"))
    done = max(record.steps.done, curves.steps)
    planned = f" of {record.steps.planned:,} planned" if (record.steps.planned or 0) > done else ""
    early = ", stopped early" if record.stopped_early and record.state == "done" else ""
    found.append(("steps", f"{done:,}{planned}{early}"))
    if record.seconds:
        found.append(("time", f"{record.seconds:,.0f} s, {record.tokens_per_s or 0:,.0f} tokens/s"))
    if curves.skipped:
        found.append(("spikes", f"{curves.skipped:,} steps skipped, {len(curves.cuts):,} cuts of the learning rate"))
    if record.adapter is not None:
        method = "every weight" if record.adapter.method == "none" else record.adapter.method
        found.append(("trained", f"{human_count(record.adapter.trainable_params)} parameters, {method}"))
    found.append(("base model", f"{record.base or '?'} ({record.model_type or '?'})"))
    found.append(("device", f"{record.device or '?'}, {record.dtype or '?'}"))
    found.append(("seed", "?" if record.seed is None else str(record.seed)))
    if record.memory is not None:
        found.append(("memory of the run", human_bytes(record.memory.run_peak)))
    if curves.broken:
        found.append(("metrics.jsonl", f"{curves.broken:,} lines can't be read and are left out"))
    return found


def role_rows(record: RunRecord) -> list[dict[str, str]]:
    """Return a row for each role: matrices, rank, parameters, peak learning rate (two with LoRA+: A and B)."""
    trained = record.adapter or TrainedParameters()
    rates = trained.learning_rate
    found = []
    for role, count in trained.matrices.items():
        rate = f"{rates[role]:.2e}" if role in rates else ""
        if f"{role}.B" in rates:
            rate = f"A {rates[f'{role}.A']:.2e}, B {rates[f'{role}.B']:.2e}"
        found.append(
            {
                "role": role,
                "matrices": f"{count:,}",
                "rank": str(trained.ranks.get(role, "")),
                "params": f"{trained.params.get(role, 0):,}",
                "rate": rate,
            }
        )
    whole: dict[str, list[int]] = {}
    for path, count in trained.modules_to_save.items():
        whole.setdefault(path.rpartition(".")[2], []).append(count)
    for name, counts in whole.items():
        found.append(
            {
                "role": name,
                "matrices": f"{len(counts):,}",
                "rank": "whole",
                "params": f"{sum(counts):,}",
                "rate": f"{rates[name]:.2e}" if name in rates else "",
            }
        )
    return found


def data_rows(record: RunRecord) -> list[dict[str, Any]]:
    """Return a row for each side of the data, training and held out."""
    data = record.data or {}
    return [
        {"side": name, **data[side]} for side, name in (("train", "training"), ("held_out", "held out")) if side in data
    ]


def _short(x: float | None) -> str:
    return "no finite number" if x is None else f"{x:.4g}"
