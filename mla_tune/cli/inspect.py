"""`mla-tune inspect`: list the layers that an adapter can attach to, and what it does there, from config.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A model folder, a config.json, a shipped name such as deepseek-v3, or a hub id."
        ),
    ],
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Mark the layers that this recipe (a file or a shipped name, such as safe) adapts, and count LoRA "
            "parameters at its ranks."
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default="16",
            help="Count LoRA parameters at this rank. With --recipe it replaces adapter.rank.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    depth: Annotated[
        Literal["roles", "layers", "all"],
        typer.Option(help="Show a row for each role, for each module of a block of equal layers, or for every module."),
    ] = "roles",
    check_weights: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Compare config.json with the safetensors headers of the checkpoint in DIR; exit 1 if they differ.",
        ),
    ] = None,
) -> None:
    """List every layer that an adapter can attach to, with its risk and its effect on cache and absorption.

    Reads config.json only: no weights, no GPU. Also shows the MLA dimensions and the size of the KV cache.
    """
    from mla_tune.api import inspect
    from mla_tune.console import out, print_json

    loaded = None
    if recipe:
        from mla_tune.recipe.load import load_recipe

        loaded = load_recipe(recipe, [] if rank is None else [f"adapter.rank={rank}"])
    found = inspect(model, recipe=loaded, rank=rank)
    document = found.to_json()
    if recipe:
        document["recipe"] = recipe
    if check_weights is not None:
        from mla_tune.preflight.check_weights import check_weights as compare

        document["weights"] = compare(found.architecture, check_weights)
    if as_json:
        print_json(document)
    else:
        from mla_tune.report.inspect_table import render

        render(document, depth, out)
    if check_weights is not None:
        from mla_tune.errors import CheckError
        from mla_tune.preflight.check_weights import summary_lines

        lines = summary_lines(document["weights"])
        if not document["weights"]["holds"]:
            raise CheckError("\n".join(lines))
        if not as_json:
            for line in lines:
                out.print(line, markup=False, soft_wrap=True)
