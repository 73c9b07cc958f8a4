"""`mla-tune chat`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mla_tune.cli.generate import Attention, Model, Seed, Temperature, TopP, named_adapters

_HELP = "/adapter NAME   answer with this adapter ('base': none)\n/reset   forget what was said\n/exit    or Ctrl-D"


def command(
    model: Model,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", metavar="[NAME=]DIR", help="Adapter or run folders to choose from."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Longest answer.")] = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    attention: Attention = "auto",
) -> None:
    """Talk to a model, and switch its adapters on the way."""
    from mla_tune.console import err
    from mla_tune.errors import InputError

    named = named_adapters(adapter or [])
    from mla_tune.inference.requests import BASE_NAME, Request, Settings
    from mla_tune.inference.session import Session

    session = Session(model, named, attention)
    settings = Settings(max_new_tokens, temperature, top_p, seed)
    using = session.adapters[0] if len(session.adapters) == 1 else None
    names = ", ".join([*session.adapters, BASE_NAME])
    err.print(f"{model}: adapters {names}; answering with {using or BASE_NAME}. /help for commands", soft_wrap=True)
    history: list[dict[str, str]] = []
    while (said := _ask(using or BASE_NAME)) is not None:
        word, _, rest = said.strip().partition(" ")
        if not word:
            continue
        if word in ("/exit", "/quit"):
            break
        if word == "/help":
            err.print(_HELP)
        elif word == "/reset":
            history.clear()
            err.print("forgotten")
        elif word == "/adapter":
            name = rest.strip()
            if name in session.adapters or name == BASE_NAME:
                using = None if name == BASE_NAME else name
                err.print(f"answering with {name}")
            else:
                err.print(f"no adapter is called '{name}'. There are: {names}", soft_wrap=True)
        elif word.startswith("/"):
            err.print(f"no such command.\n{_HELP}")
        else:
            history.append({"role": "user", "content": said.strip()})
            try:
                (answer,) = session.answer([Request(messages=list(history), adapter=using)], settings, _tell)
            except InputError as error:  # the window is full
                history.pop()
                err.print(f"{error}; /reset begins anew", soft_wrap=True)
                continue
            print()
            history.append({"role": "assistant", "content": answer.text})


def _ask(name: str) -> str | None:
    """What the user says next; None at the end."""
    try:
        return input(f"{name}> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _tell(text: str) -> None:
    print(text, end="", flush=True)
