"""`mla-tune import-adapter`: an adapter of NeMo, Megatron-Bridge or Automodel becomes one for PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="A folder with safetensors files, or one such file.")
    ],
    base: Annotated[Path, typer.Option("--base", metavar="DIR", help="The base model's folder.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write.")],
    alpha: Annotated[
        float | None, typer.Option(help="LoRA's alpha, where no adapter_config.json beside the files gives it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Turn an adapter with linear_q_down_proj, linear_kv_up_proj, linear_fc1 … names into a PEFT adapter."""
    from dataclasses import asdict

    from mla_tune.adapter.import_megatron import import_adapter
    from mla_tune.arch.build import architecture
    from mla_tune.checkpoint.index import Checkpoint
    from mla_tune.console import out as console
    from mla_tune.console import print_json

    checkpoint = Checkpoint.open(base)
    arch = architecture(checkpoint.config, str(base / "config.json")).located(checkpoint.tensors)
    found = import_adapter(adapter, arch, checkpoint.tensors, str(base.absolute()), out, alpha)
    if as_json:
        print_json(asdict(found))
        return
    roles = ", ".join(f"{role} {count}" for role, count in found.roles.items())
    console.print(f"{found.tensors:,} tensors → {found.out}: rank {found.rank}, alpha {found.alpha:g}", markup=False)
    console.print(f"matrices: {roles}", markup=False)
    console.print(f"next: mla-tune merge-absorb {found.out} --base {base}", markup=False, soft_wrap=True)
