"""`mla-tune plan`."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def command(
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A recipe file, or the name of a shipped recipe.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key: --set adapter.rank=8.")] = None,
    data: Annotated[bool, typer.Option("--data/--no-data", help="Read and tokenise the data, to count it.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show what train would do: matrices, learning rates, steps, memory.  No weights are read."""
    from mla_tune.console import print_json
    from mla_tune.recipe.load import load_recipe
    from mla_tune.survey.plan import plan

    loaded = load_recipe(recipe, list(set_ or []))
    summary, steps = _data(loaded) if data else (None, loaded.train.max_steps)
    gpu, dtype = _machine(loaded)
    document = plan(loaded, data=summary, steps=steps, gpu=gpu, dtype=dtype)
    if json:
        print_json(document)
        return
    from mla_tune.report.plan_table import print_plan

    print_plan(document, loaded)


def _data(recipe: Any) -> tuple[dict[str, Any], int]:
    from mla_tune.console import err
    from mla_tune.data.prepare import prepare, steps_of
    from mla_tune.model.tokenizer import load_tokenizer, tokenizer_source
    from mla_tune.survey.source import architecture_of

    section = recipe.model
    prepared = prepare(
        recipe, architecture_of(section), load_tokenizer(tokenizer_source(section), section.trust_remote_code)
    )
    for line in prepared.lines:
        err.print(line, markup=False, soft_wrap=True)
    return prepared.summary(), steps_of(recipe, len(prepared.train_rows))


def _machine(recipe: Any) -> tuple[bool, str]:
    """(on a GPU, dtype) that train would choose here."""
    import torch

    wanted = recipe.model.device
    gpu = wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())
    dtype = recipe.model.dtype
    return gpu, ("bfloat16" if gpu else "float32") if dtype == "auto" else dtype
