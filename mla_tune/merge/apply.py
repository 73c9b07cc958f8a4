"""The merge of one tensor: float32 weight plus float32 delta, rounded once, and what the rounding kept.

    W the base's weight   Δ the adapter's change (for DoRA: W' - W)   Q rounding to the dtype that is written

PEFT rounds the delta of a bfloat16 adapter to bfloat16 before it adds it; one rounding less can differ from its merge
by one unit in the last place and is never further from the exact sum.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch

from mla_tune.adapter.files import AdapterDelta, Factors
from mla_tune.arch.roles import Role
from mla_tune.checkpoint.index import TensorRef
from mla_tune.checkpoint.shards import FLOATS, read_tensor
from mla_tune.errors import WorkError
from mla_tune.merge.plan import Change, MergePlan
from mla_tune.mla.lora import delta, dora_merge, expert_delta, expert_factors

#: Sites whose factors are kept at hand: the files of a checkpoint alternate between gate, up and down of the experts.
_KEPT_FACTORS = 3


@dataclass(slots=True)
class Survival:
    """How much of a delta survived the rounding, as sums over matrices that add up: ⟨Q(W+Δ)-W, Δ⟩, ‖Δ‖²,
    ‖Q(W+Δ)-W‖² and ‖W‖²."""

    inner: float = 0.0
    delta2: float = 0.0
    kept2: float = 0.0
    weight2: float = 0.0

    def add(self, other: Survival) -> None:
        self.inner += other.inner
        self.delta2 += other.delta2
        self.kept2 += other.kept2
        self.weight2 += other.weight2

    @property
    def relative(self) -> float | None:
        """‖Δ‖/‖W‖."""
        return (self.delta2 / self.weight2) ** 0.5 if self.weight2 else None

    @property
    def kept(self) -> float | None:
        """⟨Q(W+Δ)-W, Δ⟩/‖Δ‖²: 1 where nothing is lost; None where Δ is zero."""
        return self.inner / self.delta2 if self.delta2 else None

    @property
    def cosine(self) -> float | None:
        """Cosine between what was asked for and what was written; None where either is zero."""
        both = (self.delta2 * self.kept2) ** 0.5
        return self.inner / both if both else None


Record = dict[Role, Survival]


class Merger:
    """Merged tensors of a plan, one at a time; holds the factors of a few sites and nothing else."""

    def __init__(self, plan: MergePlan) -> None:
        self.plan = plan
        self._factors: OrderedDict[str, Factors] = OrderedDict()

    def tensor(self, ref: TensorRef, record: Record | None = None) -> torch.Tensor | TensorRef:
        """What the merged checkpoint holds for `ref`: the reference itself where nothing changes.

        `record` takes up how much of each delta survived, by role.  Raises `WorkError` where the result is not finite.
        """
        if ref.key in self.plan.changes:
            return self._merged(self.plan.changes[ref.key], record)
        dtype = self.plan.out_dtype(ref)
        return ref if dtype == ref.dtype else _round(read_tensor(ref), dtype, ref)

    def _merged(self, change: Change, record: Record | None) -> torch.Tensor:
        # float64 weights stay in float64; all others are exact in float32.
        W = read_tensor(change.ref)
        W = W.to(torch.float64 if W.dtype == torch.float64 else torch.float32)
        factors = self._load(change.delta)
        if factors.magnitude is not None:
            merged = dora_merge(W, factors.A, factors.B, factors.scale, factors.magnitude)
            added = merged - W
        else:
            added = _added(change, factors, W.dtype)
            merged = W + added
        rounded = _round(merged, self.plan.out_dtype(change.ref), change.ref)
        if record is not None:
            record.setdefault(change.site.role, Survival()).add(_survival(W, added, rounded))
        return rounded

    def _load(self, item: AdapterDelta) -> Factors:
        path = item.site.path
        if path not in self._factors:
            self._factors[path] = item.load()
            if len(self._factors) > _KEPT_FACTORS:
                self._factors.popitem(last=False)
        self._factors.move_to_end(path)
        return self._factors[path]


def _added(change: Change, factors: Factors, dtype: torch.dtype) -> torch.Tensor:
    """Δ of a LoRA in the shape of the tensor on disk."""
    site = change.site
    if not site.is_experts:
        return delta(factors.A, factors.B, factors.scale, dtype)
    if change.expert is None:
        return expert_delta(factors.A, factors.B, factors.scale, factors.experts, dtype)[: site.count]
    A, B = expert_factors(factors.A, factors.B, factors.experts)
    return delta(A[change.expert], B[change.expert, slice(*change.rows)], factors.scale, dtype)


def _round(tensor: torch.Tensor, dtype: str, ref: TensorRef) -> torch.Tensor:
    rounded = tensor.to(FLOATS[dtype])
    if not bool(rounded.isfinite().all()):
        fits = bool(tensor.isfinite().all())
        why = (
            f"too large for {dtype}: take --dtype bfloat16 or float32" if fits else "the base or the adapter is damaged"
        )
        raise WorkError(f"{ref.file}: '{ref.key}' would hold NaN or infinity ({why})")
    return rounded


def _survival(W: torch.Tensor, added: torch.Tensor, rounded: torch.Tensor) -> Survival:
    kept = rounded.to(W.dtype) - W
    return Survival(_dot(kept, added), _dot(added, added), _dot(kept, kept), _dot(W, W))


def _dot(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x * y).sum(dtype=torch.float64))
