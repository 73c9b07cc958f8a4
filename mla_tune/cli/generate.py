"""`mla-tune generate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from mla_tune.inference.requests import Request

#: What `chat` is told, too.
Model = Annotated[str, typer.Argument(help="A model folder, hub id, run folder, adapter folder, or 'embedded'.")]
Temperature = Annotated[float, typer.Option("--temperature", "-t", min=0, help="0: the likeliest token.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the sampling.")]
TopP = Annotated[
    float, typer.Option("--top-p", min=0.01, max=1, help="Sample among the likeliest tokens of this share.")
]
Attention = Annotated[
    Literal["auto", "absorbed", "expanded"],
    typer.Option(help="'absorbed' decodes in the latent space; 'auto' takes the cheaper one for each call."),
]


def command(
    model: Model,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="What to answer; '-' reads standard input.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help="Many: a line each, with prompt or messages, and adapter."),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-a",
            metavar="[NAME=]DIR",
            help="Adapter or run folder. With several, each answers --prompt.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Longest answer.")] = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Prompts answered at a time.")] = 8,
    attention: Attention = "auto",
    stream: Annotated[bool, typer.Option("--stream", help="Show the text as it comes.")] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it stands, without chat template.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document: an answer, or a list.")] = False,
) -> None:
    """Answer prompts with a model, merged or with unmerged adapters, several in one batch."""
    import sys

    from mla_tune.console import err, out, print_json
    from mla_tune.errors import InputError

    if (prompt is None) == (prompts is None):
        raise InputError("give --prompt TEXT, or --prompts FILE.jsonl for many")
    if prompt == "-":
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise InputError("--prompt is empty")
    named = named_adapters(adapter or [])
    from mla_tune.inference.requests import Settings
    from mla_tune.inference.session import Session

    session = Session(model, named, attention)
    requests = _requests(prompt, prompts, session.adapters)
    if stream and (json or len(requests) > 1):
        raise InputError("--stream shows one answer as text: leave out --json, and ask one prompt of one adapter")
    settings = Settings(max_new_tokens, temperature, top_p, seed, raw, batch)
    if why := session.not_absorbed():
        err.print(f"note: attention is expanded: {why}", soft_wrap=True)
    shown = (lambda text: print(text, end="", flush=True)) if stream else None
    answers = session.answer(requests, settings, shown)
    if json:
        print_json([a.to_json() for a in answers] if prompts or len(answers) > 1 else answers[0].to_json())
        return
    for answer in answers:
        if len(answers) > 1:
            title = answer.prompt if prompts else ""
            out.print(f"── {answer.adapter or 'base'}  {title}".rstrip(), markup=False, soft_wrap=True)
        if stream:
            print()
        else:
            out.print(answer.text, markup=False, soft_wrap=True)
        if len(answers) == 1:
            err.print(f"{answer.tokens} tokens in {answer.seconds:.1f} s, stopped by {answer.stopped}")


def named_adapters(given: list[str]) -> dict[str, str]:
    """`NAME=DIR` or `DIR`: a folder without a name is `adapter`, or has its own where there are several."""
    from mla_tune.errors import InputError

    named: dict[str, str] = {}
    for text in given:
        name, sign, folder = text.partition("=")
        if not sign or Path(text).expanduser().exists():
            path = Path(text).expanduser()
            name, folder = ("adapter" if len(given) == 1 else path.resolve().name), text
        if not name or not folder:
            raise InputError(f"--adapter {text}: NAME=DIR or DIR was expected")
        if name in named:
            raise InputError(f"--adapter {text}: '{name}' is the name of another adapter already: give NAME=DIR")
        named[name] = folder
    return named


def _requests(prompt: str | None, prompts: Path | None, adapters: list[str]) -> list[Request]:
    from mla_tune.inference.requests import Request, read_requests

    if prompts is not None:
        return read_requests(prompts, adapters[0] if len(adapters) == 1 else None)
    return [Request(prompt, adapter=name) for name in adapters or [None]]
