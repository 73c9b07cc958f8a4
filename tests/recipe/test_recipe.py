"""Recipes: strict YAML, every fault at once with its place, overrides, and a JSON Schema that agrees."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from mla_tune.errors import FileError, RecipeError
from mla_tune.recipe.checks import warnings
from mla_tune.recipe.load import dump, load_recipe
from mla_tune.recipe.renamed import OLD_KEYS
from mla_tune.recipe.schema import Recipe
from mla_tune.recipe.yaml import parse
from mla_tune.resources import RECIPES, recipe_names
from mla_tune.sockets import ADAPTER_METHODS, OBJECTIVES

CONTRACT = """\
model:     {base: embedded, dtype: float32}
adapter:   {method: lora, targets: [W_O, mlp], rank: 16, alpha: 32, dropout: 0.0,
            roles: {W_O: {rank: 8, lr_scale: 0.5}}}
optimizer: {learning_rate: 2e-4, mla_lr_scale: 0.65, schedule: cosine, warmup_ratio: 0.05}
data:      {path: mbpp, prompt: prompt, completion: completion, eval_fraction: 0.1}
train:     {max_steps: 100, batch_size: 8, max_length: 512, packing: true, seed: 0}
output:    {dir: runs/safe}
"""


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


def problems(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as error:
        load_recipe(write(tmp_path, text), overrides)
    return error.value.problems


def test_the_contract_loads_as_written(tmp_path: Path) -> None:
    r = load_recipe(write(tmp_path, CONTRACT))
    assert r.optimizer.learning_rate == 2e-4
    assert r.adapter.targets == ["W_O", "mlp"]
    assert r.adapter.roles["W_O"].rank == 8
    assert r.adapter.roles["W_O"].lr_scale == 0.5
    assert r.train.packing is True


@pytest.mark.parametrize(
    "text, value",
    [("1e-4", 1e-4), ("2E5", 2e5), ("1.5e3", 1500.0), ("-3", -3), ("0.5", 0.5), (".5", 0.5), ("5.", 5.0)],
)
def test_yaml_numbers(text: str, value: float) -> None:
    got = parse(f"x: {text}", "t").value["x"]
    assert got == value
    assert isinstance(got, (int, float))


def test_yaml_words_stay_words() -> None:
    doc = parse("{a: on, b: no, c: 'true', d: true, e: 1:30, f: .nan, g: 1e, h: e5, i: 010}", "t").value
    assert doc["a"] == "on"
    assert doc["b"] == "no"
    assert doc["c"] == "true"
    assert doc["d"] is True
    assert doc["e"] == "1:30"
    assert math.isnan(doc["f"])
    assert (doc["g"], doc["h"], doc["i"]) == ("1e", "e5", "010")


def test_pyyaml_itself_would_get_these_wrong() -> None:
    """Why the loader exists: if PyYAML changes, it can go."""
    assert yaml.safe_load("x: 1e-4")["x"] == "1e-4"
    assert yaml.safe_load("{x: 1, x: 2}") == {"x": 2}


def test_duplicate_keys_name_both_lines(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, "train:\n  seed: 1\n  max_steps: 3\n  seed: 2\n")
    assert ":4: train.seed: given twice, first on line 2" in problem


def test_all_faults_come_at_once_with_line_and_advice(tmp_path: Path) -> None:
    text = (
        "model: {base: embedded, dtyp: float32}\n"
        "adapter: {method: lroa, targets: [W_UVK, mlp], rank: 0, alpha: x}\n"
        "optimizer: {learning_rate: abc}\n"
        "trian: {max_steps: 3}\n"
        "data: 5\n"
    )
    found = problems(tmp_path, text, "train.bach=3")
    for part in (
        ":1: model.dtyp: unknown key 'dtyp'; did you mean 'dtype'?",
        ":2: adapter.method: expected one of lora, rslora, dora, none, got 'lroa'; did you mean 'lora'?",
        ":2: adapter.targets: unknown role or group 'W_UVK'; did you mean 'W_UKV'?",
        ":2: adapter.rank: expected at least 1, got 0",
        ":2: adapter.alpha: expected a number, got 'x' (text)",
        ":3: optimizer.learning_rate: expected a number, got 'abc' (text)",
        ":4: trian: unknown key 'trian'; did you mean 'train'?",
        ":5: data: expected a section with keys, got 5",
        "--set train.bach=3: train.bach: unknown key 'bach'",
    ):
        assert any(part in p for p in found), (part, found)
    assert len(found) == 9


@pytest.mark.parametrize(
    "text, part",
    [
        ("train: {max_steps: 1.5}", "expected a whole number, got 1.5"),
        ("train: {packing: yes}", "expected true or false, got 'yes'"),
        ("train: {max_steps: true}", "expected a whole number, got True"),
        ("optimizer: {learning_rate: .nan}", "finite"),
        ("adapter: {targets: []}", "expected a preset or a list of roles"),
        ("adapter: {targets: sfae}", "did you mean 'safe'?"),
        ("adapter: {roles: {W_o: {rank: 3}}}", "did you mean 'W_O'?"),
        ("adapter: {roles: {W_O: {rnk: 3}}}", "unknown key 'rnk'; did you mean 'rank'?"),
        ("model: {base: x, preset: tiny}", "give 'base' or 'preset', not both"),
        ("train: {early_stopping: 3}", "'early_stopping' needs 'eval_every'"),
        ("- a\n- b", "expected sections (model, adapter"),
        ("a: [", "not valid YAML"),
        ("a: b: c", ":1:5: not valid YAML"),
    ],
)
def test_single_faults(tmp_path: Path, text: str, part: str) -> None:
    found = problems(tmp_path, text)
    assert len(found) == 1
    assert part in found[0]


def test_an_old_key_names_the_new_one_among_all_other_faults(tmp_path: Path) -> None:
    text = "train:\n  accumulation: 4\n  sede: 1\ndata: {too_long: drop, train_on: none}\n"
    found = problems(tmp_path, text, "optimizer.lora_plus=16", "train.checkpointing=mla")
    for part in (
        ":2: train.accumulation: renamed: the key is now train.gradient_accumulation_steps",
        ":3: train.sede: unknown key 'sede'; did you mean 'seed'?",
        ":4: data.too_long: renamed: the key is now data.on_overflow",
        ":4: data.train_on: expected one of completion, all, got 'none'",
        "--set optimizer.lora_plus=16: optimizer.lora_plus: renamed: the key is now optimizer.lora_plus_ratio",
        "--set train.checkpointing=mla: train.checkpointing: renamed: the key is now train.activation_checkpointing",
    ):
        assert any(part in p for p in found), (part, found)
    assert len(found) == 6


@pytest.mark.parametrize("old", OLD_KEYS)
def test_every_old_key_leads_to_a_key_that_is_there(old: str) -> None:
    section, _, key = old.partition(".")
    fields = Recipe.model_fields[section].annotation.model_fields
    assert OLD_KEYS[old] in fields
    assert key not in fields
    with pytest.raises(RecipeError, match=rf"{old}: renamed: the key is now {section}\.{OLD_KEYS[old]}$"):
        load_recipe("safe", [f"{old}=1"])


def test_overrides_are_yaml_and_nest(tmp_path: Path) -> None:
    r = load_recipe("safe", ["optimizer.learning_rate=1e-5", "adapter.roles.W_O.rank=4", "adapter.targets=[W_O]"])
    assert r.optimizer.learning_rate == 1e-5
    assert r.adapter.roles["W_O"].rank == 4
    assert r.adapter.targets == ["W_O"]
    for bad, part in (("x", "expected a.b=value"), (".=1", "expected a.b=value"), ("train.seed.x=1", "not a section")):
        with pytest.raises(RecipeError, match=part):
            load_recipe("safe", [bad])


def test_a_long_override_is_cut_in_its_error() -> None:
    with pytest.raises(RecipeError, match="nested too deeply") as error:
        load_recipe("safe", [f"data.path={'[' * 50_000}"])
    assert len(str(error.value)) < 300


def test_missing_recipe_names_the_shipped_ones() -> None:
    with pytest.raises(FileError, match=r"did you mean 'safe'\? Shipped: W_UKV-priority, all-linear"):
        load_recipe("sfae")
    with pytest.raises(FileError, match="no such file"):
        load_recipe("no/such.yaml")


EMPTY = ["", "\n\n", "# model: {base: x}\n", "{}", "---\n...\n", "null", "\ufeff# nothing\n"]


@pytest.mark.parametrize("text", EMPTY)
def test_an_empty_recipe_shows_the_shortest_that_works(tmp_path: Path, text: str) -> None:
    (problem,) = problems(tmp_path, text, "train.seed=1")
    first, _, shortest = problem.partition("The shortest recipe that works:\n")
    assert first.endswith("mine.yaml: is empty, and says neither what to train nor on what. ")
    recipe = load_recipe(write(tmp_path, shortest))
    assert (recipe.model.base, recipe.data.path) == ("embedded", "mbpp")


@pytest.mark.parametrize(
    "text, part",
    [
        ("a: &a [*a]", ":1: more than 40 levels"),
        ("a: &a [1, 2, 3]\nb: &b [" + "*a, " * 99 + "]\nc: [" + "*b, " * 99 + "]", "more than 10,000 values"),
        ("[" * 100_000, "nested too deeply"),
        ("train:\n  seed: !!int x", ":2: train.seed: 'x' is no int: invalid literal"),
        (
            "train:\n  max_steps: 2026-99-99",
            ":2: train.max_steps: '2026-99-99' is no timestamp: month must be in 1..12",
        ),
        ('data:\n  path: "a\\0b"', ":2: data.path: holds U+0000, which no name or path can"),
        ('data:\n  path: "\\ud800"', "holds U+D800"),
        ("model: {base: x}\n---\nmodel: {base: y}", ":2:1: not valid YAML"),
        ("1: {2: 3}", "1: 1: keys should be strings, got 1"),
    ],
)
def test_yaml_that_no_recipe_is(tmp_path: Path, text: str, part: str) -> None:
    (problem,) = problems(tmp_path, text)
    assert part in problem
    assert len(problem) < 300


def test_anchors_are_no_bomb(tmp_path: Path) -> None:
    text = "adapter: {roles: {W_O: &few {rank: 4}, gate: *few}, targets: [W_O, gate]}"
    assert load_recipe(write(tmp_path, text)).adapter.roles["gate"].rank == 4


def test_a_recipe_whose_name_is_no_path(tmp_path: Path) -> None:
    for name in ("x" * 5000, "~nobody-is-called-so/r.yaml", "a\0b"):
        with pytest.raises(FileError) as error:
            load_recipe(name)
        assert len(str(error.value)) < 500


def test_dump_loads_back(tmp_path: Path) -> None:
    recipe = load_recipe("W_UKV-priority")
    assert load_recipe(write(tmp_path, dump(recipe))) == recipe


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_satisfy_the_json_schema(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    schema = Recipe.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(parse(text, name).value, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"train": {"sede": 1}}, schema)


def test_shipped_schema_is_current(cli) -> None:
    printed = cli("schema")
    assert printed.code == 0
    assert json.loads(printed.out) == json.loads((RECIPES / "schema.json").read_text()), (
        "run: mla-tune schema > recipes/schema.json"
    )


def test_every_field_is_documented() -> None:
    for model in json.loads(json.dumps(Recipe.model_json_schema()))["$defs"].values():
        for name, field in model["properties"].items():
            assert field.get("description"), name


def test_scale_outside_the_advised_range_warns() -> None:
    assert warnings(load_recipe("safe")) == []
    (note,) = warnings(load_recipe("safe", ["optimizer.mla_lr_scale=1.0"]))
    assert "0.5 to 0.8" in note


def test_a_recipe_error_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['mla-tune', 'train', '--recipe', sys.argv[1]]\n"
        "from mla_tune.cli.app import main\n"
        "try: main()\n"
        "except SystemExit as e: assert e.code == 2, e.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    path = write(tmp_path, "trian: {}\n")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "did you mean 'train'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_documented_keys_are_current() -> None:
    script = Path(__file__).parents[2] / "scripts" / "make_recipe_docs.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_registered_is_a_name_in_a_recipe() -> None:
    with pytest.raises(RecipeError, match="expected one of lora, rslora, dora, none, got 'toy'"):
        load_recipe("safe", ["adapter.method=toy"])
    with pytest.raises(RecipeError, match=r"train.objective: expected one of sft, got 'stf'; did you mean 'sft'\?"):
        load_recipe("safe", ["train.objective=stf"])
    toy: Any = object()
    with ADAPTER_METHODS.registered("toy", toy), OBJECTIVES.registered("mine", toy):
        recipe = load_recipe("safe", ["adapter.method=toy", "train.objective=mine"])
    assert (recipe.adapter.method, recipe.train.objective) == ("toy", "mine")
    assert load_recipe("safe").train.objective == "sft"
    with pytest.raises(RecipeError, match="expected one of lora, rslora, dora, none, got '3'"):
        load_recipe("safe", ["adapter.method=3"])
