"""Options that had another name: an error that names the new one, or a hidden alias."""

from __future__ import annotations

from typing import Annotated

import pytest
import typer

from mla_tune.cli import common
from mla_tune.cli.common import Alias, Command, without_aliases
from mla_tune.errors import InputError


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(common, "OLD_OPTIONS", {"--least": "--min", "--gone": "--elsewhere"})
    monkeypatch.setattr(common, "HIDDEN_ALIASES", {"--fp8": Alias("--quantized", {"bf16": "dequantize"})})
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    said: list[tuple[str, float, str]] = []

    @app.command(cls=Command)
    def work(
        name: str,
        least: Annotated[float, typer.Option("--min")] = 0.0,
        quantized: Annotated[str, typer.Option("--quantized")] = "none",
    ) -> None:
        said.append((name, least, quantized))

    def call(*args: str) -> tuple[str, float, str]:
        app(list(args), standalone_mode=False)
        return said[-1]

    return call


def test_an_old_option_is_an_error_that_names_the_new_one(run) -> None:
    for args in (["x", "--least", "0.5"], ["--least=0.5", "x"]):
        with pytest.raises(InputError, match=r"^--least: renamed: the option is now --min$"):
            run(*args)
    assert run("--", "--least") == ("--least", 0.0, "none")


def test_an_old_option_of_another_command_is_an_unknown_one(run) -> None:
    with pytest.raises(Exception, match="--gone"):
        run("x", "--gone", "1")


@pytest.mark.parametrize("args", [["--fp8", "bf16"], ["--fp8=bf16"], ["--quantized", "dequantize"]])
def test_a_hidden_alias_means_the_option(run, args: list[str]) -> None:
    assert run("x", *args, "--min", "2") == ("x", 2.0, "dequantize")
    assert run("bf16", "--fp8", "keep") == ("bf16", 0.0, "keep")


def test_an_alias_that_a_command_has_itself_is_left_alone() -> None:
    assert list(without_aliases(["--fp8", "bf16"], {"--fp8", "--quantized"})) == ["--fp8", "bf16"]
    assert list(without_aliases(["--", "--fp8", "bf16"], {"--quantized"})) == ["--", "--fp8", "bf16"]
