"""`mla-tune merge-absorb`: merge adapters into their base, write absorbed tensors for decoding, and prove both."""

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
            help="Adapter to merge with its change times WEIGHT (default 1); repeat for several, which "
            "are added in this order.",
        ),
    ] = None,
    absorb: Annotated[
        Literal["split", "fold", "none"],
        typer.Option(
            help="Write absorbed tensors beside the weights: 'split' writes W_UK (H, C, P) and W_UV (H, "
            "V, C), 'fold' their products with W_UQ and W_O."
        ),
    ] = "split",
    dtype: Annotated[
        Literal["keep", "float32", "bfloat16", "float16"],
        typer.Option(help="Dtype of the weights written; 'keep' leaves each in the base's dtype."),
    ] = "keep",
    quantized: Annotated[
        Literal["dequantize", "keep"],
        typer.Option(
            help="What to do with quantized weights that an adapter changes: write them in bfloat16 "
            "('dequantize'), or "
            "quantize them again with new scales ('keep')."
        ),
    ] = "dequantize",
    exact: Annotated[bool, typer.Option("--exact", help="Compute in float64 instead of float32.")] = False,
    rounding: Annotated[
        Literal["nearest", "stochastic"],
        typer.Option(
            "--round", help="How to round sums to the dtype written; 'stochastic' keeps small changes on average."
        ),
    ] = "nearest",
    seed: Annotated[int, typer.Option(help="Seed of --round stochastic.")] = 0,
    min_retained: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Fail if rounding keeps less than this share (0 to 1, such as 0.9) of the change of any tensor.",
        ),
    ] = None,
    untie_embeddings: Annotated[
        bool,
        typer.Option(
            "--untie-embeddings", help="Write an output head that is tied to the embedding as a tensor of its own."
        ),
    ] = False,
    link: Annotated[
        bool,
        typer.Option(
            "--link/--no-link",
            help="Share unchanged files with the base (reflink or hard link) instead of copying them.",
        ),
    ] = True,
    mtp: Annotated[
        bool,
        typer.Option("--mtp", help="Also merge adapters on MTP layers; without it, MTP layers are copied unchanged."),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Read the output again and prove it number by number.")
    ] = True,
    logits: Annotated[
        bool,
        typer.Option(
            "--logits/--no-logits",
            help="Also compare logits of base + adapter, merged model and absorbed attention (loads "
            "transformers and PEFT).",
        ),
    ] = True,
    workers: Workers = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output of an earlier merge.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the plan; read only headers, write nothing."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Merge adapters into their base model, write absorbed tensors for decoding, and prove every number."""
    # The merge has threads of its own: BLAS threads in each of them would wait for each other.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from mla_tune.verification.prover import start

    # Start it first: the second process of the proof takes seconds to load torch.
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
