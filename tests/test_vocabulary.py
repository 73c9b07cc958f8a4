"""One word for one thing, and the field's word: names that were given up do not come back.

The left side of the vocabulary table of issue 15, as public names of modules, classes, functions, methods and fields in
`mla_tune/`, as words of the command line's help, and as keys of recipes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from mla_tune.cli.app import VERBS, app
from mla_tune.recipe.schema import Recipe

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mla_tune"

#: Modules and packages.
MODULES = """
    survey runtime mla choose packed norms factors loss recompute order optim spike samples arguments whole
    frozen rows_choose latent stored contenders probe probe_model probe_peft probe_weights probe_attention proof
    proof_values proof_numbers proof_layout locate flat mix view schedules naming wrappers registry_of_families
    detect suited fit codec arrays quant quant_config initialise processes zero3 heads
"""
#: Classes, functions, methods and fields, wherever they stand.
NAMES = """
    Choice Ways MEMO EvenSampler FILLER is_filler with_filler by_first first_then_others with_whole
    whole_lr_scale whole_names whole_params whole_copies stand_in let_shard let_rows_choose can_be_mixed Latent
    RoomyLayer Stored obstacle obstacles Way ways_of Probe ProbeReport Streamed SideBySide side_by_side
    NumberCheck Survival survival min_survival raise_together raised twin twins twin_keys untie carry_files
    Places locate FlatCollator go_on look Origin borrows_key suited Judgement Judgment AdapterDelta Update
    Factors LoraTensors Rows Attached Place Layout Source Names Keys Piece Memory Reader frozen_experts
    FrozenLinear Matrix Naming accumulation checkpointing lora_plus too_long bad_rows loss_on
"""
#: Words that a user would read in `--help`.
HELP = ("--min-survival", "survival", "probe", "--no-probe", "accumulation", "--fp8", "--untie", "twin", "raised")
#: Keys of recipes.
KEYS = ("accumulation", "checkpointing", "lora_plus", "whole_lr_scale", "too_long", "bad_rows", "loss_on")
BRITISH = re.compile(
    r"\w*(?:quantis|initialis|normalis|tokenis|serialis|parametris|randomis|materialis|recognis|optimis|organis|summaris|"
    r"behaviou?r(?<=iour)|colour|neighbour|judgement|licence|labelled|modelled|signalled|learnt)\w*",
    re.IGNORECASE,
)


def public_names(file: Path) -> Iterator[str]:
    """Public classes, functions, methods, and annotated fields of a module."""

    def walk(node: ast.Module | ast.ClassDef) -> Iterator[str]:
        for child in node.body:
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                if not child.name.startswith("_"):
                    yield child.name
                    if isinstance(child, ast.ClassDef):
                        yield from walk(child)
            elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
                yield child.target.id
            elif isinstance(child, ast.Assign):
                yield from (t.id for t in child.targets if isinstance(t, ast.Name))

    yield from walk(ast.parse(file.read_text(encoding="utf-8")))


def test_no_module_has_an_old_name() -> None:
    names = {p.stem for p in PACKAGE.rglob("*.py")} | {p.name for p in PACKAGE.rglob("*") if p.is_dir()}
    assert not names & set(MODULES.split())


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_no_public_name_is_an_old_one(file: Path) -> None:
    assert not set(public_names(file)) & set(NAMES.split())


def test_the_walk_sees_names(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("class Survival:\n    kept: int\n    def raised(self): ...\nWay = 1\n")
    assert set(public_names(tmp_path / "m.py")) == {"Survival", "kept", "raised", "Way"}


def commands() -> list[list[str]]:
    group = typer.main.get_command(app)
    found: list[list[str]] = [[], *([verb] for verb in VERBS)]
    bench = group.commands["bench"]  # type: ignore[attr-defined]
    return [*found, ["bench"], *(["bench", name] for name in bench.commands)]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_help_has_no_old_word(command: list[str]) -> None:
    text = CliRunner().invoke(app, [*command, "--help"], terminal_width=200).output
    assert "Usage" in text
    assert not [word for word in HELP if re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text)]


def test_recipes_have_no_old_key() -> None:
    keys = {name for section in Recipe.model_fields.values() for name in section.annotation.model_fields}  # type: ignore[union-attr]
    assert not keys & set(KEYS)
    for file in [*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        text = file.read_text(encoding="utf-8")
        assert not re.search(rf"\b(?:{'|'.join(KEYS)}):", text), file


def test_american_spelling() -> None:
    wrong = []
    for file in [*PACKAGE.rglob("*.py"), *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("*.yaml")]:
        found = {m.group(0) for m in BRITISH.finditer(file.read_text(encoding="utf-8"))}
        wrong += [f"{file.relative_to(ROOT)}: {', '.join(sorted(found))}"] if found else []
    assert not wrong
