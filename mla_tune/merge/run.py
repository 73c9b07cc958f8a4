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
from dataclasses import dataclass
from pathlib import Path

from mla_tune.adapter.files import WEIGHTS_FILE
from mla_tune.adapter.merge_options import MergeOptions
from mla_tune.checkpoint.atomic_files import write_json
from mla_tune.checkpoint.index import Checkpoint, Stamp
from mla_tune.checkpoint.quantized.config import quantized_tensors
from mla_tune.checkpoint.tensor_io import sha256
from mla_tune.errors import FileError, InputError, MlaTuneError, WorkError
from mla_tune.merge.absorb import AbsorbedReport, write_absorbed
from mla_tune.merge.execute import execute
from mla_tune.merge.export import REPORT_FILE, check_output, copy_auxiliary_files, write_index_of, write_manifest
from mla_tune.merge.output import MergePlan
from mla_tune.merge.plan import plan_merge
from mla_tune.merge.report import MergeResult, PlanReport, merge_result, plan_report
from mla_tune.merge.staging import Staging, partial_folder, staged
from mla_tune.progress import Progress, counter
from mla_tune.runs.merge_inputs import MergePaths, open_inputs
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
    places, plan = inputs.paths, plan_merge(inputs.base, inputs.arch, inputs.adapters, options)
    return plan_report(plan, str(places.out.absolute()), workers or default_workers(), verify=verify)


def merge_absorb(
    adapter: Path | str | Sequence[Weighted],
    base: Path | str | None = None,
    out: Path | str | None = None,
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
    """Merge adapters into their base, split the result for absorbed decoding, and prove it.

    `adapter`: a run folder or a PEFT adapter folder, or several of them as (folder, weight).  `base`: the base model's
    folder, or "embedded"; by default the one that the run recorded.  `out`: the folder to write; by default `merged` in
    the run folder.  `options`: what is written (`MergeOptions`).  `min_retained`: fail where rounding keeps less than
    this share (0 to 1) of a tensor's change.  `verify`: reopen the output and prove every number.  `logits`: compare
    logits too.  `overwrite`: replace an earlier output.  `workers`: threads.  `prover`: one that was started earlier,
    to save time.  `progress(stage, bytes done, bytes in all)` and `note(sentence)` are called while it runs.

    Memory does not grow with the model.  The output appears whole and proven, or not at all; what was finished of a
    merge that was killed is taken up again.

    Raises `FileError` and `InputError` before anything is written, `WorkError` where writing fails, `CheckError` where
    what was written is not what it should be or too little of a delta was retained.
    """
    if min_retained is not None and not 0 <= min_retained <= 1:
        raise InputError(f"--min-retained {min_retained:g}: a share from 0 to 1 was expected")
    workers = workers or default_workers()
    weighted = [(Path(adapter), 1.0)] if isinstance(adapter, Path | str) else list(adapter)
    out = Path(out) if out is not None else None
    options = options or MergeOptions()
    prover = (prover or start(logits)) if verify else None
    try:
        inputs = open_inputs(weighted, base, out, options.mtp)
        plan = plan_merge(inputs.base, inputs.arch, inputs.adapters, options)
        if prover:
            prover.begin(inputs, options, workers, progress)
        return _Merge(
            paths=inputs.paths,
            plan=plan,
            prover=prover,
            min_retained=min_retained,
            overwrite=overwrite,
            workers=workers,
            progress=progress,
            note=note,
        ).run()
    finally:
        if prover:
            prover.stop()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Merge:
    """One merge on its way: the arguments of `merge_absorb`, with paths found and everything planned."""

    paths: MergePaths
    plan: MergePlan
    prover: Prover | None
    min_retained: float | None
    overwrite: bool
    workers: int
    progress: Progress | None
    note: Callable[[str], None]

    def run(self) -> MergeResult:
        """Check the inputs, build the output beside its place, and let it appear when it is proven."""
        plan, out = self.plan, self.paths.out
        stamps = [(a.folder / WEIGHTS_FILE, Stamp.read(a.folder / WEIGHTS_FILE)) for a, _ in plan.adapters]
        self._check_output(plan.written_bytes)
        for adapter, _ in plan.adapters:
            adapter.check_finite()
        for one, other in plan.aliases:
            if sha256(one) != sha256(other):
                raise InputError(
                    f"{one.file}: '{one.key}' and '{other.key}' are one tensor of the model, but they differ"
                )
        try:
            with staged(out, plan, self.note) as staging:
                # Again, under the lock: another merge may have finished in between.
                self._check_output(0)
                return self._build(staging, stamps)
        except MlaTuneError:
            raise
        except OSError as error:
            raise _failed(error, out) from error
        except KeyboardInterrupt:
            self.note(_left_behind(out, "run"))
            raise

    def _check_output(self, bytes_needed: int) -> None:
        check_output(self.paths.out, self.overwrite, (self.paths.base, *self.paths.adapters), bytes_needed)

    def _build(self, staging: Staging, stamps: Sequence[tuple[Path, Stamp]]) -> MergeResult:
        """Write, prove and describe the output in the folder of `staging`.

        Raises `FileError` where the base, or an adapter's file that `stamps` lists, has changed meanwhile.
        """
        plan, prover = self.plan, self.prover
        # Files are hashed here, while the prover is loading what it needs: it is the slower one of the two.
        hashed: dict[str, Future[str]] | None = {} if prover and prover.is_separate_process else None
        count = counter(self.progress, "merge", plan.model_bytes)
        retention = execute(
            plan, staging, workers=self.workers, min_retained=self.min_retained, hashed=hashed, done=count
        )
        write_index_of(plan, staging.folder)
        carried, left = copy_auxiliary_files(plan, staging.folder)
        absorbed = self._absorb(Checkpoint.open(staging.folder))
        proven = prover.finish(staging.folder, list(hashed or ())) if prover else None
        hashes = dict(proven.hashes if proven else {})
        hashes |= {name: digest.result() for name, digest in (hashed or {}).items()}
        for shard in plan.shards:
            shard.source.check_unchanged()
        for file, stamp in stamps:
            if Stamp.read(file) != stamp:
                raise FileError(f"{file}: changed while it was merged: run again")
        result = merge_result(
            plan, self.paths, staging, retention, absorbed=absorbed, proven=proven, carried=carried, left_behind=left
        )
        write_manifest(plan, staging, hashes)
        write_json(staging.folder / REPORT_FILE, result.to_json())
        return result

    def _absorb(self, merged: Checkpoint) -> AbsorbedReport | None:
        """Write the absorbed tensors beside the `merged` checkpoint, where they were asked for."""
        plan = self.plan
        if plan.absorbed is None:
            return None
        return write_absorbed(
            plan.architecture,
            merged,
            merged.folder,
            plan.options.absorb,
            quantized=quantized_tensors(merged) if plan.quantized else {},
            exact=plan.options.exact,
            workers=self.workers,
            progress=counter(self.progress, "absorb", plan.absorbed.bytes),
        )


def default_workers() -> int:
    """Threads that merge: more than four wait for the disk."""
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


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
