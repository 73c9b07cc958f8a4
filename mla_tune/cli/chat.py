"""`mla-tune chat`: talk to a model, and switch between its adapters."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mla_tune.cli.generate import Attention, Model, Seed, Temperature, TopP, named_adapters

_HELP = """\
/adapter NAME   answer with this adapter from now on ('base': without an adapter)
/reset          forget the conversation
/help           print this list
/exit           end the chat (also Ctrl-D)"""


def command(
    model: Model,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-a",
            metavar="[NAME=]DIR",
            help="Load an adapter or run folder, named for /adapter; repeatable.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Maximum tokens of an answer.")
    ] = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    attention: Attention = "auto",
) -> None:
    """Talk to a model, and switch between its adapters with /adapter NAME."""
    from mla_tune.console import err
    from mla_tune.errors import InputError

    named = named_adapters(adapter or [])
    from mla_tune.inference.requests import BASE_NAME, GenerationSettings, Request
    from mla_tune.inference.session import Session

    session = Session(model, named, attention)
    settings = GenerationSettings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    current = session.adapters[0] if len(session.adapters) == 1 else None
    names = ", ".join([*session.adapters, BASE_NAME])
    err.print(f"{model}: adapters {names}; answering with {current or BASE_NAME}. /help for commands", soft_wrap=True)
    history: list[dict[str, str]] = []
    while (text := _read_input(current or BASE_NAME)) is not None:
        word, _, rest = text.strip().partition(" ")
        if not word:
            continue
        if word in ("/exit", "/quit"):
            break
        if word == "/help":
            err.print(_HELP)
        elif word == "/reset":
            history.clear()
            err.print("conversation forgotten")
        elif word == "/adapter":
            name = rest.strip()
            if name in session.adapters or name == BASE_NAME:
                current = None if name == BASE_NAME else name
                err.print(f"answering with {name}")
            else:
                err.print(f"no adapter is called '{name}'. There are: {names}", soft_wrap=True)
        elif word.startswith("/"):
            err.print(f"there is no command {word}. Commands:\n{_HELP}", markup=False)
        else:
            history.append({"role": "user", "content": text.strip()})
            try:
                (answer,) = session.answer([Request(messages=list(history), adapter=current)], settings, _print_piece)
            except InputError as error:  # the conversation is longer than the model allows
                history.pop()
                err.print(f"{error}; or /reset to forget the conversation", soft_wrap=True)
                continue
            print()
            history.append({"role": "assistant", "content": answer.text})


def _read_input(name: str) -> str | None:
    """Return the next line of the user; None at the end of the input."""
    try:
        return input(f"{name}> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)
