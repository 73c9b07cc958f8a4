"""The sentences about a merge that a user has to know: what left its format, what was replaced, what folding costs."""

from __future__ import annotations

from mla_tune.absorption.fold import model_costs
from mla_tune.console import human_count
from mla_tune.merge.output import MergePlan

#: Cached tokens for which FLOPs are given.
_CONTEXT = 4096


def notes(plan: MergePlan) -> list[str]:
    """What a user has to know about this output, a sentence each."""
    lines = list(plan.architecture.warnings)
    changed = {out.key for out in plan.changed}
    title = " and ".join(dict.fromkeys(tensor.format.title for tensor in plan.quantized.values()))
    if plan.dequantized and plan.options.dtype == "keep":
        beside = len(plan.dequantized - changed)
        fused = f", {beside} of them only because engines fuse them with changed ones" if beside else ""
        lines.append(
            f"{len(plan.dequantized):,} {title} weights are written as bfloat16{fused}; config.json tells engines. "
            f"--quantized keep writes {title} again, which erases small changes"
        )
    requantized = sum(out.requantize is not None and out.scale_of is None for s in plan.shards for out in s.tensors)
    if requantized:
        lines.append(
            f"{requantized:,} {title} weights are quantized anew: look at 'retained', {title} erases small changes"
        )
    if plan.options.mtp:
        count = len({out.key for out in plan.changed if out.site is not None and out.site.mtp})
        lines.append(
            f"{count} matrices of MTP layers are merged: proven as all others, but transformers computes no logits of "
            "them, so their effect was not compared"
            if count
            else "--mtp: no adapter has a key of an MTP layer"
        )
    if plan.untied:
        lines.append("the output head is a tensor of its own now: tie_word_embeddings is false in config.json")
    if plan.absorbed is not None and plan.absorbed.mode == "fold":
        lines.append(_fold_cost(plan))
    if plan.replaced:
        lines.append(f"{len(plan.replaced)} tensors are whole ones of the adapter: {_some(sorted(plan.replaced))}")
    return lines


def _fold_cost(plan: MergePlan) -> str:
    """What folding costs against splitting, over all attention modules."""
    by_name = {f.name: f for f in model_costs([a.dims for a in plan.architecture.attention], _CONTEXT)}
    split, fold = by_name["split"], by_name["fold"]
    return (
        f"fold: {human_count(fold.params)} parameters where split has {human_count(split.params)} "
        f"({fold.params / split.params:.1f} times), and {fold.flops / 1e9:.3g} GFLOP a token where split has "
        f"{split.flops / 1e9:.3g} ({fold.flops / split.flops:.1f} times, {_CONTEXT:,} tokens cached)"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
