"""What a merge will do and what it did, as dataclasses.

`--dry-run`, `merge_report.json`, `--json` and the printed tables show them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mla_tune import __version__
from mla_tune.adapter.merge_options import DTYPES
from mla_tune.adapter.methods import title_of
from mla_tune.arch.roles import Role
from mla_tune.merge.apply import CACHED_FACTORS, PIECE_BYTES
from mla_tune.merge.notes import notes
from mla_tune.merge.output import MergePlan, OutTensor
from mla_tune.merge.retention import DeltaRetention

if TYPE_CHECKING:
    from mla_tune.merge.absorb import AbsorbedReport
    from mla_tune.merge.staging import Staging
    from mla_tune.runs.merge_inputs import MergePaths
    from mla_tune.verification.result import ProofDocuments

#: Resident memory of the process before it does anything, and what a worker adds beside its piece (measured).
_PROCESS_BYTES, _WORKER_BYTES = 60_000_000, 8_000_000
#: Bytes merged in a second by one worker, and the disk that the estimate of time assumes.
_COMPUTE_RATE, _DISK_RATE = 0.8e9, 1e9


@dataclass(frozen=True, slots=True)
class RoleReport:
    """One role: `matrices` merged (each expert's gate, up and down count), in `tensors` on disk of `bytes` as written.

    `relative` is ‖Δ‖/‖W‖, `retained` ⟨Q(W+Δ)-W, Δ⟩/‖Δ‖² and `cosine` the cosine between Q(W+Δ)-W and Δ, with Q the
    rounding to the dtype written, over all matrices of the role; None where they are not defined (Δ is zero).  `least`
    is the smallest `retained` of a single tensor.
    """

    role: str
    matrices: int
    tensors: int
    bytes: int
    relative: float | None
    retained: float | None
    cosine: float | None
    least: float | None


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """One merged adapter and the weight that its delta was given."""

    path: str
    weight: float
    method: str


@dataclass(frozen=True, slots=True)
class PlanReport:
    """What a merge would do.  Files: `linked` are the base's own, `written` are not.  Bytes: `read` from the base
    and the adapters, `written` anew; `memory` is the estimated peak, `seconds` the estimated time on a disk of
    `disk_rate` bytes a second."""

    output: str
    base: str
    adapters: list[AdapterReport]
    model_type: str
    options: dict[str, Any]
    files_written: list[str]
    files_linked: list[str]
    tensors: int
    tensors_changed: int
    tensors_dequantized: int
    roles: dict[str, int]
    bytes_read: int
    bytes_written: int
    bytes_total: int
    absorbed_bytes: int
    memory: int
    seconds: float
    disk_rate: float
    notes: list[str]
    mla_tune: str = __version__

    def to_json(self) -> dict[str, Any]:
        """The fields as a dictionary that `json.dumps` takes."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class MergeResult:
    """A finished merge.

    `retention` gives (‖Δ‖/‖W‖, share retained, cosine) of each changed tensor.  `proof` and `logits` are None where
    they were not asked for.  `carried` are the other files of the base that were copied, `left_behind` those that were
    not (weights in other formats, folders, leftovers of an earlier merge).
    """

    output: str
    base: str
    adapters: list[AdapterReport]
    model_type: str
    options: dict[str, Any]
    dtype: str
    tensors: int
    tensors_changed: int
    tensors_dequantized: int
    replaced: list[str]
    bytes: int
    files_linked: int
    files_written: int
    roles: list[RoleReport]
    absorbed: dict[str, Any] | None
    proof: dict[str, Any] | None
    logits: dict[str, Any] | None
    retention: dict[str, tuple[float | None, float | None, float | None]]
    notes: list[str]
    carried: list[str]
    left_behind: list[str]
    mla_tune: str = __version__

    def to_json(self) -> dict[str, Any]:
        """The fields as a dictionary that `json.dumps` takes."""
        return asdict(self)


def merge_result(
    plan: MergePlan,
    paths: MergePaths,
    staging: Staging,
    retention: Mapping[str, DeltaRetention],
    *,
    absorbed: AbsorbedReport | None,
    proven: ProofDocuments | None,
    carried: list[str],
    left_behind: list[str],
) -> MergeResult:
    """What a merge did: from its plan, the files in `staging`, and what the proof found."""
    how = [entry["how"] for entry in staging.finished.values()]
    return MergeResult(
        output=str(paths.out.absolute()),
        base=str(paths.base.absolute()),
        adapters=adapter_reports(plan),
        model_type=plan.architecture.model_type,
        options=plan.options.to_json(),
        dtype=_dtypes(plan),
        tensors=sum(len(shard.tensors) for shard in plan.shards),
        tensors_changed=len(plan.changed),
        tensors_dequantized=len(plan.dequantized),
        replaced=sorted(plan.replaced),
        bytes=plan.model_bytes,
        files_linked=sum(h in ("linked", "reflinked") for h in how),
        files_written=sum(h in ("written", "copied") for h in how),
        roles=role_reports(plan, retention),
        absorbed=asdict(absorbed) if absorbed is not None else None,
        proof=proven.proof if proven else None,
        logits=proven.logits if proven else None,
        retention={key: (s.relative, s.retained, s.cosine) for key, s in retention.items()},
        notes=notes(plan),
        carried=carried,
        left_behind=left_behind,
    )


def _dtypes(plan: MergePlan) -> str:
    """The dtypes of the changed tensors, as torch calls them."""
    names = {name: word for word, name in DTYPES.items()}
    names |= {t.codes.dtype: t.format.dtype_name for t in plan.quantized.values() if t.format.dtype_name}
    return ", ".join(sorted({names.get(out.dtype, out.dtype) for out in plan.changed}))


def role_reports(plan: MergePlan, retention: Mapping[str, DeltaRetention]) -> list[RoleReport]:
    """A row for each role that was changed, in the order of `Role`."""
    by_role: dict[Role, list[OutTensor]] = {}
    for out in plan.changed:
        if out.site is not None:
            by_role.setdefault(out.site.role, []).append(out)
    rows = []
    for role in Role:
        outs = by_role.get(role)
        if not outs:
            continue
        total = DeltaRetention()
        for out in outs:
            total.add(retention[out.key])
        retained = [k for out in outs if (k := retention[out.key].retained) is not None]
        rows.append(
            RoleReport(
                role=role.value,
                matrices=sum(out.shape[0] if len(out.shape) == 3 else 1 for out in outs if not out.is_bias),
                tensors=len(outs),
                bytes=sum(out.nbytes for out in outs),
                relative=total.relative,
                retained=total.retained,
                cosine=total.cosine,
                least=min(retained, default=None),
            )
        )
    return rows


def adapter_reports(plan: MergePlan) -> list[AdapterReport]:
    """The adapters of a plan in the order in which they are merged."""
    return [AdapterReport(str(a.folder.absolute()), weight, title_of(a.settings)) for a, weight in plan.adapters]


def plan_report(plan: MergePlan, out: str, workers: int, *, verify: bool) -> PlanReport:
    """The plan in numbers: nothing but headers has been read."""
    linked = [s for s in plan.shards if s.is_same and plan.options.link]
    written = [s for s in plan.shards if not (s.is_same and plan.options.link)]
    absorbed = plan.absorbed.bytes if plan.absorbed else 0
    factors = sum(ref.nbytes for adapter, _ in plan.adapters for ref in adapter.refs())
    read = factors + sum(o.source.nbytes for s in written for o in s.tensors)
    computed = sum(o.nbytes for s in written for o in s.tensors if not o.is_copy)
    roles: dict[str, int] = {}
    for o in plan.changed:
        if o.site is not None:
            roles[str(o.site.role)] = roles.get(str(o.site.role), 0) + 1
    passes = 2 if verify else 1
    disk = (read + plan.written_bytes) * passes / _DISK_RATE
    return PlanReport(
        output=out,
        base=str(plan.checkpoint.folder.absolute()),
        adapters=adapter_reports(plan),
        model_type=plan.architecture.model_type,
        options=plan.options.to_json(),
        files_written=[s.name for s in written],
        files_linked=[s.name for s in linked],
        tensors=sum(len(s.tensors) for s in plan.shards),
        tensors_changed=len(plan.changed),
        tensors_dequantized=len(plan.dequantized),
        roles={r.value: roles[r.value] for r in Role if r.value in roles},
        bytes_read=read,
        bytes_written=plan.written_bytes,
        bytes_total=plan.model_bytes + absorbed,
        absorbed_bytes=absorbed,
        memory=_memory(plan, workers),
        seconds=max(disk, computed * passes / workers / _COMPUTE_RATE),
        disk_rate=_DISK_RATE,
        notes=notes(plan),
    )


def _memory(plan: MergePlan, workers: int) -> int:
    """Peak memory of the merge: the process, a piece in and out for each worker, and the factors at hand."""
    width = 8 if plan.options.exact else 4
    factors = sorted(
        {
            d.A.key: (d.A.nbytes + d.B.nbytes) + width * d.experts * d.rank * (sum(d.site.shape))
            for adapter, _ in plan.adapters
            for d in adapter.deltas
        }.values(),
        reverse=True,
    )
    return _PROCESS_BYTES + workers * (_WORKER_BYTES + 2 * PIECE_BYTES) + sum(factors[:CACHED_FACTORS])
