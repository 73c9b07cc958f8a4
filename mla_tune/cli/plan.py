"""`mla-tune plan`: show what `train` would do with a recipe, and which launch configuration fits."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Recipe file or shipped recipe, for example safe.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Replace one key of the recipe, for example --set adapter.rank=8. May be repeated."),
    ] = None,
    data: Annotated[
        bool,
        typer.Option("--data/--no-data", help="Whether to read and tokenize the data, to count steps and tokens."),
    ] = True,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", metavar="N", help="Show which launch configurations fit on N GPUs. Needs --memory."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="With --gpus: memory of one GPU, for example 80GB.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as one JSON document.")] = False,
) -> None:
    """Show what train would do with a recipe: matrices, learning rates, steps, memory. Reads no weights.

    With --gpus and --memory it shows how much memory each launch configuration needs on one GPU, and which of them fit;
    without --recipe it does so for models of 671 B, 236 B and 16 B parameters.
    """
    from mla_tune.console import print_json
    from mla_tune.errors import InputError
    from mla_tune.recipe.load import load_recipe

    if (gpus is None) != (memory is None):
        raise InputError("--gpus and --memory belong together: give both, for example --gpus 8 --memory 80GB")
    if gpus is not None and memory is not None:
        _show_gpu_fit(recipe, list(set_ or []), gpus, memory, json)
        return
    if recipe is None:
        raise InputError("--recipe is missing: give a recipe file or a shipped recipe, for example --recipe safe")
    from mla_tune.api import plan

    found = plan(load_recipe(recipe, list(set_ or [])), data=data)
    document, loaded = found.to_json(), found.resolved.recipe
    if json:
        print_json(document)
        return
    from mla_tune.report.plan_table import print_plan

    print_plan(document, loaded)


MODELS = ("deepseek-v3", "deepseek-v2", "deepseek-v2-lite")
"""Models that --gpus shows where no recipe is given."""


def _show_gpu_fit(recipe: str | None, overrides: list[str], gpus: int, memory: str, json: bool) -> None:
    """Print how much memory each launch configuration needs on one of `gpus` GPUs with `memory` ("80GB")."""
    from mla_tune.console import out, print_json
    from mla_tune.preflight.gpu_fit import gpu_fit, parse_memory
    from mla_tune.recipe.load import load_recipe
    from mla_tune.report.gpu_fit_table import NOTE, print_fit
    from mla_tune.training.resolve import resolve

    size = parse_memory(memory)
    if recipe is not None:
        recipes = [load_recipe(recipe, overrides)]
    else:
        recipes = [load_recipe("safe", [f"model.base={name}", *overrides]) for name in MODELS]
    documents = [
        gpu_fit(r.recipe, r.arch, r.placement, r.quantized, gpus=gpus, memory=size) for r in map(resolve, recipes)
    ]
    if json:
        print_json(documents[0] if recipe is not None else documents)
        return
    for i, document in enumerate(documents):
        if i:
            out.print()
        print_fit(document)
    out.print(NOTE)
