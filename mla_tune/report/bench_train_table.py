"""The table of `mla-tune bench train`: speed, memory and loss of each case, in 80 columns."""

from __future__ import annotations

import statistics
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from mla_tune.console import human_bytes, human_count, out
from mla_tune.recipe.schema import Recipe


def print_train(recipe: Recipe, found: Any) -> None:
    """Print the table of `found`, a `bench.train.TrainBench`."""
    t = recipe.train
    out.print(
        f"{recipe.model.source}, {recipe.adapter.method} on {recipe.adapter.targets}; {found.rows} rows, "
        f"{human_count(found.tokens)} tokens; batches of {t.batch_size} × {t.max_length}",
        markup=False,
        soft_wrap=True,
    )
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("", no_wrap=True)
    first = found.measured[0].name
    for name in ("tokens/s", f"× {first}", "range", "activations", "peak", "loss"):
        table.add_column(name, justify="right", no_wrap=True)
    for m in found.measured:
        ratios = found.ratios(m.name, first)
        table.add_row(
            m.name,
            f"{m.rate:,.0f}",
            f"{statistics.median(ratios):.2f}",
            "" if m.name == first else f"{min(ratios):.2f}–{max(ratios):.2f}",
            human_bytes(m.activations),
            human_bytes(m.run_peak),
            "" if m.loss is None else f"{m.loss:.3f}",
        )
    out.print(table)
    out.print("Real tokens (no padding); medians, and the range of the ratio.  activations:", soft_wrap=True)
    out.print("what a forward pass leaves for the backward pass.  peak: beyond what the", soft_wrap=True)
    out.print("libraries take.  loss: held out, after the last round.", soft_wrap=True)
