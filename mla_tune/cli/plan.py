"""`mla-tune plan`: what `train` would do with a recipe, and which launch configuration holds it."""

from __future__ import annotations

from typing import Annotated, Any

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
    from mla_tune.preflight.plan import plan
    from mla_tune.training.resolve import resolve

    resolved = resolve(load_recipe(recipe, list(set_ or [])))
    loaded = resolved.recipe
    summary, steps = _data(resolved) if data else (None, loaded.train.max_steps)
    gpu, dtype = _machine(loaded)
    document = plan(
        loaded,
        resolved.arch,
        resolved.placement,
        resolved.quantized,
        data=summary,
        steps=steps,
        gpu=gpu,
        dtype=dtype,
    )
    document["warnings"] += resolved.notes
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


def _data(resolved: Any) -> tuple[dict[str, Any], int]:
    """Read and tokenize the data: its summary, and the optimizer steps that it makes."""
    from mla_tune.console import err
    from mla_tune.data.prepare import prepare, steps_of
    from mla_tune.model.tokenizer import load_tokenizer, tokenizer_source
    from mla_tune.training.resolve import check_held_out

    recipe, section = resolved.recipe, resolved.recipe.model
    tokenizer = load_tokenizer(tokenizer_source(section), section.trust_remote_code)
    prepared = prepare(recipe, resolved.arch, tokenizer)
    for line in prepared.lines:
        err.print(line, markup=False, soft_wrap=True)
    check_held_out(recipe, prepared)
    return prepared.summary(), steps_of(recipe, prepared.train_rows)


def _machine(recipe: Any) -> tuple[bool, str]:
    """Whether train would use a GPU on this machine, and the dtype that it would choose."""
    import torch

    wanted = recipe.model.device
    gpu = wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())
    dtype = recipe.model.dtype
    return gpu, ("bfloat16" if gpu else "float32") if dtype == "auto" else dtype
