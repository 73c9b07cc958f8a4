"""report.html and loss.png of a run; the page is one file that needs no network and no script."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from mla_tune.checkpoint.atomic_files import replacing
from mla_tune.console import human_bytes, human_count
from mla_tune.report.commands import commands, working_folder
from mla_tune.runs.metrics import Curves, read_curves

TEMPLATE = Path(__file__).with_name("report.html.jinja")
#: Rows of the table of skipped steps; the rest is counted.
LISTED = 20


def write_report(root: Path, run: dict[str, Any]) -> None:
    """Write report.html and, if a step was logged, loss.png into the run folder `root`.

    `run` are the contents of run.json; the curves are read from metrics.jsonl.

    Raises `OSError` where they can't be written.
    """
    from mla_tune.report.plots import plot_run

    picture = None
    try:
        plot_run(root / "metrics.jsonl", root / "loss.png", run)
        picture = base64.b64encode((root / "loss.png").read_bytes()).decode()
    except ValueError:  # stopped before the first step
        (root / "loss.png").unlink(missing_ok=True)
    with replacing(root / "report.html") as stream:
        stream.write(render(root, run, read_curves(root / "metrics.jsonl"), picture).encode())


def render(root: Path, run: dict[str, Any], curves: Curves, picture: str | None) -> str:
    """Return the HTML page; `picture` is loss.png in base64, or None where no step was logged."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=root.resolve().name,
        state=run.get("state", "unknown"),
        error=run.get("error"),
        summary=summary(run, curves),
        roles=role_rows(run),
        trained=run.get("adapter") or {},
        picture=picture,
        samples=run.get("samples") or {"answers": []},
        data=data_rows(run),
        source=(run.get("data") or {}).get("source"),
        spikes=[
            {"step": step, "loss": _short(loss), "norm": _short(norm), "cut": dict(curves.cuts).get(step)}
            for step, loss, norm in curves.spikes[:LISTED]
        ],
        more_spikes=max(0, curves.skipped - LISTED),
        skipped=curves.skipped,
        environment=list((run.get("environment") or {}).items()),
        kernels=list((run.get("kernels") or {}).items()),
        cd=working_folder(run),
        commands=commands(root, run),
    )


def summary(run: dict[str, Any], curves: Curves) -> list[tuple[str, str]]:
    """List pairs (what, figure) on the whole run, for the first table of the page."""
    found: list[tuple[str, str]] = []
    loss = run.get("held_out_loss") or {}
    if loss.get("before") is not None:
        text = f"{loss['before']:.4f} before training"
        if loss.get("after") is not None:
            text = f"{loss['before']:.4f} → {loss['after']:.4f} ({(loss['after'] / loss['before'] - 1) * 100:+.1f} %)"
        found.append(("held-out loss", f"{text}, nats a token"))
    else:
        found.append(("held-out loss", "no rows were held out"))
    if curves.best and len(curves.held_out) > 1:
        found.append(("lowest held-out loss", f"{curves.best[1]:.4f} at step {curves.best[0]:,}"))
    steps = run.get("steps") or {}
    done = max(steps.get("done", 0), curves.steps)
    planned = f" of {steps['planned']:,} planned" if steps.get("planned", 0) > done else ""
    early = ", stopped early" if run.get("stopped_early") and run.get("state") == "done" else ""
    found.append(("steps", f"{done:,}{planned}{early}"))
    if run.get("seconds"):
        found.append(("time", f"{run['seconds']:,.0f} s, {run.get('tokens_per_s', 0):,.0f} tokens/s"))
    if curves.skipped:
        found.append(("spikes", f"{curves.skipped:,} steps skipped, {len(curves.cuts):,} cuts of the learning rate"))
    adapter = run.get("adapter") or {}
    if adapter:
        found.append(("trained", f"{human_count(adapter['trainable_params'])} parameters, {_method(adapter)}"))
    found.append(("base model", f"{run.get('base', '?')} ({run.get('model_type', '?')})"))
    found.append(("device", f"{run.get('device', '?')}, {run.get('dtype', '?')}"))
    found.append(("seed", str(run.get("seed", "?"))))
    memory = run.get("memory") or {}
    if "run_peak" in memory:
        found.append(("memory of the run", human_bytes(memory["run_peak"])))
    if curves.broken:
        found.append(("metrics.jsonl", f"{curves.broken:,} lines can't be read and are left out"))
    return found


def _method(adapter: dict[str, Any]) -> str:
    return "every weight" if adapter.get("method") == "none" else str(adapter.get("method"))


def role_rows(run: dict[str, Any]) -> list[dict[str, str]]:
    """Return a row for each role: matrices, rank, parameters, peak learning rate (two with LoRA+: A and B)."""
    adapter = run.get("adapter") or {}
    rates = adapter.get("learning_rate") or {}
    found = []
    for role, count in (adapter.get("matrices") or {}).items():
        rate = f"{rates[role]:.2e}" if role in rates else ""
        if f"{role}.B" in rates:
            rate = f"A {rates[f'{role}.A']:.2e}, B {rates[f'{role}.B']:.2e}"
        found.append(
            {
                "role": role,
                "matrices": f"{count:,}",
                "rank": str((adapter.get("ranks") or {}).get(role, "")),
                "params": f"{(adapter.get('params') or {}).get(role, 0):,}",
                "rate": rate,
            }
        )
    whole: dict[str, list[int]] = {}
    for path, count in (adapter.get("modules_to_save") or {}).items():
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


def data_rows(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each side of the data, training and held out."""
    data = run.get("data") or {}
    return [
        {"side": name, **data[side]} for side, name in (("train", "training"), ("held_out", "held out")) if side in data
    ]


def _short(x: float | None) -> str:
    return "no finite number" if x is None else f"{x:.4g}"
