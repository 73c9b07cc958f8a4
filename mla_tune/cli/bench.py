"""`mla-tune bench`: what decoding and training take on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mla_tune.bench.decode_result import AtContext, DecodeBench

app = typer.Typer(help="Measure stock transformers against mla-tune on this machine.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Commands that measure."""


@app.command("decode")
def decode(
    model: Annotated[
        str,
        typer.Argument(
            help="'bench' (a random model of 33 M parameters), 'bench-v3' (DeepSeek-V3's own attention, 2 layers), "
            "a model folder, a preset, or 'embedded'."
        ),
    ],
    contexts: Annotated[str, typer.Option(metavar="N,N,…", help="Tokens in the cache.")] = "512,2048,8192",
    batch: Annotated[int, typer.Option(metavar="N", help="Rows that are decoded at once.")] = 1,
    adapters: Annotated[
        int, typer.Option(metavar="N", help="Also N unmerged LoRAs, one for each row in turn; raises --batch to N.")
    ] = 0,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16. auto: bfloat16 on a GPU, float32 on a CPU.")
    ] = "auto",
    runs: Annotated[int, typer.Option(metavar="N", help="Rounds in which all take turns.")] = 3,
    layers: Annotated[int | None, typer.Option(metavar="N", help="Of 'bench' and 'bench-v3'.")] = None,
    cache: Annotated[
        str, typer.Option(help="Of all but stock: latent (has room ahead), or dynamic (as stock's).")
    ] = "latent",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write decode.png and decode.json there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """Decode with stock transformers, absorbed, and with unmerged adapters, in turn."""
    from mla_tune.checkpoint.atomic_files import write_json
    from mla_tune.console import err, print_json
    from mla_tune.errors import CheckError, FileError

    counts = _counts(contexts)
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"--out {out}: {error.strerror}") from None
    from mla_tune.bench import decode as bench

    def say(line: str) -> None:
        err.print(line, markup=False, soft_wrap=True)

    found = bench.decode(
        model,
        contexts=counts,
        batch=batch,
        adapters=adapters,
        dtype=dtype,
        runs=runs,
        layers=layers,
        cache=cache,
        say=say,
    )
    if out is not None:
        from mla_tune.report.plots import plot_decode

        document = found.to_json()
        write_json(out / "decode.json", document)
        plot_decode(document, out / "decode.png")
        say(f"written: {out / 'decode.json'}, {out / 'decode.png'}")
    print_json(found.to_json()) if as_json else print_decode(found)
    if not found.cache_agrees:
        raise CheckError("the cache has not the size that the formula gives: see cache_bytes_per_token in --json")


def _counts(text: str) -> list[int]:
    """Sorted, each once."""
    from mla_tune.errors import InputError

    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise InputError(f"--contexts {text!r}: expected counts of tokens, as in 512,2048,8192") from None


def print_decode(found: DecodeBench) -> None:
    """In 80 columns."""
    from rich.markup import escape

    from mla_tune.console import human_bytes, human_count, out

    def say(line: str) -> None:
        out.print(escape(line), soft_wrap=True)

    threads = f", {found.threads} thread{'s' * (found.threads > 1)}" if found.device == "cpu" else ""
    say(f"{found.model}: {found.model_type}, {human_count(found.params_total)} parameters, {found.dtype}")
    say(f"on {found.device}{threads}, copies at {human_bytes(found.bandwidth_bytes_per_second)}/s; rows: {found.batch}")
    for at in found.contexts:
        _print_context(at)
        _print_below(at)
    formula = found.formula_cache_bytes_per_token
    if found.cache_agrees:
        say(f"cache    {formula:,} bytes a token, as (C + R) · layers · bytes of a number says")
    else:
        counted = sorted({t.cache_bytes_per_token for at in found.contexts for t in at.ways})
        say(f"cache    {', '.join(f'{n:,g}' for n in counted)} bytes a token, where the formula says {formula:,}")
    if found.cache == "LatentCache":
        room = max(t.room_bytes_per_token / t.cache_bytes_per_token for at in found.contexts for t in at.ways)
        say(f"         LatentCache (all but stock) holds up to {room:.0%} more, as room ahead")
    if found.adapters:
        measured = [at for at in found.contexts if at.adapters_cost]
        for at in measured:
            what = "adapters" if at is measured[0] else ""
            say(f"{what:9}{_ratio(at.adapters_cost)} × the time of one merged model at {at.context:,}")
    p = found.prefill
    absorbed, stock, ratio = _middle(p.absorbed_ms), _middle(p.stock_ms), _ratio(p.ratios)
    say(f"prefill  {p.context:,} tokens in {absorbed} ms, stock {stock}: {ratio} × stock")
    say("Medians, and the range over the rounds.  × stock: stock's time by this one's.")
    say("memory: peak of a step above rest.  MBU: share of the bandwidth of copies that")
    say("weights and cache take if a step reads each once.")


