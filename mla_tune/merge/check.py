"""The proof of one output: numbers, absorbed tensors, and logits, for `merge-absorb` and for `verify`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_tune.adapter.files import Adapter
from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.index import Checkpoint
from mla_tune.errors import CheckError
from mla_tune.merge.plan import MergePlan
from mla_tune.merge.probe import ProbeReport, probe
from mla_tune.merge.proof import ProofReport, prove, with_failures
from mla_tune.merge.proof_absorbed import absorbed_tensors, prove_absorbed


@dataclass(frozen=True, slots=True)
class Checked:
    """What was proven, what the logits said (None: not asked), and the sha256 of each file of weights that was read."""

    proof: ProofReport
    probe: ProbeReport | None
    hashes: dict[str, str | None]


def check(
    base: Checkpoint,
    arch: Architecture,
    adapters: Sequence[tuple[Adapter, float]],
    merged: Checkpoint,
    *,
    strict: bool,
    rounding: str = "nearest",
    exact: bool = False,
    with_probe: bool = True,
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
) -> Checked:
    """Prove `merged` against base and adapters.  Failures are in the report; the probe runs where there are none."""
    report, hashes = prove(
        base, arch, adapters, merged, strict=strict, rounding=rounding, exact=exact, workers=workers, progress=progress
    )
    absorbed = absorbed_tensors(merged)
    modules, failures, digests = prove_absorbed(arch, merged, absorbed)
    report = with_failures(report, failures, absorbed=modules)
    probed = None
    if with_probe and not report.failed:
        mode = "none" if not absorbed else "fold" if any(key.endswith("W_QK") for key in absorbed) else "split"
        folders = [(adapter.folder, weight) for adapter, weight in adapters]
        probed = probe(base, arch, folders, merged, absorbed or None, mode)
    return Checked(report, probed, hashes | digests)


def prove_merge(
    plan: MergePlan,
    folder: Path,
    *,
    probe: bool,
    workers: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, str | None]]:
    """(proof, probe, hashes) of what a plan has written to `folder`.  Raises `CheckError` naming what differs."""
    options = plan.options
    done = check(
        plan.checkpoint,
        plan.architecture,
        plan.adapters,
        Checkpoint.open(folder),
        strict=True,
        rounding=options.round,
        exact=options.exact,
        with_probe=probe,
        workers=workers,
        progress=progress,
    )
    if done.proof.failed:
        lines = "".join(f"\n  {failure.key}: {failure.what}" for failure in done.proof.failures[:10])
        more = f"\n  … and {done.proof.failed - 10} more" if done.proof.failed > 10 else ""
        raise CheckError(f"the output is not what it must be; nothing was published:{lines}{more}")
    return done.proof.to_json(), done.probe.to_json() if done.probe else None, done.hashes
