"""The text of `mla-tune plan`: matrices by role, data, steps, memory and warnings."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from mla_tune.console import human_bytes, human_count, out
from mla_tune.recipe.schema import Recipe


def _lora(r: dict[str, Any]) -> tuple[str, str]:
    """Return rank and alpha as texts; a module of `modules_to_save` has neither."""
    return ("whole", "") if r["rank"] is None else (f"{r['rank']}", f"{r['alpha']:g}")


def print_plan(plan: dict[str, Any], recipe: Recipe) -> None:
    """Print matrices by role, data, memory and warnings of `preflight.plan.plan`."""
    out.print(
        f"{plan['model']} ({plan['model_type']}, {human_count(plan['params_total'])} parameters), {plan['method']}: "
        f"{human_count(plan['trainable_params'])} trained, {plan['trainable_share'] * 100:.2f} %"
    )
    if plan["roles"]:
        table = Table(box=None, pad_edge=False, header_style="bold")
        plus = recipe.optimizer.lora_plus_ratio != 1
        rates = ("learning rate A", "B") if plus else ("learning rate",)
        for name in ("role", "matrices", "rank", "alpha", "parameters", *rates):
            table.add_column(name, justify="left" if name == "role" else "right")
        for r in plan["roles"]:
            cells = (f"{r['matrices']:,}", *_lora(r), f"{r['params']:,}")
            both = (r["learning_rate"], r["learning_rate_b"]) if plus else (r["learning_rate"],)
            table.add_row(r["role"], *cells, *(f"{rate:.3g}" for rate in both))
        out.print(table)
    else:
        out.print(f"learning rate {plan['learning_rate']['all']:.3g}")
    data = plan["data"]
    if data:
        for side, name in (("train", "train"), ("held_out", "held out")):
            if side not in data:
                continue
            d = data[side]
            name += ", the stream's first" * (side == "train" and "streamed" in data)
            note = f", {d['truncated']} cut" * bool(d["truncated"]) + f", {d['dropped']} left out" * bool(d["dropped"])
            out.print(
                f"{name}: {d['samples']:,} samples in {d['rows']:,} rows, {d['tokens']:,} tokens, "
                f"{d['trained_tokens']:,} of them count{note}"
            )
    t = recipe.train
    batch = f"{t.batch_size} rows" + (
        f" × {t.gradient_accumulation_steps}" if t.gradient_accumulation_steps > 1 else ""
    )
    tokens = f", {plan['tokens']:,} tokens" if plan["tokens"] else ""
    out.print(f"{plan['steps'] or '?'} steps of {batch} of up to {t.max_length} tokens{tokens}")
    m = plan["memory"]
    parts = ("process", "weights", "adapters", "gradients", "optimizer", "activations")
    detail = ", ".join(f"{name} {human_bytes(m[name])}" for name in parts if m[name])
    peak = human_bytes(max(m["head"], m["transient"]))
    total = f"{human_bytes(m['total'])} {m['measured_as']}"
    out.print(f"memory, estimated for {plan['dtype']}: {total}: {detail}, working set {peak}")
    if plan["adapter_bytes"]:
        out.print(f"adapter on disk: {human_bytes(plan['adapter_bytes'])}")
    for warning in plan["warnings"]:
        out.print(f"note: {warning}")
