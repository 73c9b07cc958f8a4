"""The tables of `mla-tune bench decode`: time, speed and memory of each case at each context, in 80 columns."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from mla_tune.console import human_bytes, human_count, out


def print_decode(document: dict[str, Any]) -> None:
    """Print the tables and the lines below them from `document`, the result that `--json` prints."""
    d = document
    threads = f", {d['threads']} thread{'s' * (d['threads'] > 1)}" if d["device"] == "cpu" else ""
    _print(f"{d['model']}: {d['model_type']}, {human_count(d['params_total'])} parameters, {d['dtype']}")
    copies = human_bytes(d["bandwidth_bytes_per_second"])
    _print(f"on {d['device']}{threads}, copies at {copies}/s; rows: {d['batch']}")
    for at in d["contexts"]:
        out.print()
        out.print(_context_table(at))
        _print_below_table(at)
    _print_cache_size(d)
    with_cost = [at for at in d["contexts"] if at["adapters_cost"]]
    for at in with_cost:
        label = "adapters" if at is with_cost[0] else ""
        _print(f"{label:9}{_ratio(at['adapters_cost'])} × the time of one merged model at {at['context']:,}")
    prefill = d["prefill"]
    absorbed, stock = _median(prefill["absorbed_ms"]), _median(prefill["stock_ms"])
    ratio = _ratio(prefill["ratios"])
    _print(f"prefill  {prefill['context']:,} tokens in {absorbed} ms, stock {stock}: {ratio} × stock")
    _print("Medians, and the range over the rounds.  × stock: stock's time divided by this")
    _print("case's.  memory: peak of a step above the level before it.  MBU: model bandwidth")
    _print("utilization, the share of the copy bandwidth that reading all weights and the")
    _print("cache once takes.  floor: the time of reading the cache once at that bandwidth.")


def _context_table(at: dict[str, Any]) -> Table:
    """Return the table of one context: a row for each case, those that ran out of memory last."""
    table = Table(
        title=f"{at['context']:,} tokens in the cache",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("", no_wrap=True)
    for name in ("ms a token", "range", "tokens/s", "× stock", "range", "memory", "MBU"):
        table.add_column(name, justify="right", no_wrap=name != "ms a token")
    for i, case in enumerate(at["ways"]):
        ratio = case["ratio_median"]
        table.add_row(
            case["way"],
            _number(case["ms_median"]),
            _range(case["ms"]),
            _number(case["tokens_per_second"]),
            "" if ratio is None else _number(ratio),
            _range(case["ratios"]) if i and case["ratios"] else "",
            human_bytes(case["transient_bytes"]),
            f"{case['bandwidth_share']:.1%}",
        )
    for name in at["out_of_memory"]:
        table.add_row(name, "out of memory")
    return table


def _print_below_table(at: dict[str, Any]) -> None:
    """Print the lines below the table of one context: floor, CUDA graphs, and the difference of logits."""
    floor = at["floor_ms"]
    multiples = [f"{case['way']} {_number(case['times_floor'])} ×" for case in at["ways"]]
    _print_parts("floor", [f"the cache read once takes {_number(floor)} ms", *multiples])
    graphs = {case["way"]: statistics.median(case["graph_ms"]) for case in at["ways"] if case["graph_ms"]}
    stock = graphs.get("stock")
    parts = []
    for name, ms in graphs.items():
        ratio = f", {_number(stock / ms)} × stock" if stock and name != "stock" else ""
        parts.append(f"{name} {_number(ms)} ms ({_number(ms / floor)} × floor{ratio})")
    if parts:
        _print_parts("graph", parts)
    if at["logits_off"] is not None:
        _print_parts("logits", [f"absorbed differs by at most {at['logits_off']:.1e} of stock's largest logit"])


def _print_cache_size(d: dict[str, Any]) -> None:
    """Print the bytes a token in the cache beside those of the formula, and the room that `LatentCache` holds."""
    cases = [case for at in d["contexts"] for case in at["ways"]]
    formula = d["formula_cache_bytes_per_token"]
    if d["cache_agrees"]:
        _print(f"cache    {formula:,} bytes a token = (C + R) · layers · bytes of a number")
    else:
        counted = ", ".join(f"{n:,g}" for n in sorted({case["cache_bytes_per_token"] for case in cases}))
        _print(f"cache    {counted} bytes a token, but (C + R) · layers · bytes of a number = {formula:,}")
    if d["cache"] == "LatentCache":
        room = max(case["room_bytes_per_token"] / case["cache_bytes_per_token"] for case in cases)
        _print(f"         LatentCache (all cases but stock) allocates up to {room:.0%} ahead")


def _print(line: str) -> None:
    out.print(escape(line), soft_wrap=True)


def _print_parts(label: str, parts: list[str]) -> None:
    out.print(f"{label:9}{', '.join(parts)}", markup=False)


def _number(n: float) -> str:
    """Return `n` with three significant digits, or with all digits before the point, or with three decimals."""
    return f"{n:,.{0 if n >= 100 else 1 if n >= 10 else 2 if n >= 1 else 3}f}"


def _range(numbers: Sequence[float]) -> str:
    return f"{_number(min(numbers))}–{_number(max(numbers))}"


def _median(numbers: Sequence[float]) -> str:
    return _number(statistics.median(numbers))


def _ratio(numbers: Sequence[float]) -> str:
    """Return the median, with the range in brackets."""
    return f"{_median(numbers)} ({_range(numbers)})"
