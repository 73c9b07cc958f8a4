"""`mla-tune import-adapter`: convert an adapter of NeMo, Megatron-Bridge or Automodel into one for PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    adapter: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTER", help="The adapter to convert: a folder with safetensors files, or one such file."
        ),
    ],
    base: Annotated[
        Path,
        typer.Option("--base", metavar="DIR", help="The base model's folder, with config.json and safetensors files."),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="The folder to write the PEFT adapter to; it must be new or empty."),
    ],
    alpha: Annotated[
        float | None,
        typer.Option(
            help="LoRA's alpha; needed if adapter_config.json beside the files does not give it. Example: 32."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Convert an adapter of NVIDIA NeMo, Megatron-Bridge or Automodel into a PEFT adapter for merging and serving.

    Their names for matrices are linear_q_down_proj, linear_kv_up_proj, linear_fc1, … The numbers don't change.
    """
    from dataclasses import asdict

    from mla_tune.adapter.import_megatron import import_adapter
    from mla_tune.arch.build import architecture
    from mla_tune.checkpoint.index import Checkpoint
    from mla_tune.console import out as console
    from mla_tune.console import print_json

    checkpoint = Checkpoint.open(base)
    arch = architecture(checkpoint.config, str(base / "config.json")).located(checkpoint.tensors)
    imported = import_adapter(adapter, arch, checkpoint.tensors, str(base.absolute()), out, alpha)
    if as_json:
        print_json(asdict(imported))
        return
    roles = ", ".join(f"{role} {count}" for role, count in imported.roles.items())
    console.print(
        f"wrote {imported.out} from {imported.tensors:,} tensors: rank {imported.rank}, alpha {imported.alpha:g}",
        markup=False,
    )
    console.print(f"adapted matrices by role: {roles}", markup=False)
    console.print(f"next: mla-tune merge-absorb {imported.out} --base {base}", markup=False, soft_wrap=True)
