"""`mla-tune verify`: prove that a merged checkpoint, made by any tool, is its base with its adapters merged in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mla_tune.cli.common import Json, Workers, progress_bars, weighted_adapters


def command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a merged checkpoint, made by any tool.")],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder of the base model, or 'embedded'. Default: the base in OUT's manifest, or else "
            "of the adapter's run.",
        ),
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="DIR[=WEIGHT]",
            help="Adapter or run folder that was merged, and its weight (default 1); repeat for several. "
            "Default: the adapters in OUT's manifest.",
        ),
    ] = None,
    logits: Annotated[
        bool,
        typer.Option(
            "--logits/--no-logits",
            help="Also compare logits of base + adapter, merged model and absorbed attention (loads "
            "transformers and PEFT).",
        ),
    ] = True,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Prove that a merged checkpoint, made by any tool, is its base with the adapters merged in, number by number.

    Exits with 1, and lists the tensors and files, if something is wrong.
    """
    from mla_tune.console import print_json
    from mla_tune.errors import CheckError
    from mla_tune.merge.run import default_workers
    from mla_tune.report.merge_tables import print_verification
    from mla_tune.verification.verify import verify

    named = weighted_adapters(None, adapters) if adapters else []
    with progress_bars(["check", *(["logits"] if logits else [])]) as show:
        found = verify(out, base, named, logits=logits, workers=workers or default_workers(), progress=show)
    print_json(found.to_json()) if as_json else print_verification(found.to_json())
    if not found.holds:
        n = found.proof.failed
        what = "tensor or file is" if n == 1 else "tensors or files are"
        raise CheckError(f"{out}: {n:,} {what} not what merging the adapters into the base gives")
