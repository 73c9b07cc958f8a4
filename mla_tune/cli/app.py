"""The entry point of `mla-tune`: register all commands, and turn errors into messages and exit codes.

Each command is one function in a module of this package.  It imports slow libraries inside the function, so that
`--help`, recipe errors and `inspect` answer at once.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Annotated

import typer

from mla_tune import __version__
from mla_tune.cli import bench
from mla_tune.cli.common import BAD_PATH, Command, unusable_path
from mla_tune.console import hush_imports
from mla_tune.errors import Interrupted, MlaTuneError, RecipeError

app = typer.Typer(
    name="mla-tune",
    help="Fine-tune models with Multi-head Latent Attention, merge and absorb the result, and prove it right.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

#: Command → the module of this package whose function `command` it runs, in the order of `--help`.
VERBS = {
    "inspect": "inspect",
    "plan": "plan",
    "data": "data",
    "train": "train",
    "runs": "runs",
    "merge-absorb": "merge_absorb",
    "import-adapter": "import_adapter",
    "verify": "verify",
    "serve-check": "serve_check",
    "generate": "generate",
    "chat": "chat",
    "schema": "schema",
}


def _version(show: bool) -> None:
    if show:
        print(f"mla-tune {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version of mla-tune and exit."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the Python traceback of an error, as a bug report needs it.")
    ] = False,
) -> None:
    if debug:
        os.environ["MLA_TUNE_DEBUG"] = "1"


for _verb, _module in VERBS.items():
    app.command(_verb, cls=Command)(import_module(f"mla_tune.cli.{_module}").command)
for _registered in bench.app.registered_commands:
    _registered.cls = Command
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Run the command line.

    An `MlaTuneError` is printed as `error: …` on standard error and ends the process with the exit code of its class
    (2: the input is wrong; 1: the work failed or a check did not hold; 130: stopped by a signal).  `--debug` raises it
    instead, with its traceback.
    """
    hush_imports()
    try:
        app(prog_name="mla-tune")
    except MlaTuneError as error:
        if os.environ.get("MLA_TUNE_DEBUG"):
            raise
        lines = error.problems if isinstance(error, RecipeError) else [str(error)]
        if "RANK" in os.environ:  # all processes of a run find the same error: one of them prints it
            from mla_tune.training.distributed.launch import is_first_to_say

            lines = [line for line in lines if is_first_to_say(line)]
        for line in lines:
            print(line if isinstance(error, Interrupted) else f"error: {line}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:  # a path that the operating system refuses, wherever it was used first
        if os.environ.get("MLA_TUNE_DEBUG") or not isinstance(error.filename, (str, bytes)):
            raise
        print(f"error: {unusable_path(error)}", file=sys.stderr)
        sys.exit(2 if error.errno in BAD_PATH else 1)
    except SystemExit as leaving:
        if leaving.code == 130:  # Ctrl-C: typer exits without a message
            print("stopped", file=sys.stderr)
        raise
