"""`mla-tune merge-absorb`: merge an adapter into its base and split the result for absorbed decoding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from mla_tune.merge.report import MergeReport


def command(
    adapter: Annotated[
        Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run folder of mla-tune train, or a PEFT adapter folder.")
    ],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Folder of the base model, or 'embedded'. Default: the one that the run recorded."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Output folder. Default: 'merged' in the run folder.")
    ] = None,
    absorb: Annotated[
        Literal["split", "none"],
        typer.Option(help="'split' also writes absorbed.safetensors: W_UK (H, C, P) and W_UV (H, V, C)."),
    ] = "split",
    dtype: Annotated[
        Literal["keep", "float32", "bfloat16", "float16"],
        typer.Option(help="Dtype of the merged weights; 'keep' is that of the base."),
    ] = "keep",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output of an earlier merge.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")] = False,
) -> None:
    """Merge an adapter into its base model, exactly and checked, and split the result for absorbed decoding."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from mla_tune.console import err, print_json
    from mla_tune.merge.run import merge_absorb

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        tasks = {stage: bars.add_task(stage, total=None, start=False) for stage in ("merge", "check")}

        def show(stage: str, done: int, total: int) -> None:
            bars.start_task(tasks[stage])
            bars.update(tasks[stage], completed=done, total=total)

        report = merge_absorb(
            adapter, base, out, absorb=absorb == "split", dtype=dtype, overwrite=overwrite, progress=show
        )
    if as_json:
        print_json(report.to_json())
    else:
        _print(report)


def _print(report: MergeReport) -> None:
    from rich.table import Table

    from mla_tune.console import human_bytes, out

    table = Table(title=f"{report.method} merged into {report.model_type}, {report.dtype}", title_justify="left")
    table.add_column("role")
    for name in ("matrices", "tensors", "‖Δ‖/‖W‖", "kept", "cosine"):
        table.add_column(name, justify="right")
    for row in report.roles:
        numbers = (_share(row.relative, 2), _share(row.kept, 1), "–" if row.cosine is None else f"{row.cosine:.4f}")
        table.add_row(row.role, f"{row.matrices:,}", f"{row.tensors:,}", *numbers)
    out.print(table)
    if all(row.kept is None for row in report.roles):
        out.print("The adapter is zero: the merged model is the base.")
    checks = report.checks
    out.print(
        f"checked: {checks.recomputed:,} tensors recomputed bit for bit, "
        f"{checks.unchanged:,} equal to the base, {checks.absorbed:,} attention modules absorbed",
        soft_wrap=True,
    )
    files = f"{human_bytes(report.bytes)} of weights"
    if report.absorbed:
        files += f", {report.absorbed.file} {human_bytes(report.absorbed.bytes)}"
    folder = Path(report.output)
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    out.print(f"{files} in {shown}", soft_wrap=True)
    out.print(f'next: mla-tune generate {shown} --prompt "…"', soft_wrap=True)


def _share(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}%}"
