"""A recipe file, or a shipped recipe, and `--set` overrides → a validated `Recipe`, or all faults in one error."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from mla_tune.errors import FileError, RecipeError, did_you_mean
from mla_tune.recipe.renamed import OLD_KEYS
from mla_tune.recipe.schema import Recipe
from mla_tune.recipe.yaml import Document, parse, scalar, shortened
from mla_tune.resources import RECIPES, recipe_names
from mla_tune.user_files import read_text

#: What an empty recipe is answered with.
SHORTEST = """The shortest recipe that works:
  model: {base: embedded}  # or a model's folder, or a hub id
  data:  {path: mbpp}      # or a file of rows"""


def find_recipe(name: str) -> Path:
    """A path as given, else the shipped recipe of that name.  Raises `FileError` where there is neither."""
    path = Path(name)
    try:
        path = path.expanduser()
        if path.is_dir():
            raise FileError(f"{name}: is a folder; a recipe is a YAML file, or one of {', '.join(recipe_names())}")
        if path.exists():
            return path
    except FileError:
        raise
    except (OSError, RuntimeError) as error:  # a name too long, a folder closed to us, `~` of nobody
        raise FileError(f"{shortened(name)}: can't be read: {getattr(error, 'strerror', None) or error}") from None
    stem = name.removesuffix(".yaml").removesuffix(".yml")
    if "/" not in name and stem in recipe_names():
        return RECIPES / f"{stem}.yaml"
    hint = did_you_mean(stem, recipe_names())
    raise FileError(
        f"{name}: no such file, and no shipped recipe of that name{hint} Shipped: {', '.join(recipe_names())}"
    )


def load_recipe(name: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Load a recipe file or a shipped recipe, apply overrides, and validate the result.

    `overrides`: `section.key=value`, the value read as YAML.  Raises `FileError` for a file that can't be read, and
    `RecipeError`, with one line for each fault, for an empty recipe and for everything that is wrong with its keys.
    """
    path = find_recipe(name)
    where = name if path.name == Path(name).name else f"{path.stem} (shipped recipe)"
    document = parse(read_text(path, "a recipe", where), where)
    if document.value in (None, {}):
        raise RecipeError([f"{where}: is empty, and says neither what to train nor on what. {SHORTEST}"])
    return build(document, where, overrides)


def build(doc: Document, where: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Apply overrides to a parsed document and validate it; `where` names it in messages.  Raises `RecipeError`."""
    data = {} if doc.value is None else doc.value
    if not isinstance(data, dict):
        raise RecipeError([f"{where}: expected sections ({', '.join(Recipe.model_fields)}), got a {_kind(data)}"])
    problems: list[str] = []
    from_set: dict[tuple, str] = {}
    for text in overrides:
        problem = _override(data, text, from_set)
        if problem:
            problems.append(problem)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        problems += [_problem(e, doc, where, from_set) for e in error.errors(include_url=False)]
        recipe = None
    if problems or recipe is None:
        raise RecipeError(problems)
    return recipe


def _override(data: dict, text: str, from_set: dict[tuple, str]) -> str | None:
    """Put one `a.b=value` into `data`, and the paths that it set into `from_set`.  Returns what is wrong with it."""
    key, eq, value = text.partition("=")
    shown = text if len(text) <= 120 else f"{text[:117]}…"
    path = tuple(key.strip().split("."))
    if not eq or not all(path):
        return f"--set {shown}: expected a.b=value, such as --set train.max_steps=50"
    try:
        parsed = scalar(value, f"--set {shown}")
    except RecipeError as error:
        return error.problems[0]
    here: Any = data
    for part in path[:-1]:
        if here.get(part) is None:
            here[part] = {}
        here = here[part]
        if not isinstance(here, dict):
            return f"--set {shown}: '{part}' is a {_kind(here)}, not a section"
    here[path[-1]] = parsed
    for i in range(1, len(path) + 1):
        from_set[path[:i]] = f"--set {shown}"
    return None


def _problem(error: Any, doc: Document, where: str, from_set: dict[tuple, str]) -> str:
    """One of pydantic's faults as a line: `where:line: a.b: what is wrong, what was allowed`."""
    loc = tuple(p for p in error["loc"] if p != "[key]")
    path = loc
    while path and path not in doc.lines and path not in from_set:
        path = path[:-1]
    if path in from_set:
        at = from_set[path]
    else:
        at = f"{where}:{doc.lines[path]}" if path in doc.lines else where
    dotted = ".".join(map(str, loc))
    return f"{at}: {dotted + ': ' if dotted else ''}{_what(error, loc)}"


def _what(error: Any, loc: tuple) -> str:
    """What is wrong at the path of keys `loc`, and what was allowed, in our words."""
    kind, ctx, got = error["type"], error.get("ctx", {}), error.get("input")
    if kind == "extra_forbidden":
        fields = list(_model_at(loc[:-1]).model_fields)
        section = ".".join(map(str, loc[:-1]))
        if (new := OLD_KEYS.get(f"{section}.{loc[-1]}")) in fields:
            return f"renamed: the key is now {section}.{new}"
        kind_of = f"keys of {section}" if section else "sections"
        return f"unknown key '{loc[-1]}'{did_you_mean(str(loc[-1]), fields) or '.'} The {kind_of}: {', '.join(fields)}"
    if kind == "value_error":
        return str(ctx.get("error", error["msg"]))
    if kind == "literal_error":
        allowed = ctx["expected"].replace(" or ", ", ")
        names = [n.strip().strip("'") for n in allowed.split(",")]
        return f"expected one of {', '.join(names)}, got {shortened(got)}{did_you_mean(str(got)[:80], names)}"
    expected = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
        "string_type": "text",
        "list_type": "a list",
        "dict_type": "a mapping of keys to values",
        "model_type": "a section with keys",
        "model_attributes_type": "a section with keys",
        "finite_number": "a finite number",
    }.get(kind)
    if expected:
        return f"expected {expected}, got {shortened(got)} ({_kind(got)})"
    bounds = {"greater_than": "more than {gt}", "greater_than_equal": "at least {ge}", "less_than": "less than {lt}",
              "less_than_equal": "at most {le}"}  # fmt: skip
    if kind in bounds:
        return f"expected {bounds[kind].format(**ctx)}, got {shortened(got)}"
    return f"{error['msg'][:1].lower()}{error['msg'][1:]}, got {shortened(got)}"


def _model_at(loc: tuple) -> type[BaseModel]:
    """The section class that a path of keys leads to."""
    model: type[BaseModel] = Recipe
    for part in loc:
        info = model.model_fields.get(str(part))
        if info is None:
            continue  # a key of a mapping such as adapter.roles.W_O
        for candidate in (info.annotation, *get_args(info.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                model = candidate
                break
    return model


def _kind(value: Any) -> str:
    """The kind of a value in the words of YAML."""
    return {dict: "mapping", list: "list", str: "text", bool: "true/false", int: "whole number", float: "number"}.get(
        type(value), "nothing" if value is None else type(value).__name__
    )


def dump(recipe: Recipe) -> str:
    """A recipe as YAML with every default spelled out, as the run folder keeps it."""
    import yaml

    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