def _print_context(at: AtContext) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from mla_tune.console import human_bytes, out

    table = Table(
        title=f"{at.context:,} tokens in the cache",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("", no_wrap=True)
    for name in ("ms a token", "range", "tokens/s", "× stock", "range", "memory", "MBU"):
        table.add_column(name, justify="right", no_wrap=name != "ms a token")
    for i, t in enumerate(at.ways):
        table.add_row(
            t.way,
            _number(t.ms_median),
            _range(t.ms),
            _number(t.tokens_per_second),
            "" if t.ratio_median is None else _number(t.ratio_median),
            _range(t.ratios) if i and t.ratios else "",
            human_bytes(t.transient_bytes),
            f"{t.bandwidth_share:.1%}",
        )
    for way in at.out_of_memory:
        table.add_row(way, "out of memory")
    out.print()
    out.print(table)


def _print_below(at: AtContext) -> None:
    import statistics

    from mla_tune.console import out

    def say(what: str, parts: list[str]) -> None:
        out.print(f"{what:9}{', '.join(parts)}", markup=False)

    floors = [f"{t.way} {_number(t.times_floor)} ×" for t in at.ways]
    say("floor", [f"the cache read once takes {_number(at.floor_ms)} ms", *floors])
    graphs = {t.way: statistics.median(t.graph_ms) for t in at.ways if t.graph_ms}
    stock = graphs.get("stock")
    parts = []
    for way, ms in graphs.items():
        faster = f", {_number(stock / ms)} × stock" if stock and way != "stock" else ""
        parts.append(f"{way} {_number(ms)} ms ({_number(ms / at.floor_ms)} × floor{faster})")
    if parts:
        say("graph", parts)
    if at.logits_off is not None:
        say("logits", [f"absorbed off by at most {at.logits_off:.1e} of stock's largest"])


def _number(n: float) -> str:
    """Three significant digits, or all before the point, or three behind it."""
    return f"{n:,.{0 if n >= 100 else 1 if n >= 10 else 2 if n >= 1 else 3}f}"


def _range(numbers: Sequence[float]) -> str:
    return f"{_number(min(numbers))}–{_number(max(numbers))}"


def _middle(numbers: Sequence[float]) -> str:
    from statistics import median

    return _number(median(numbers))


def _ratio(numbers: Sequence[float]) -> str:
    return f"{_middle(numbers)} ({_range(numbers)})"


@app.command("train")
def train(
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A recipe file, or a shipped one.")] = "safe",
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key: --set data.limit=80.")] = None,
    cases: Annotated[
        str,
        typer.Option(
            metavar="NAME,…",
            help="Of none, mla, full (train.activation_checkpointing), compiled; trl, trl-packed (TRL's defaults), "
            "trl-plain, trl-plain-packed (without its checkpointing and bfloat16).",
        ),
    ] = "none,mla,full",
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Turns; each trains 1/N of the data.")] = 3,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write train.json there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """Train one epoch with each of several ways, in turn: tokens a second and memory."""
    from mla_tune.bench.train import bench
    from mla_tune.checkpoint.atomic_files import write_json
    from mla_tune.console import err, print_json
    from mla_tune.errors import FileError
    from mla_tune.recipe.load import load_recipe
    from mla_tune.report.bench_train_table import print_train

    loaded = load_recipe(recipe, ["data.path=gsm8k", "data.limit=160", *(set_ or [])])
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"--out {out}: {error.strerror}") from None
    names = [n.strip() for n in cases.split(",") if n.strip()]
    found = bench(loaded, names, rounds, lambda line: err.print(line, markup=False, soft_wrap=True))
    document = found.to_json()
    if out is not None:
        write_json(out / "train.json", document)
    print_json(document) if as_json else print_train(loaded, found)
