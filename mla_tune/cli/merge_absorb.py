"""`mla-tune merge-absorb`: merge adapters into their base, split the result for absorbed decoding, and prove it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from mla_tune.merge.report import MergeResult, PlanReport


def command(
    adapter: Annotated[
        Path | None,
        typer.Argument(metavar="RUN_OR_ADAPTER", help="A run folder of mla-tune train, or a PEFT adapter folder."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Folder of the base model, or 'embedded'. Default: the one that the run recorded."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Output folder. Default: 'merged' in the run folder.")
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="DIR[=WEIGHT]",
            help="One of several adapters to merge in this order, its change times WEIGHT (default 1).",
        ),
    ] = None,
    absorb: Annotated[
        Literal["split", "fold", "none"],
        typer.Option(
            help="'split' also writes W_UK (H, C, P) and W_UV (H, V, C); 'fold' their products with W_UQ and W_O."
        ),
    ] = "split",
    dtype: Annotated[
        Literal["keep", "float32", "bfloat16", "float16"],
        typer.Option(help="Dtype of the merged weights; 'keep' is that of the base."),
    ] = "keep",
    fp8: Annotated[
        Literal["bf16", "keep"],
        typer.Option(help="Write changed FP8 weights as bf16, or as FP8 with fresh scales ('keep')."),
    ] = "bf16",
    exact: Annotated[bool, typer.Option("--exact", help="Add in float64 instead of float32.")] = False,
    rounding: Annotated[
        Literal["nearest", "stochastic"], typer.Option("--round", help="How sums are rounded to the dtype written.")
    ] = "nearest",
    seed: Annotated[int, typer.Option(help="Seed of stochastic rounding.")] = 0,
    min_retained: Annotated[
        float | None,
        typer.Option(metavar="X", help="Fail where rounding keeps less than this share of a tensor's change (0 to 1)."),
    ] = None,
    untie_embeddings: Annotated[
        bool, typer.Option("--untie-embeddings", help="Write a tied output head as a tensor of its own.")
    ] = False,
    link: Annotated[
        bool, typer.Option("--link/--no-link", help="Share files that don't change with the base, or copy them.")
    ] = True,
    mtp: Annotated[
        bool,
        typer.Option("--mtp", help="Merge what adapters hold of MTP layers too; without it they stay as they are."),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Reopen the output and prove it against base and adapter.")
    ] = True,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Let the proof compare logits too (loads transformers and PEFT).")
    ] = True,
    workers: Annotated[int | None, typer.Option(min=1, metavar="N", help="Threads. Default: cores, at most 4.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output of an earlier merge.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; read no weight, write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")] = False,
) -> None:
    """Merge adapters into their base model, exactly and proven, and split the result for absorbed decoding."""
    # Every worker is a thread: BLAS threads under each would only wait for each other.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from mla_tune.verification.prover import start

    prover = start(probe) if verify and not dry_run else None  # before all else: it takes seconds to load what it needs
    from mla_tune.adapter.merge_options import Options
    from mla_tune.console import err, print_json
    from mla_tune.merge.run import merge_absorb, plan_only

    named = weighted(adapter, adapters or [])
    options = Options(absorb, dtype, fp8, exact, rounding, seed, untie_embeddings, link, mtp)
    if dry_run:
        plan = plan_only(named, base, out, options=options, verify=verify, workers=workers)
        print_json(plan.to_json()) if as_json else _print_plan(plan)
        return
    stages = ["merge", *(["absorb"] if absorb != "none" else []), *(["check"] if verify else [])]
    stages += ["logits"] if verify and probe else []
    with bars(stages) as show:
        report = merge_absorb(
            named, base, out, options=options, min_retained=min_retained, verify=verify, probe=probe,
            overwrite=overwrite, workers=workers, prover=prover, progress=show,
            note=lambda line: err.print(line, soft_wrap=True),
        )  # fmt: skip
    print_json(report.to_json()) if as_json else _print(report)


def weighted(adapter: Path | None, named: list[str]) -> list[tuple[Path, float]]:
    """`DIR[=WEIGHT]` of every adapter, in order.  One that names the argument's folder gives it its weight."""
    from mla_tune.errors import InputError

    parsed: list[tuple[Path, float]] = []
    for text in named:
        name, sign, number = text.rpartition("=")
        try:
            path, weight = (Path(name), float(number)) if sign else (Path(text), 1.0)
        except ValueError:
            path, weight = Path(text), 1.0  # a folder with '=' in its name
        if sign and not path.exists() and Path(text).exists():
            path, weight = Path(text), 1.0
        if weight != weight or weight in (float("inf"), float("-inf")):
            raise InputError(f"--adapter {text}: the weight must be a finite number")
        parsed.append((path, weight))
    if adapter is not None and all(path.absolute() != adapter.absolute() for path, _ in parsed):
        parsed.insert(0, (adapter, 1.0))
    if not parsed:
        raise InputError("no adapter: name a run folder or an adapter folder, or one or more with --adapter DIR=WEIGHT")
    return parsed


