"""The README can't rot: its commands, its recipe and its pictures are real."""

from __future__ import annotations

import re
from pathlib import Path

from mla_tune.cli.app import VERBS, app
from mla_tune.recipe.load import build
from mla_tune.recipe.yaml import parse
from mla_tune.resources import recipe_names

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_its_two_commands_stand_where_ci_finds_them() -> None:
    for name, part in (("main", "mla-tune train --recipe safe"), ("test", "python -m pytest")):
        block = re.search(rf"<!-- command: {name} -->\n```bash\n(.*?)```", README, re.S)
        assert block
        assert part in block[1]


def test_its_recipe_loads() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.S)
    assert build(parse(text, "README.md"), "README.md").adapter.targets == ["W_O", "mlp"]


def test_every_verb_and_recipe_in_it_exists_and_every_verb_is_named() -> None:
    # A command stands at the start of a line, after a prompt or `next:`, or within backticks.
    named = set(re.findall(r"(?:^|\$ |`|&& |next: )mla-tune ([a-z-]+)", README, re.M))
    verbs = set(VERBS) | {str(group.name) for group in app.registered_groups}
    assert named <= verbs
    assert verbs - {"schema"} <= named
    assert set(re.findall(r"--recipe ([A-Za-z_-]+)(?:\s|$)", README)) <= set(recipe_names())


def test_its_links_and_pictures_are_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_nothing_was_left_to_fill_in() -> None:
    assert not re.search(r"@[A-Z_]+@|TODO|FIXME", README)
