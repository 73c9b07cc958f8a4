"""`mla-tune schema`: print the JSON Schema of a recipe, for editors."""

from __future__ import annotations


def command() -> None:
    """Print the JSON Schema of a recipe, with which an editor completes and checks keys."""
    from mla_tune.console import print_json
    from mla_tune.recipe.schema import Recipe

    schema = Recipe.model_json_schema()
    print_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})
