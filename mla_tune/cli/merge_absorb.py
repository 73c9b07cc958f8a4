"""`mla-tune merge-absorb`: merge adapters into their base, split the result for absorbed decoding, and prove it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from mla_tune.cli.common import Json, Workers, progress_bars, weighted_adapters


def command(
    adapter: Annotated[
        Path | None,
        typer.Argument(metavar="RUN_OR_ADAPTER", help="A run folder of mla-tune train, or a PEFT adapter folder."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Folder of the base model, or 'embedded'. Default: the one that the run recorded."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Output folder. Default: 'merged' in the run folder.")
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="DIR[=WEIGHT]",
            help="One of several adapters to merge in this order, its change times WEIGHT (default 1).",
        ),
    ] = None,
    absorb: Annotated[
        Literal["split", "fold", "none"],
        typer.Option(
            help="'split' also writes W_UK (H, C, P) and W_UV (H, V, C); 'fold' their products with W_UQ and W_O."
        ),
    ] = "split",
    dtype: Annotated[
        Literal["keep", "float32", "bfloat16", "float16"],
        typer.Option(help="Dtype of the merged weights; 'keep' is that of the base."),
    ] = "keep",
    quantized: Annotated[
        Literal["dequantize", "keep"],
        typer.Option(
            help="Changed weights that the base has quantized: write them in bfloat16 ('dequantize'), or quantize "
            "them again with fresh scales ('keep')."
        ),
    ] = "dequantize",
    exact: Annotated[bool, typer.Option("--exact", help="Add in float64 instead of float32.")] = False,
    rounding: Annotated[
        Literal["nearest", "stochastic"], typer.Option("--round", help="How sums are rounded to the dtype written.")
    ] = "nearest",
    seed: Annotated[int, typer.Option(help="Seed of stochastic rounding.")] = 0,
    min_retained: Annotated[
        float | None,
        typer.Option(metavar="X", help="Fail where rounding keeps less than this share of a tensor's change (0 to 1)."),
    ] = None,
    untie_embeddings: Annotated[
        bool, typer.Option("--untie-embeddings", help="Write a tied output head as a tensor of its own.")
    ] = False,
    link: Annotated[
        bool, typer.Option("--link/--no-link", help="Share files that don't change with the base, or copy them.")
    ] = True,
    mtp: Annotated[
        bool,
        typer.Option("--mtp", help="Merge what adapters hold of MTP layers too; without it they stay as they are."),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Reopen the output and prove it against base and adapter.")
    ] = True,
    logits: Annotated[
        bool,
        typer.Option("--logits/--no-logits", help="Let the proof compare logits too (loads transformers and PEFT)."),
    ] = True,
    workers: Workers = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output of an earlier merge.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; read no weight, write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Merge adapters into their base model, exactly and proven, and split the result for absorbed decoding."""
    # Every worker is a thread: BLAS threads under each would only wait for each other.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from mla_tune.verification.prover import start

    # Before all else: the process of the proof takes seconds to load what it needs.
    prover = start(logits) if verify and not dry_run else None
    from mla_tune.adapter.merge_options import MergeOptions
    from mla_tune.console import err, print_json
    from mla_tune.merge.run import merge_absorb, plan_only
    from mla_tune.report.merge_tables import print_merge, print_merge_plan

    named = weighted_adapters(adapter, adapters or [])
    options = MergeOptions(
        absorb=absorb,
        dtype=dtype,
        quantized=quantized,
        exact=exact,
        round=rounding,
        seed=seed,
        untie_embeddings=untie_embeddings,
        link=link,
        mtp=mtp,
    )
    if dry_run:
        plan = plan_only(named, base, out, options=options, verify=verify, workers=workers).to_json()
        print_json(plan) if as_json else print_merge_plan(plan)
        return
    stages = ["merge", *(["absorb"] if absorb != "none" else []), *(["check"] if verify else [])]
    stages += ["logits"] if verify and logits else []
    with progress_bars(stages) as show:
        result = merge_absorb(
            named,
            base,
            out,
            options=options,
            min_retained=min_retained,
            verify=verify,
            logits=logits,
            overwrite=overwrite,
            workers=workers,
            prover=prover,
            progress=show,
            note=lambda line: err.print(line, soft_wrap=True),
        ).to_json()
    print_json(result) if as_json else print_merge(result)