@contextmanager
def bars(stages: list[str]) -> Iterator[Callable[[str, int, int], None]]:
    """A bar in bytes with the time left for each stage, on a terminal's standard error."""
    from mla_tune.console import err

    if not err.is_terminal:
        yield lambda stage, done, total: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        tasks = {stage: progress.add_task(stage, total=None, start=False) for stage in stages}

        def show(stage: str, done: int, total: int) -> None:
            if not progress.tasks[tasks[stage]].started:
                progress.start_task(tasks[stage])
            progress.update(tasks[stage], completed=done, total=total)

        yield show


def _print_plan(plan: PlanReport) -> None:
    from mla_tune.console import human_bytes, out

    def say(line: str) -> None:
        out.print(line, soft_wrap=True)

    names = ", ".join(
        f"{Path(a.path).name} × {a.weight:g}" if a.weight != 1 else Path(a.path).name for a in plan.adapters
    )
    say(f"{names} into {plan.model_type} ({plan.base})")
    roles = ", ".join(f"{role} {count:,}" for role, count in plan.roles.items())
    say(f"changes  {plan.tensors_changed:,} of {plan.tensors:,} tensors: {roles}")
    say(f"files    {len(plan.files_written):,} written, {len(plan.files_linked):,} linked to the base's")
    total = f"{human_bytes(plan.bytes_total)} in the output"
    if plan.absorbed_bytes:
        total += f", {human_bytes(plan.absorbed_bytes)} of them absorbed tensors"
    say(f"bytes    {human_bytes(plan.bytes_read)} read, {human_bytes(plan.bytes_written)} written; {total}")
    say(f"memory   about {human_bytes(plan.memory)} for the merge; the proof's torch adds 250 MB, its probe a layer")
    say(f"time     about {_duration(plan.seconds)} on a disk of {human_bytes(plan.disk_rate)}/s")
    for line in plan.notes:
        say(f"note     {line}")
    say(f"output   {plan.output}; nothing was read but headers, nothing was written")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _print(report: MergeResult) -> None:
    from rich.table import Table

    from mla_tune.console import human_bytes, out

    methods = " + ".join(a.method if a.weight == 1 else f"{a.weight:g} × {a.method}" for a in report.adapters)
    table = Table(title=f"{methods} merged into {report.model_type}, {report.dtype}", title_justify="left")
    table.add_column("role")
    for name in ("matrices", "tensors", "‖Δ‖/‖W‖", "kept", "least", "cosine"):
        table.add_column(name, justify="right")
    for row in report.roles:
        numbers = (_share(row.relative, 2), _share(row.kept, 1), _share(row.least, 1))
        cosine = "–" if row.cosine is None else f"{row.cosine:.4f}"
        table.add_row(row.role, f"{row.matrices:,}", f"{row.tensors:,}", *numbers, cosine)
    if report.roles:
        out.print(table)
        if all(row.kept is None for row in report.roles):
            out.print("The adapter is zero: the merged model is the base.")
    for line in report.notes:
        out.print(f"note: {line}", soft_wrap=True)
    if report.proof is None:
        out.print("not proven (--no-verify): run `mla-tune verify` on the output", soft_wrap=True)
    else:
        from mla_tune.cli.verify import print_proof

        print_proof(report.proof, report.probe)
    files = f"{human_bytes(report.bytes)} of weights"
    if report.files_linked:
        files += f" ({report.files_linked} of {report.files_linked + report.files_written} files linked to the base's)"
    if report.absorbed:
        files += f", {human_bytes(report.absorbed['bytes'])} absorbed"
    folder = Path(report.output)
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    out.print(f"{files} in {shown}", soft_wrap=True)
    out.print(f'next: mla-tune generate {shown} --prompt "…"', soft_wrap=True)


def _share(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}%}"
