"""The table of `mla-tune bench train`: speed, memory and loss of each case, in 80 columns."""

from __future__ import annotations

import statistics
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from mla_tune.console import human_bytes, human_count, out
from mla_tune.recipe.schema import Recipe


def print_train(recipe: Recipe, document: dict[str, Any]) -> None:
    """Print the table from `document`, the result that `--json` prints, of cases that trained `recipe`."""
    t = recipe.train
    out.print(
        f"{recipe.model.source}, {recipe.adapter.method} on {recipe.adapter.targets}; {document['rows']} rows, "
        f"{human_count(document['tokens'])} tokens; batches of {t.batch_size} × {t.max_length}",
        markup=False,
        soft_wrap=True,
    )
    out.print(_cases_table(document["cases"]))
    out.print("Real tokens (no padding); medians, and the range of the ratio.  activations:", soft_wrap=True)
    out.print("memory that a forward pass keeps for the backward pass.  peak: memory above", soft_wrap=True)
    out.print("that before the model was loaded.  loss: held out, after the last round.", soft_wrap=True)


def _cases_table(cases: list[dict[str, Any]]) -> Table:
    """Return one row for each case; ratios are to the first case, round by round."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("", no_wrap=True)
    first = cases[0]
    for name in ("tokens/s", f"× {first['name']}", "range", "activations", "peak", "loss"):
        table.add_column(name, justify="right", no_wrap=True)
    for case in cases:
        ratios = [a / b for a, b in zip(_rates(case), _rates(first), strict=True)]
        table.add_row(
            case["name"],
            f"{case['tokens_per_s']:,.0f}",
            f"{statistics.median(ratios):.2f}",
            "" if case is first else f"{min(ratios):.2f}–{max(ratios):.2f}",
            human_bytes(case["activations"]),
            human_bytes(case["run_peak"]),
            "" if case["loss"] is None else f"{case['loss']:.3f}",
        )
    return table


def _rates(case: dict[str, Any]) -> list[float]:
    """Return the real tokens a second of each round."""
    return [tokens / seconds for tokens, seconds in zip(case["tokens"], case["seconds"], strict=True)]
