"""`mla-tune bench`: measure decoding and training on this machine, against stock transformers and TRL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from mla_tune.cli.common import Json

app = typer.Typer(help="Measure mla-tune on this machine, against stock transformers and TRL.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Measure mla-tune on this machine, against stock transformers and TRL."""


@app.command("decode")
def decode(
    model: Annotated[
        str,
        typer.Argument(
            help="A model folder, a preset, 'embedded', 'bench' (a random model of 33 M parameters) or 'bench-v3' "
            "(2 random layers with DeepSeek-V3's attention)."
        ),
    ],
    contexts: Annotated[
        str, typer.Option(metavar="N,N,…", help="Numbers of tokens in the cache to measure at.")
    ] = "512,2048,8192",
    batch: Annotated[int, typer.Option(metavar="N", help="Number of rows decoded at once.")] = 1,
    adapters: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Also measure N unmerged LoRAs in one batch: row i has adapter i mod N. --batch becomes at least N.",
        ),
    ] = 0,
    dtype: Annotated[
        str,
        typer.Option(
            help="Dtype of weights and cache: float32, bfloat16, float16, or auto (bfloat16 on a GPU, float32 on a "
            "CPU)."
        ),
    ] = "auto",
    runs: Annotated[int, typer.Option(metavar="N", help="Number of rounds; each round times every case once.")] = 3,
    layers: Annotated[
        int | None, typer.Option(metavar="N", help="Number of layers of 'bench' (default 8) or 'bench-v3' (default 2).")
    ] = None,
    cache: Annotated[
        str,
        typer.Option(
            help="KV cache of all cases but stock: latent (LatentCache, memory allocated ahead) or dynamic "
            "(transformers' DynamicCache, which stock always has)."
        ),
    ] = "latent",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write decode.json and decode.png to this folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time decoding with stock transformers, absorbed attention, and unmerged adapters."""
    counts = _token_counts(contexts)
    _make_folder(out)
    from mla_tune.bench import decode as bench
    from mla_tune.checkpoint.atomic_files import write_json
    from mla_tune.console import print_json
    from mla_tune.errors import CheckError
    from mla_tune.report.bench_decode_table import print_decode

    progress = _progress()
    result = bench.decode(
        model,
        contexts=counts,
        batch=batch,
        adapters=adapters,
        dtype=dtype,
        runs=runs,
        layers=layers,
        cache=cache,
        progress=progress,
    )
    document = result.to_json()
    if out is not None:
        from mla_tune.report.plots import plot_decode

        write_json(out / "decode.json", document)
        plot_decode(document, out / "decode.png")
        progress(f"written: {out / 'decode.json'}, {out / 'decode.png'}")
    print_json(document) if as_json else print_decode(document)
    if not result.cache_agrees:
        raise CheckError(
            "the cache does not have the size that (C + R) · layers · bytes of a number gives: compare "
            "cache_bytes_per_token and formula_cache_bytes_per_token in --json"
        )


@app.command("train")
def train(
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="Recipe to train: a YAML file, or the name of a shipped recipe.")
    ] = "safe",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a recipe key; repeatable. Example: --set data.limit=80."
        ),
    ] = None,
    cases: Annotated[
        str,
        typer.Option(
            metavar="NAME,…",
            help="Cases to compare. none, mla, full: train.activation_checkpointing of that name. unpacked: none "
            "without packing. compiled: none with train.compile. trl, trl-packed: TRL's SFTTrainer with its "
            "defaults. trl-plain, trl-plain-packed: SFTTrainer without gradient checkpointing and bfloat16 autocast.",
        ),
    ] = "none,mla,full",
    rounds: Annotated[
        int, typer.Option(metavar="N", min=1, help="Number of rounds; in each, every case trains 1/N of the data.")
    ] = 3,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write train.json to this folder.")] = None,
    as_json: Json = False,
) -> None:
    """Train one epoch per case, in alternating rounds, and compare speed, memory and loss.

    The data are 160 rows of GSM8K, which ships with mla-tune, unless --set changes data.path and data.limit.
    """
    from mla_tune.bench.train import bench
    from mla_tune.checkpoint.atomic_files import write_json
    from mla_tune.console import print_json
    from mla_tune.recipe.load import load_recipe
    from mla_tune.report.bench_train_table import print_train

    loaded = load_recipe(recipe, ["data.path=gsm8k", "data.limit=160", *(set_ or [])])
    _make_folder(out)
    names = [name.strip() for name in cases.split(",") if name.strip()]
    document = bench(loaded, names, rounds, _progress()).to_json()
    if out is not None:
        write_json(out / "train.json", document)
    print_json(document) if as_json else print_train(loaded, document)


def _token_counts(text: str) -> list[int]:
    """Return the numbers of `--contexts`, sorted, without duplicates.  Raises `InputError` where one is no integer."""
    from mla_tune.errors import InputError

    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise InputError(
            f"--contexts {text!r}: expected numbers of tokens, separated by commas, as in 512,2048,8192"
        ) from None


def _make_folder(folder: Path | None) -> None:
    """Create the folder of `--out` if one was given.  Raises `FileError` where that is impossible."""
    from mla_tune.errors import FileError

    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"--out {folder}: can't create this folder: {error.strerror}") from None


def _progress() -> Callable[[str], None]:
    """Return a function that prints a line of progress on standard error."""
    from mla_tune.console import err

    return lambda line: err.print(line, markup=False, soft_wrap=True)
