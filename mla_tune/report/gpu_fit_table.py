"""The table of `mla-tune plan --gpus N --memory SIZE`: what each launch configuration needs on one GPU."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from mla_tune.console import human_bytes, human_count, out

NOTE = (
    "GB on one GPU, estimated from shapes. A word in the last column is the train.activation_checkpointing "
    "that makes it fit; a number of GPUs, from how many on it fits with train.activation_checkpointing: full."
)
COLUMNS = ("weights", "trained", "gathered", "activations", "working", "reserve", "total")


def print_fit(fit: dict[str, Any]) -> None:
    """Print `preflight.gpu_fit.gpu_fit`: GB on one GPU by purpose, whether it fits, and what to start."""
    one = "1 GPU" if fit["gpus"] == 1 else f"{fit['gpus']} GPUs"
    counts = f"{human_count(fit['params_total'])} parameters, {human_count(fit['trainable_params'])} trained"
    out.print(
        f"{fit['model']} ({counts}) on {one} of {human_bytes(fit['memory'])}: {fit['batch_size']} rows of "
        f"{fit['max_length']:,} tokens a GPU, {fit['dtype']}, "
        f"activation checkpointing {fit['activation_checkpointing']}"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", caption_justify="left")
    for name in ("config", "base"):
        table.add_column(name, no_wrap=True)
    for name in ("weights", "trained", "gathered", "activ.", "work", "reserve", "GB a GPU"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fits")
    for row in fit["configs"]:
        table.add_row(row["config"], row["base"], *(_gb(row[c]) for c in COLUMNS), _fits(row))
    out.print(table)
    for config, wrong in fit["left_out"].items():
        out.print(f"{config} is not tried together with {'; '.join(wrong)}", soft_wrap=True)
    if fit["published"]:
        out.print(f"published in {fit['published'].upper()}: the other rows are for its weights in bfloat16")
    out.print(f"→ {fit['advice']}", soft_wrap=True)


def _gb(n: int) -> str:
    return f"{n / 1e9:,.1f}"


def _fits(row: dict[str, Any]) -> str:
    if row["fits"]:
        return "yes"
    if row["fits_with"]:
        return f"{row['fits_with']}"
    return f"{row['from_gpus']} GPUs" if row["from_gpus"] else "no"
