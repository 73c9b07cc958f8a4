"""loss.png: what a run did, at a glance.  decode.png: what a token takes by context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot_run(metrics: Path, target: Path, run: dict[str, Any]) -> None:
    """Training and held-out loss over steps above, learning rate by role below.  Raises `ValueError` without data."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    train = [(x["step"], x["loss"]) for x in lines if "loss" in x]
    if not train:
        raise ValueError(f"{metrics}: nothing to plot")
    held = [(x["step"], x["eval_loss"]) for x in lines if "eval_loss" in x]
    roles: dict[str, list[tuple[int, float]]] = {}
    for x in lines:
        for role, rate in x.get("learning_rate", {}).items():
            roles.setdefault(role, []).append((x["step"], rate))

    fig, (top, bottom) = plt.subplots(2, 1, figsize=(8, 5.5), sharex=True, height_ratios=[2.2, 1], layout="constrained")
    top.plot(*zip(*train, strict=True), color="0.7", lw=1, label="train, each step")
    top.plot(*zip(*_smooth(train), strict=True), color="C0", lw=2, label="train, running mean")
    if held:
        top.plot(*zip(*held, strict=True), "o-", color="C3", lw=1.5, ms=5, label="held out")
    before_after = run.get("held_out_loss") or {}
    title = f"{run.get('base', '')} · {run.get('data', {}).get('source', '')}"
    if before_after.get("after") is not None:
        b, a = before_after["before"], before_after["after"]
        title += f" · held-out loss {b:.3f} → {a:.3f} ({(a / b - 1) * 100:+.1f} %)"
    top.set_title(title, fontsize=10)
    top.set_ylabel("loss (nats a token)")
    top.legend(frameon=False)
    top.grid(alpha=0.25)
    # Roles that share a rate share a line.
    curves: dict[tuple, list[str]] = {}
    for role, points in roles.items():
        curves.setdefault(tuple(points), []).append(role)
    for points, names in curves.items():
        label = ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} and {len(names) - 2} more"
        bottom.plot(*zip(*points, strict=True), lw=1.5, label=label)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    bottom.legend(frameon=False, fontsize=8)
    bottom.grid(alpha=0.25)
    _save(fig, target)


def plot_decode(bench: dict[str, Any], target: Path) -> None:
    """Time of a token over context, a curve a way with its range over the rounds, from `DecodeBench.to_json`; dashed:
    what a GPU itself takes."""
    contexts = [at["context"] for at in bench["contexts"]]
    fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    colors = {"stock": "0.4", "absorbed": "C0"}  # the adapters' way has their number in its name
    names = dict.fromkeys([*colors, *(t["way"] for at in bench["contexts"] for t in at["ways"])])
    for name in names:
        color = colors.get(name, "C3")
        timed = {at["context"]: t for at in bench["contexts"] for t in at["ways"] if t["way"] == name}
        if not timed:  # out of memory at every context
            continue
        ax.plot(list(timed), [t["ms_median"] for t in timed.values()], "o-", color=color, lw=2, ms=5, label=name)
        least, most = [min(t["ms"]) for t in timed.values()], [max(t["ms"]) for t in timed.values()]
        ax.fill_between(list(timed), least, most, color=color, alpha=0.15, lw=0)
        graphs = {context: min(t["graph_ms"]) for context, t in timed.items() if t["graph_ms"]}
        if graphs:
            ax.plot(list(graphs), list(graphs.values()), "--", color=color, lw=1, label=f"{name}, as a CUDA graph")
    ax.plot(
        contexts, [at["floor_ms"] for at in bench["contexts"]], ":", color="0.6", lw=1.5, label="the cache read once"
    )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(contexts, [f"{context:,}" for context in contexts])
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
    ax.set_xlabel("tokens in the cache")
    ax.set_ylabel("ms a token")
    rows = f"{bench['batch']} row{'s' * (bench['batch'] > 1)}"
    ax.legend(frameon=False)
    ax.set_title(f"{bench['model']} · {bench['dtype']} on {bench['device']} · {rows}", fontsize=10)
    ax.grid(alpha=0.25)
    _save(fig, target)


def _save(fig: Any, target: Path) -> None:
    """Whole or not at all."""
    beside = target.with_name(target.name + ".tmp")
    fig.savefig(beside, dpi=120, format="png")
    plt.close(fig)
    beside.replace(target)


def _smooth(points: list[tuple[int, float]], share: float = 0.1) -> list[tuple[int, float]]:
    """Centred running mean over a tenth of the steps."""
    half = max(1, round(len(points) * share / 2))
    values = [v for _, v in points]
    return [
        (step, sum(window) / len(window))
        for i, (step, _) in enumerate(points)
        if (window := values[max(0, i - half) : i + half + 1])
    ]
