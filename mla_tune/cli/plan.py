"""`mla-tune plan`: what `train` would do with a recipe, and which launch configuration holds it."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="A recipe file, or the name of a shipped recipe.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key of the recipe, such as --set adapter.rank=8.")
    ] = None,
    data: Annotated[
        bool, typer.Option("--data/--no-data", help="Read and tokenize the data, to count steps and tokens.")
    ] = True,
    gpus: Annotated[
        int | None, typer.Option("--gpus", help="Show which launch configuration holds the model on this many GPUs.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", help="With --gpus: the memory of one GPU, such as 80GB.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as one JSON document and nothing else.")] = False,
) -> None:
    """Show what train would do with a recipe: matrices, learning rates, steps, memory.  No weights are read.

    With --gpus and --memory it shows what each of the shipped launch configurations needs on a GPU and which of them
    fits; without --recipe it does so for models of 671 B, 236 B and 16 B parameters.
    """
    from mla_tune.console import print_json
    from mla_tune.errors import InputError
    from mla_tune.recipe.load import load_recipe

    if (gpus is None) != (memory is None):
        raise InputError("--gpus and --memory belong together: --gpus 8 --memory 80GB")
    if gpus is not None and memory is not None:
        _fit(recipe, list(set_ or []), gpus, memory, json)
        return
    if recipe is None:
        raise InputError("--recipe is missing: a recipe file, or the name of a shipped recipe")
    from mla_tune.api import plan

    found = plan(load_recipe(recipe, list(set_ or [])), data=data)
    document, loaded = found.to_json(), found.resolved.recipe
    if json:
        print_json(document)
        return
    from mla_tune.report.plan_table import print_plan

    print_plan(document, loaded)


#: Models that are shown where no recipe is given.
MODELS = ("deepseek-v3", "deepseek-v2", "deepseek-v2-lite")


def _fit(recipe: str | None, sets: list[str], gpus: int, memory: str, json: bool) -> None:
    from mla_tune.console import out, print_json
    from mla_tune.preflight.gpu_fit import gpu_fit, parse_memory
    from mla_tune.recipe.load import load_recipe
    from mla_tune.report.gpu_fit_table import NOTE, print_fit
    from mla_tune.training.resolve import resolve

    size = parse_memory(memory)
    if recipe is not None:
        recipes = [load_recipe(recipe, sets)]
    else:
        recipes = [load_recipe("safe", [f"model.base={name}", *sets]) for name in MODELS]
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
