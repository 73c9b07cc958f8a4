"""`mla-tune generate`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="A model folder, hub id, run folder, adapter folder, or 'embedded'.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to answer; '-' reads standard input.")],
    adapter: Annotated[str | None, typer.Option("--adapter", "-a", help="An adapter or run folder.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", "-t", min=0, help="0: the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the sampling.")] = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it stands, without chat template.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Answer a prompt with a model, merged or with an adapter."""
    import sys

    from mla_tune.console import err, out, print_json
    from mla_tune.errors import InputError

    if prompt == "-":
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise InputError("--prompt is empty")
    from mla_tune.runtime.generate import generate

    answer = generate(
        model, prompt, adapter=adapter, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, raw=raw
    )
    if json:
        print_json(asdict(answer))
        return
    out.print(answer.text, markup=False, soft_wrap=True)
    err.print(f"{answer.tokens} tokens in {answer.seconds:.1f} s, stopped by {answer.stopped}")
