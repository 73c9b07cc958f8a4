"""`mla-tune generate`: answer prompts with a model, merged or with unmerged adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from mla_tune.inference.requests import Request

# Arguments and options that `chat` has, too.
Model = Annotated[
    str,
    typer.Argument(
        help="A model folder, hub id, run folder (its merged model, or its base and adapter), adapter folder (with the "
        "base that it names), or 'embedded'."
    ),
]
Temperature = Annotated[
    float,
    typer.Option("--temperature", "-t", min=0, help="Temperature of sampling; 0 takes the most likely token (greedy)."),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the random numbers in sampling.")]
TopP = Annotated[
    float,
    typer.Option(
        "--top-p", min=0.01, max=1, help="Sample from the most likely tokens that together have this probability."
    ),
]
Attention = Annotated[
    Literal["auto", "absorbed", "expanded"],
    typer.Option(
        help="Compute attention absorbed (over the latent cache), expanded (as stock transformers does), or auto: "
        "whichever is faster for each call."
    ),
]


def command(
    model: Model,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Prompt to answer; '-' reads it from standard input.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="File of prompts: a JSON object a line, with prompt or messages, and optionally adapter.",
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-a",
            metavar="[NAME=]DIR",
            help="Load an adapter folder or run folder, under a name; repeatable. Each adapter answers --prompt.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Maximum tokens of an answer.")
    ] = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Number of prompts answered at once.")] = 8,
    attention: Attention = "auto",
    stream: Annotated[
        bool, typer.Option("--stream", help="Print the text of a single answer while it is generated.")
    ] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document: an answer, or a list of answers.")
    ] = False,
) -> None:
    """Answer prompts with a model, merged or with unmerged adapters, several in one batch."""
    import sys

    from mla_tune.console import err, out, print_json
    from mla_tune.errors import InputError

    if (prompt is None) == (prompts is None):
        raise InputError("give either --prompt TEXT, or --prompts FILE.jsonl with many prompts")
    if prompt == "-":
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise InputError("--prompt is empty")
    named = named_adapters(adapter or [])
    from mla_tune.inference.requests import GenerationSettings
    from mla_tune.inference.session import Session

    session = Session(model, named, attention)
    requests = _requests(prompt, prompts, session.adapters)
    if stream and (json or len(requests) > 1):
        raise InputError("--stream prints one answer as text: leave out --json, and give one prompt and one adapter")
    settings = GenerationSettings(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, raw=raw, batch_size=batch
    )
    if reason := session.not_absorbed_reason():
        err.print(f"note: attention is expanded: {reason}", soft_wrap=True)
    on_text = (lambda text: print(text, end="", flush=True)) if stream else None
    answers = session.answer(requests, settings, on_text)
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
    """Parse the values of `--adapter`, `NAME=DIR` or `DIR`; return name → folder.

    Without NAME, a single adapter is called `adapter`, and one of several has the name of its folder.  Raises
    `InputError` for a value that is neither, and for a name given twice.
    """
    from mla_tune.errors import InputError

    named: dict[str, str] = {}
    for text in given:
        name, sign, folder = text.partition("=")
        if not sign or Path(text).expanduser().exists():
            path = Path(text).expanduser()
            name, folder = ("adapter" if len(given) == 1 else path.resolve().name), text
        if not name or not folder:
            raise InputError(f"--adapter {text}: expected NAME=DIR or DIR")
        if name in named:
            raise InputError(
                f"--adapter {text}: another adapter is already called '{name}': give NAME=DIR with another name"
            )
        named[name] = folder
    return named


def _requests(prompt: str | None, prompts: Path | None, adapters: list[str]) -> list[Request]:
    """Return the requests of the file `prompts`, or `prompt` for each adapter."""
    from mla_tune.inference.requests import Request, read_requests

    if prompts is not None:
        return read_requests(prompts, adapters[0] if len(adapters) == 1 else None)
    return [Request(prompt, adapter=name) for name in adapters or [None]]
