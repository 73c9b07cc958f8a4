"""`mla-tune data`: show the samples that a recipe trains on, with their lengths and counts."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Recipe file or shipped recipe, for example safe.")],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Replace one key of the recipe, for example --set data.path=mine.jsonl. May be repeated."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", min=0, help="Samples to show of each data source.")] = 2,
    json: Annotated[bool, typer.Option("--json", help="Print counts and samples as one JSON document.")] = False,
) -> None:
    """Show what a recipe trains on: samples with the trained tokens marked, their lengths, and what packing saves.

    Reads the data and the tokenizer, but no weights.
    """
    from mla_tune.console import err, print_json
    from mla_tune.data.prepare import prepare
    from mla_tune.data.preview import preview
    from mla_tune.model.tokenizer import load_tokenizer, tokenizer_source
    from mla_tune.recipe.load import load_recipe
    from mla_tune.report.data_preview import print_preview
    from mla_tune.training.resolve import check_held_out, resolve

    resolved = resolve(load_recipe(recipe, list(set_ or [])))
    for note in resolved.notes:
        err.print(f"note: {note}", markup=False, soft_wrap=True)
    section = resolved.recipe.model
    tokenizer = load_tokenizer(tokenizer_source(section), section.trust_remote_code)
    prepared = prepare(resolved.recipe, resolved.arch, tokenizer)
    for line in prepared.lines:
        err.print(line, markup=False, soft_wrap=True)
    check_held_out(resolved.recipe, prepared)
    found = preview(prepared, tokenizer, resolved.recipe, samples)
    print_json(found) if json else print_preview(found)
