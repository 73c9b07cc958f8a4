"""The command line itself: help, exit codes, and what must stay quick."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mla_tune import __version__
from mla_tune.cli.app import VERBS
from mla_tune.errors import FileError, InputError, MlaTuneError


def test_help_lists_every_verb_and_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['mla-tune', '--help']\n"
        "from mla_tune.cli.app import main\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'datasets', 'matplotlib', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for verb in VERBS:
        assert verb in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_for_every_option(cli, verb: str) -> None:
    done = cli(verb, "--help")
    assert done.code == 0
    assert "Usage: mla-tune" in done.out


def test_version(cli) -> None:
    assert cli("--version").out.strip() == f"mla-tune {__version__}"


@pytest.mark.parametrize(
    "args, code, words",
    [
        (["inspekt"], 2, "inspekt"),
        (["train"], 2, "--recipe"),
        (["train", "--recipe", "sfae"], 2, "did you mean 'safe'?"),
        (["inspect", "deepsek-v3"], 2, "did you mean 'deepseek-v3'?"),
        (["merge-absorb", "nowhere"], 2, "nowhere"),
        (["generate", "embedded"], 2, "--prompt"),
        (["plan", "--recipe", "safe", "--set", "train.seed=x"], 2, "expected a whole number, got 'x'"),
    ],
)
def test_mistakes_exit_with_2_and_no_traceback(cli, args: list[str], code: int, words: str) -> None:
    done = cli(*args)
    assert done.code == code
    assert words in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def test_debug_shows_the_traceback(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLA_TUNE_DEBUG", "1")
    with pytest.raises(FileError):
        cli("train", "--recipe", "sfae")


def test_errors_are_also_the_built_in_ones() -> None:
    assert issubclass(InputError, ValueError)
    assert issubclass(FileError, OSError)
    assert all(issubclass(e, MlaTuneError) for e in (InputError, FileError))
