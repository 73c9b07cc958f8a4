"""The plots: loss.png of a run (loss, learning rates, gradient norms) and decode.png of `bench decode`."""

from __future__ import annotations

import itertools
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from mla_tune.runs.metrics import Curves, Points, grouped, read_curves, thinned
from mla_tune.runs.record import UNKNOWN, RunRecord

#: Okabe and Ito's colors, which color-blind people can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8B5A2B", "#555555")
#: More curves than colors: the second round is dotted, the third dash-dotted.  Dashed is B of LoRA+.
STYLES = ("-", ":", "-.")
SPIKE = "#B00020"
#: Steps from which on gradient norms are drawn as running means.
LONG = 1000


def plot_run(metrics: Path, target: Path, record: RunRecord) -> None:
    """Plot loss, learning rate by role and gradient norm by role over the steps into `target` (PNG).

    `metrics` is metrics.jsonl of the run, `record` its run.json.  Skipped steps and cuts of the learning
    rate are marked.

    Raises `ValueError` where no step was logged.
    """
    curves = read_curves(metrics)
    if not curves.rates and not curves.train and not curves.spikes:
        raise ValueError(f"{metrics}: nothing to plot")
    fig, axes = plt.subplots(3, 1, figsize=(10, 9), sharex=True, height_ratios=[2.2, 1, 1.5], layout="constrained")
    top, middle, bottom = axes
    fig.suptitle(_title(record), fontsize=11)
    _loss(top, curves)
    _rates(middle, curves)
    _norms(bottom, curves)
    for ax in axes:
        for step, _ in curves.cuts:
            ax.axvline(step, color=SPIKE, lw=1, ls=(0, (1, 1.5)), zorder=1)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        handles, labels = ax.get_legend_handles_labels()
        if handles:
            ax.legend(handles, labels, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.02))
    bottom.set_xlabel("step")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    if curves.steps <= 1:  # one point has no width
        bottom.set_xlim(-0.5, 1.5)
    _save(fig, target)


def _title(record: RunRecord) -> str:
    parts = [record.base or "?", str((record.data or {}).get("source") or "?")]
    parts = [p if len(p) <= 50 else "…" + p[-49:] for p in parts]
    if record.state not in (UNKNOWN, "done"):
        parts.append(record.state)
    loss = record.held_out_loss
    if loss is not None and loss.before is not None and loss.after is not None:
        before, after = loss.before, loss.after
        parts.append(f"held-out loss {before:.3f} → {after:.3f} ({(after / before - 1) * 100:+.1f} %)")
    return " · ".join(parts).replace("$", r"\$")  # no formulas


def _loss(ax: Any, curves: Curves) -> None:
    train, held = curves.train, curves.held_out
    if train:
        ax.plot(*_xy(thinned(train)), color="0.72", lw=0.8, label="train, each step")
        ax.plot(*_xy(thinned(_smooth(train))), color=COLORS[0], lw=2, label="train, running mean", **_dot(train))
    if held:
        ax.plot(*_xy(held), "o-", color=COLORS[1], lw=1.5, ms=5 if len(held) < 60 else 2.5, label="held out")
    values = [v for _, v in train + held] or [loss for _, loss, _ in curves.spikes if loss is not None]
    if values:
        low, high = min(values), max(values)
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
        ax.set_ylim(low - margin, high + margin)
    _marks(ax, [(step, loss) for step, loss, _ in curves.spikes], curves.skipped)
    if curves.cuts:
        ax.plot([], [], color=SPIKE, lw=1, ls=(0, (1, 1.5)), label="learning rates cut")
    ax.set_ylabel("loss (nats a token)")


def _marks(ax: Any, spikes: list[tuple[int, float | None]], skipped: int = 0) -> None:
    """Draw × at each skipped step: at its value, or at the upper edge if the value is higher or not finite."""
    if not spikes:
        return
    top = ax.get_ylim()[1]
    values = [top if value is None else min(value, top) for _, value in spikes]
    label = f"skipped ({max(skipped, len(spikes))})" if skipped else None
    marks = ax.plot([step for step, _ in spikes], values, "x", color=SPIKE, ms=7, mew=1.8, label=label, zorder=5)
    marks[0].set_clip_on(False)


def _rates(ax: Any, curves: Curves) -> None:
    # Equal rates lie on each other: one line, named once.
    for i, (label, names) in enumerate(grouped(curves.rates).items()):
        points: Points = curves.rates[names[0]]
        style = "--" if names[0].endswith(".B") else STYLES[i // len(COLORS) % len(STYLES)]
        color = COLORS[i % len(COLORS)]
        ax.plot(*_xy(thinned(points)), color=color, ls=style, lw=1.6, label=wrapped(label), **_dot(points))
    ax.set_ylabel("learning rate")
    ax.set_ylim(bottom=0)
    ax.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def _norms(ax: Any, curves: Curves) -> None:
    long = curves.steps > LONG  # norms scatter so much that the bands of a long run would hide each other
    drawn = {n: p for n, p in curves.norms.items() if any(v > 0 for _, v in p)}
    for i, (name, points) in enumerate(drawn.items()):
        style = "--" if name.endswith(".B") else STYLES[i // len(COLORS) % len(STYLES)]
        shown = _calm([(s, v) for s, v in points if v > 0], long)
        ax.plot(*_xy(shown), color=COLORS[i % len(COLORS)], ls=style, lw=1, label=name, **_dot(points))
    total = [(s, v) for s, v in curves.norm if v > 0]
    if total:
        ax.plot(*_xy(_calm(total, long)), color="black", lw=1.4, label="all together", **_dot(total))
    if drawn or total:
        ax.set_yscale("log")
        least, most = ax.get_ylim()
        if most / least < 10:  # less than a decade would show no power of ten
            ax.set_ylim(least / 2, most * 2)
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
    _marks(ax, [(step, norm) for step, _, norm in curves.spikes])
    ax.set_ylabel("gradient norm" + (", running mean" if long else ""))


def _calm(points: Points, long: bool) -> Points:
    return thinned(_smooth(points, 0.02), 600) if long else points


def wrapped(label: str, width: int = 24) -> str:
    """Break a list of names into lines of at most `width` characters."""
    return textwrap.fill(label, width, break_long_words=False)


def _xy(points: Points) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _dot(points: Points) -> dict[str, Any]:
    """Return the style that makes a curve of a single point visible."""
    return {"marker": "o", "ms": 4} if len(points) == 1 else {}


def plot_decode(bench: dict[str, Any], target: Path) -> None:
    """Plot the time of a decoding step over context, one curve for each case, into `target` (PNG).

    `bench` is the document of `mla-tune bench decode --json`.  Bands are the range over the rounds; dashed curves are
    steps as CUDA graphs; the dotted line is the time of reading the cache once.
    """
    contexts = [at["context"] for at in bench["contexts"]]
    fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    colors = {"stock": "0.4", "absorbed": "C0"}  # the name of the adapters' case holds their number
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
    """Write the figure beside `target`, then rename it: the file appears whole or not at all."""
    beside = target.with_name(target.name + ".tmp")
    fig.savefig(beside, dpi=120, format="png")
    plt.close(fig)
    beside.replace(target)


def _smooth(points: Points, share: float = 0.1) -> Points:
    """Return the centered running mean over a `share` of the steps."""
    half = max(1, round(len(points) * share / 2))
    sums = [0.0, *itertools.accumulate(v for _, v in points)]
    found = []
    for i, (step, _) in enumerate(points):
        first, last = max(0, i - half), min(len(points), i + half + 1)
        found.append((step, (sums[last] - sums[first]) / (last - first)))
    return found
