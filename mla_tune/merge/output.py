"""The output of a merge before it is written: every file, every tensor in it, and where its numbers come from.

MergePlan (the whole output) → OutShard (a file) → OutTensor (a tensor) → WeightedDelta (a low-rank update of it)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from mla_tune.adapter.deltas import Adapter, LoraDelta
from mla_tune.adapter.merge_options import MergeOptions
from mla_tune.arch.site import Architecture, Site
from mla_tune.checkpoint.index import Checkpoint, Shard, TensorRef, tensor_bytes
from mla_tune.checkpoint.quantized.base import QuantizedTensor
from mla_tune.checkpoint.writer import TensorLayout
from mla_tune.merge.absorb_plan import AbsorbedPlan


@dataclass(frozen=True, slots=True)
class WeightedDelta:
    """One low-rank update, times the `weight` of its adapter."""

    delta: LoraDelta
    weight: float


@dataclass(frozen=True, slots=True)
class OutTensor:
    """One tensor of the output.

    Its numbers are those of `source` (coded as `quant` says), plus the `updates`, written as `dtype`: as codes with
    the scales of `requantize`, where that is set.  `scale_of` marks a tensor that holds such scales, and names the
    weight; its `key` is that of one of `requantize.scales`.  `site` is the matrix that the tensor is a part of: rows
    from `first_row` on, of the expert `expert`; None with a site of experts means that the tensor holds them all,
    (E, out, in).  A tensor whose `source` is not the base's of this key was replaced by the adapter or untied.
    `is_bias` adds the `updates`' biases, not their matrices.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    source: TensorRef
    quant: QuantizedTensor | None = None
    requantize: QuantizedTensor | None = None
    scale_of: str | None = None
    site: Site | None = None
    first_row: int = 0
    expert: int | None = None
    updates: tuple[WeightedDelta, ...] = ()
    is_bias: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor as it is written."""
        return tensor_bytes(self.dtype, self.shape)

    @property
    def is_copy(self) -> bool:
        """The bytes of `source`, as they are."""
        return self.dtype == self.source.dtype and not self.updates and not self.scale_of


@dataclass(frozen=True, slots=True)
class OutShard:
    """One file of the output, named and ordered as the base's `source`; `is_same` where not a byte differs."""

    name: str
    source: Shard
    tensors: tuple[OutTensor, ...]
    is_same: bool

    @property
    def layout(self) -> TensorLayout:
        """Key → (dtype, shape) of the tensors, in the order in which they are written."""
        return {out.key: (out.dtype, out.shape) for out in self.tensors}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the file."""
        return sum(out.nbytes for out in self.tensors)


@dataclass(frozen=True)
class MergePlan:
    """Everything that a merge will write, from headers alone.

    `adapters` stand with their weights.  `quantized` says how the base's weights are coded, `dequantized` which of them
    are written unquantized, `replaced` which tensors come whole from an adapter.  `untied`: the output head becomes a
    tensor of its own.  `aliases` are pairs of tensors of an adapter that must be equal.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    adapters: tuple[tuple[Adapter, float], ...]
    options: MergeOptions
    shards: tuple[OutShard, ...]
    quantized: Mapping[str, QuantizedTensor]
    dequantized: frozenset[str]
    replaced: frozenset[str]
    untied: bool
    aliases: tuple[tuple[TensorRef, TensorRef], ...] = ()
    absorbed: AbsorbedPlan | None = None

    @cached_property
    def changed(self) -> list[OutTensor]:
        """The tensors that an adapter changes, in the order of the output."""
        return [
            out
            for shard in self.shards
            for out in shard.tensors
            if out.scale_of is None and (out.updates or out.key in self.replaced)
        ]

    @property
    def model_bytes(self) -> int:
        """Bytes of all tensors of the merged checkpoint."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def written_bytes(self) -> int:
        """Bytes of the shards that are not the base's own files, and of the absorbed tensors."""
        changed = sum(shard.nbytes for shard in self.shards if not (shard.is_same and self.options.link))
        return changed + (self.absorbed.bytes if self.absorbed else 0)
