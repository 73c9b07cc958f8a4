"""`mla-tune plan`."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def command(
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="A recipe file, or the name of a shipped recipe.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key: --set adapter.rank=8.")] = None,
    data: Annotated[bool, typer.Option("--data/--no-data", help="Read and tokenize the data, to count it.")] = True,
    gpus: Annotated[
        int | None, typer.Option("--gpus", help="Say which launch configuration fits so many GPUs.")
    ] = None,
    memory: Annotated[str | None, typer.Option("--memory", help="Memory of one of them: 80GB.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show what train would do: matrices, learning rates, steps, memory.  No weights are read.

    With --gpus and --memory: which of the shipped launch configurations fits, and why; without --recipe for models of
    671 B, 236 B and 16 B parameters.
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
    from mla_tune.arch.lookup import architecture_of
    from mla_tune.preflight.family_limits import apply_family_limits
    from mla_tune.preflight.plan import plan

    asked = load_recipe(recipe, list(set_ or []))
    loaded, said = apply_family_limits(asked, architecture_of(asked.model))
    summary, steps = _data(loaded) if data else (None, loaded.train.max_steps)
    gpu, dtype = _machine(loaded)
    document = plan(loaded, _placement(loaded), data=summary, steps=steps, gpu=gpu, dtype=dtype)
    document["warnings"] += said
    if json:
        print_json(document)
        return
    from mla_tune.report.plan_table import print_plan

    print_plan(document, loaded)


#: What is shown without a recipe.
MODELS = ("deepseek-v3", "deepseek-v2", "deepseek-v2-lite")


def _fit(recipe: str | None, sets: list[str], gpus: int, memory: str, json: bool) -> None:
    from mla_tune.console import out, print_json
    from mla_tune.preflight.gpu_fit import gpu_fit, parse_memory
    from mla_tune.recipe.load import load_recipe
    from mla_tune.report.gpu_fit_table import NOTE, print_fit

    bytes_ = parse_memory(memory)
    if recipe is not None:
        recipes = [load_recipe(recipe, sets)]
    else:
        recipes = [load_recipe("safe", [f"model.base={name}", *sets]) for name in MODELS]
    documents = [gpu_fit(r, _placement(r), gpus, bytes_) for r in recipes]
    if json:
        print_json(documents[0] if recipe is not None else documents)
        return
    for i, document in enumerate(documents):
        if i:
            out.print()
        print_fit(document)
    out.print(NOTE)


def _placement(recipe: Any) -> Any:
    from mla_tune.adapter.placement import place
    from mla_tune.arch.lookup import described

    section = recipe.model
    config, arch = described(section)
    placement = place(arch, recipe.adapter)
    if recipe.adapter.modules_to_save:
        from mla_tune.model.modules_to_save import with_whole

        quantized = bool(arch.quantization) or section.quantize != "none"
        placement = with_whole(placement, arch, config, recipe.adapter.modules_to_save, quantized)
    return placement


def _data(recipe: Any) -> tuple[dict[str, Any], int]:
    from mla_tune.arch.lookup import architecture_of
    from mla_tune.console import err
    from mla_tune.data.prepare import prepare, steps_of
    from mla_tune.model.tokenizer import load_tokenizer, tokenizer_source

    section = recipe.model
    prepared = prepare(
        recipe, architecture_of(section), load_tokenizer(tokenizer_source(section), section.trust_remote_code)
    )
    for line in prepared.lines:
        err.print(line, markup=False, soft_wrap=True)
    return prepared.summary(), steps_of(recipe, prepared.train_rows)


def _machine(recipe: Any) -> tuple[bool, str]:
    """(on a GPU, dtype) that train would choose here."""
    import torch

    wanted = recipe.model.device
    gpu = wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())
    dtype = recipe.model.dtype
    return gpu, ("bfloat16" if gpu else "float32") if dtype == "auto" else dtype
