"""`merge_absorb`: adapter + base → a checkpoint in the base's own key names, and its absorbed tensors beside it.

Headers → architecture → adapter deltas → plan → shard by shard, tensor by tensor: read, add in float32, round once,
write → absorbed file → other files → reopen and compare → rename.  No model is ever loaded: memory holds one tensor and
the adapter factors of a few sites.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mla_tune.adapter.files import open_adapter
from mla_tune.arch.registry import architecture
from mla_tune.checkpoint.files import write_json
from mla_tune.checkpoint.index import Checkpoint, tensor_bytes
from mla_tune.checkpoint.shards import write_index, write_shard
from mla_tune.errors import MlaTuneError, WorkError
from mla_tune.merge.absorb import ABSORBED_FILE, write_absorbed
from mla_tune.merge.apply import Merger, Record
from mla_tune.merge.export import REPORT_FILE, carry_files, check_output, copy_file, staged
from mla_tune.merge.locate import locate
from mla_tune.merge.plan import DTYPES, MergePlan, plan_merge
from mla_tune.merge.report import AbsorbedReport, CheckReport, MergeReport, role_reports
from mla_tune.merge.verify import verify

#: Told the stage ("merge", "check"), the bytes done and the bytes in all.
Progress = Callable[[str, int, int], None]


def merge_absorb(
    adapter: Path,
    base: Path | str | None = None,
    out: Path | None = None,
    *,
    absorb: bool = True,
    dtype: str = "keep",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge `adapter` (a PEFT adapter folder or a run folder) into `base` and write the result to `out`.

    `base` and `out` are found as `locate` says where they are None; the base `embedded` is the model that ships with
    mla-tune.  `absorb` writes the split absorbed tensors too.  `dtype` is `keep`, `float32`, `bfloat16` or `float16`.
    `overwrite` replaces the output of an earlier merge.  The output appears whole, checked, or not at all.

    Raises `FileError` and `InputError` before anything is written, `WorkError` where writing fails, `CheckError` where
    what was written is not what was computed.
    """
    places = locate(adapter, base, out)
    checkpoint = Checkpoint.open(places.base)
    arch = architecture(checkpoint.config, str(places.base / "config.json"))
    lora = open_adapter(places.adapter, arch)
    plan = plan_merge(checkpoint, arch, lora, absorb=absorb, dtype=dtype)
    check_output(places.out, overwrite, (places.base, places.adapter), plan.model_bytes + plan.absorbed_bytes)
    lora.check_finite()
    record: Record = {}
    try:
        with staged(places.out) as staging:
            _write_model(plan, staging, record, _counter(progress, "merge", plan.model_bytes))
            if plan.kv_b:
                write_absorbed(plan, Checkpoint.open(staging))
            carried, left = carry_files(plan, staging)
            checks = verify(plan, staging, _counter(progress, "check", plan.model_bytes))
            report = _report(plan, places.out, record, checks, carried, left)
            write_json(staging / REPORT_FILE, report.to_json())
    except MlaTuneError:
        raise
    except OSError as error:
        raise WorkError(f"{places.out}: writing failed: {error.strerror or error}; nothing was left there") from error
    return report


def _write_model(plan: MergePlan, staging: Path, record: Record, written: Callable[[int], None]) -> None:
    base, merger = plan.checkpoint, Merger(plan)
    for shard in base.shards:
        target = staging / shard.file.relative_to(base.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if plan.is_copied(shard):
            copy_file(shard.file, target)
            written(sum(ref.nbytes for ref in shard.tensors.values()))
        else:
            tensors = (merger.tensor(ref, record) for ref in shard.tensors.values())
            write_shard(target, plan.layout(shard), tensors, shard.metadata, written)
    # Without an index, vLLM and SGLang load every *.safetensors file of a folder: the absorbed one too.
    if base.index is not None or plan.kv_b:
        files = {key: ref.file.relative_to(base.folder).as_posix() for key, ref in base.tensors.items()}
        total = sum(tensor_bytes(plan.out_dtype(ref), ref.shape) for ref in base.tensors.values())
        write_index(staging, files, total, base.index)


def _counter(progress: Progress | None, stage: str, total: int) -> Callable[[int], None]:
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress(stage, done, total)

    return count


def _report(
    plan: MergePlan, out: Path, record: Record, checks: CheckReport, carried: list[str], left: list[str]
) -> MergeReport:
    names = {name: dtype for dtype, name in DTYPES.items()}
    dtypes = {plan.out_dtype(change.ref) for change in plan.changes.values()}
    absorbed = AbsorbedReport(ABSORBED_FILE, len(plan.kv_b), plan.absorbed_bytes) if plan.kv_b else None
    return MergeReport(
        output=str(out.absolute()),
        base=str(plan.checkpoint.folder.absolute()),
        adapter=str(plan.adapter.folder.absolute()),
        method=plan.adapter.method,
        model_type=plan.architecture.model_type,
        dtype=", ".join(sorted(names.get(d, d) for d in dtypes)),
        tensors=len(plan.checkpoint.tensors),
        tensors_changed=len(plan.changes),
        bytes=plan.model_bytes,
        roles=role_reports(plan, record),
        absorbed=absorbed,
        checks=checks,
        carried=carried,
        left_behind=left,
    )
