"""What a merge did: the dataclasses behind `merge_report.json`, `--json` and the printed table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mla_tune import __version__
from mla_tune.arch.roles import Role
from mla_tune.checkpoint.index import tensor_bytes
from mla_tune.merge.apply import Record
from mla_tune.merge.plan import MergePlan


@dataclass(frozen=True, slots=True)
class RoleReport:
    """One role: `matrices` merged (each expert's gate, up and down count), in `tensors` on disk of `bytes` as written.

    `relative` is ‖Δ‖/‖W‖, `kept` ⟨Q(W+Δ)-W, Δ⟩/‖Δ‖² and `cosine` the cosine between Q(W+Δ)-W and Δ, with Q the
    rounding to the dtype written, over all matrices of the role; None where they are not defined (Δ is zero).
    """

    role: str
    matrices: int
    tensors: int
    bytes: int
    relative: float | None
    kept: float | None
    cosine: float | None


@dataclass(frozen=True, slots=True)
class AbsorbedReport:
    """The file of split tensors: attention `modules` in it and its `bytes` of tensors."""

    file: str
    modules: int
    bytes: int


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What was compared after writing: tensors recomputed bit for bit, tensors equal to the base byte for byte,
    attention modules whose absorbed tensors are the split of the kv_b_proj that was written."""

    recomputed: int
    unchanged: int
    absorbed: int


@dataclass(frozen=True, slots=True)
class MergeReport:
    """A finished merge.  `carried` are the other files of the base that were copied, `left_behind` those that were
    not (weights in other formats, folders, leftovers of an earlier merge)."""

    output: str
    base: str
    adapter: str
    method: str
    model_type: str
    dtype: str
    tensors: int
    tensors_changed: int
    bytes: int
    roles: list[RoleReport]
    absorbed: AbsorbedReport | None
    checks: CheckReport
    carried: list[str]
    left_behind: list[str]
    mla_tune: str = __version__

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def role_reports(plan: MergePlan, record: Record) -> list[RoleReport]:
    """A row for each role that was changed, in the order of `Role`."""
    rows = []
    for role in Role:
        changes = [c for c in plan.changes.values() if c.site.role == role]
        if changes:
            layouts = [(plan.out_dtype(c.ref), c.ref.shape) for c in changes]
            survival = record[role]
            rows.append(
                RoleReport(
                    role=role.value,
                    matrices=sum(c.matrices for c in changes),
                    tensors=len(changes),
                    bytes=sum(tensor_bytes(*layout) for layout in layouts),
                    relative=survival.relative,
                    kept=survival.kept,
                    cosine=survival.cosine,
                )
            )
    return rows
