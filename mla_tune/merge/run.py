"""`merge_absorb`: adapters + base → a checkpoint in the base's own key names, and its absorbed tensors beside it.

Headers → architecture → adapter deltas → plan → shard by shard, piece by piece: read, add in float32, round once, write
→ absorbed tensors → other files → reopen and prove → manifest → rename.  No model is ever loaded: memory holds a few
pieces of tensors and the adapter factors of a few sites.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path

from mla_tune.adapter.files import WEIGHTS_FILE
from mla_tune.adapter.inputs import MergePaths, open_inputs
from mla_tune.adapter.merge_options import DTYPES, MergeOptions
from mla_tune.checkpoint.atomic_files import write_json
from mla_tune.checkpoint.index import Checkpoint, Stamp
from mla_tune.checkpoint.quantized.config import quantized_tensors
from mla_tune.checkpoint.tensor_io import sha256
from mla_tune.errors import FileError, InputError, MlaTuneError, WorkError
from mla_tune.merge.absorb import write_absorbed
from mla_tune.merge.execute import execute
from mla_tune.merge.export import REPORT_FILE, check_output, copy_auxiliary_files, write_index_of, write_manifest
from mla_tune.merge.plan import MergePlan, plan_merge
from mla_tune.merge.report import MergeResult, PlanReport, adapter_reports, notes, plan_report, role_reports
from mla_tune.merge.staging import partial_folder, staged
from mla_tune.progress import Progress, counter
from mla_tune.verification.prover import Prover, start

#: An adapter or run folder, and the weight of its delta.
Weighted = tuple[Path, float]


def plan_only(
    adapters: Sequence[Weighted],
    base: Path | str | None = None,
    out: Path | None = None,
    *,
    options: MergeOptions | None = None,
    verify: bool = True,
    workers: int | None = None,
) -> PlanReport:
    """What `merge_absorb` would do with these arguments, from headers alone.  Raises what it would raise before it
    writes, but for an output that is in the way."""
    options = options or MergeOptions()
    inputs = open_inputs(adapters, base, out, options.mtp)
    places, plan = inputs.places, plan_merge(inputs.base, inputs.arch, inputs.adapters, options)
    return plan_report(plan, str(places.out.absolute()), workers or default_workers(), verify=verify)


def merge_absorb(
    adapter: Path | Sequence[Weighted],
    base: Path | str | None = None,
    out: Path | None = None,
    *,
    options: MergeOptions | None = None,
    min_retained: float | None = None,
    verify: bool = True,
    logits: bool = True,
    overwrite: bool = False,
    workers: int | None = None,
    prover: Prover | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> MergeResult:
    """Merge adapters (PEFT adapter folders or run folders, each with a weight) into `base` and write to `out`.

    `base` and `out` are found as `find_paths` says where they are None; the base `embedded` is the model that ships
    with mla-tune.  `min_retained` is the share of its delta that every tensor must keep through the rounding.  `verify`
    reopens the output and proves it; `logits`: compares logits too.  `overwrite`: replaces an earlier output.
    `prover` is one that was started earlier, to save time.  `note` is told what a user should know while it runs.  The
    output appears whole and proven, or not at all; what was finished of a merge that was killed is taken up again.

    Raises `FileError` and `InputError` before anything is written, `WorkError` where writing fails, `CheckError` where
    what was written is not what it should be or too little of a delta survived.
    """
    if min_retained is not None and not 0 <= min_retained <= 1:
        raise InputError(f"--min-retained {min_retained:g}: a share from 0 to 1 was expected")
    workers = workers or default_workers()
    weighted = [(adapter, 1.0)] if isinstance(adapter, Path) else list(adapter)
    options = options or MergeOptions()
    prover = (prover or start(logits)) if verify else None
    try:
        inputs = open_inputs(weighted, base, out, options.mtp)
        plan = plan_merge(inputs.base, inputs.arch, inputs.adapters, options)
        if prover:
            prover.begin(inputs, options, workers, progress)
        return _merge(inputs.places, plan, prover, min_retained, overwrite, workers, progress, note)
    finally:
        if prover:
            prover.stop()


def _merge(
    places: MergePaths,
    plan: MergePlan,
    prover: Prover | None,
    min_retained: float | None,
    overwrite: bool,
    workers: int,
    progress: Progress | None,
    note: Callable[[str], None],
) -> MergeResult:
    stamps = [(a.folder / WEIGHTS_FILE, Stamp.of(a.folder / WEIGHTS_FILE)) for a, _ in plan.adapters]
    check_output(places.out, overwrite, (places.base, *places.adapters), plan.written_bytes)
    for item, _ in plan.adapters:
        item.check_finite()
    for one, other in plan.aliases:
        if sha256(one) != sha256(other):
            raise InputError(f"{one.file}: '{one.key}' and '{other.key}' are one tensor of the model, but they differ")
    try:
        with staged(places.out, plan, note) as staging:
            # Again, under the lock: another merge may have finished in between.
            check_output(places.out, overwrite, (places.base, *places.adapters), 0)
            count = counter(progress, "merge", plan.model_bytes)
            # Here, while the prover is loading what it needs: it is the slower one of the two.
            hashed: dict[str, Future[str]] | None = {} if prover and prover.beside else None
            retention = execute(plan, staging, workers=workers, min_retained=min_retained, hashed=hashed, done=count)
            write_index_of(plan, staging.folder)
            carried, left = copy_auxiliary_files(plan, staging.folder)
            merged = Checkpoint.open(staging.folder)
            absorbed = None
            if plan.absorbed is not None:
                still = quantized_tensors(merged) if plan.quantized else {}
                absorbed = write_absorbed(
                    plan.architecture,
                    merged,
                    staging.folder,
                    plan.options.absorb,
                    quantized=still,
                    exact=plan.options.exact,
                    workers=workers,
                    progress=counter(progress, "absorb", plan.absorbed.bytes),
                )
            proven = prover.finish(staging.folder, list(hashed or ())) if prover else None
            hashes = dict(proven.hashes if proven else {})
            hashes |= {name: digest.result() for name, digest in (hashed or {}).items()}
            for shard in plan.shards:
                shard.source.check_unchanged()
            for file, stamp in stamps:
                if Stamp.of(file) != stamp:
                    raise FileError(f"{file}: changed while it was merged: run again")
            report = MergeResult(
                output=str(places.out.absolute()),
                base=str(places.base.absolute()),
                adapters=adapter_reports(plan),
                model_type=plan.architecture.model_type,
                options=plan.options.to_json(),
                dtype=_dtypes(plan),
                tensors=sum(len(shard.tensors) for shard in plan.shards),
                tensors_changed=len(plan.changed),
                tensors_raised=len(plan.dequantized),
                replaced=sorted(plan.replaced),
                bytes=plan.model_bytes,
                files_linked=sum(e["how"] in ("linked", "reflinked") for e in staging.finished.values()),
                files_written=sum(e["how"] in ("written", "copied") for e in staging.finished.values()),
                roles=role_reports(plan, retention),
                absorbed=asdict(absorbed) if absorbed is not None else None,
                proof=proven.proof if proven else None,
                logits=proven.logits if proven else None,
                retention={key: (s.relative, s.retained, s.cosine) for key, s in retention.items()},
                notes=notes(plan),
                carried=carried,
                left_behind=left,
            )
            write_manifest(plan, staging, hashes)
            write_json(staging.folder / REPORT_FILE, report.to_json())
    except MlaTuneError:
        raise
    except OSError as error:
        raise _failed(error, places.out) from error
    except KeyboardInterrupt:
        note(_left_behind(places.out, "run"))
        raise
    return report


def default_workers() -> int:
    """Threads that merge: more than four wait for the disk."""
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _dtypes(plan: MergePlan) -> str:
    names = {name: word for word, name in DTYPES.items()} | {"F8_E4M3": "float8_e4m3"}
    return ", ".join(sorted({names.get(out.dtype, out.dtype) for out in plan.changed}))


def _failed(error: OSError, out: Path) -> MlaTuneError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    what = "the disk is full" if full else f"writing failed: {error.strerror or error}"
    advice = "free some space and run" if full else "run"
    return WorkError(f"{out}: {what}; {_left_behind(out, advice)}")


def _left_behind(out: Path, advice: str) -> str:
    return (
        f"nothing was published. What is finished lies in {partial_folder(out).name} beside {out.name}: "
        f"{advice} the same command again to go on from there, or delete that folder"
    )
