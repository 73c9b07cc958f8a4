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
    """One tensor of the output: the numbers of `source`, plus the `updates`, written as `dtype`."""

    #: Its key in the output.
    key: str
    #: The dtype that is written, as safetensors names it.
    dtype: str
    #: The shape that is written; for a quantized weight that of its codes.
    shape: tuple[int, ...]
    #: The tensor that holds the numbers before the updates: the base's of this key, or, where an adapter replaces the
    #: tensor or the output head is untied, another one.
    source: TensorRef
    #: How `source` is quantized; None for a plain tensor.
    quant: QuantizedTensor | None = None
    #: How the result is quantized again; None where it is written as plain numbers, or copied.
    requantize: QuantizedTensor | None = None
    #: For a tensor of fresh scales (`key` is then one of `requantize.scales`): the key of the weight they belong to.
    scale_of: str | None = None
    #: The matrix that the tensor is all or a part of; None for a tensor that no adapter can sit on.
    site: Site | None = None
    #: The row of the site at which the tensor begins.
    first_row: int = 0
    #: Which of the site's experts the tensor holds; None for a single matrix, and for all experts in one (E, out, in).
    expert: int | None = None
    #: The low-rank updates that are added.
    updates: tuple[WeightedDelta, ...] = ()
    #: The tensor is a bias: the biases of the `updates` are added, not their matrices.
    is_bias: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor as it is written."""
        return tensor_bytes(self.dtype, self.shape)

    @property
    def is_copy(self) -> bool:
        """Whether the bytes of `source` are written as they are."""
        return self.dtype == self.source.dtype and not self.updates and not self.scale_of


@dataclass(frozen=True, slots=True)
class OutShard:
    """One file of the output."""

    #: Its name, which is the base's.
    name: str
    #: The base's file.
    source: Shard
    #: Its tensors, in the base's order.
    tensors: tuple[OutTensor, ...]
    #: No byte differs from the base's file: it can be linked or copied.
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
    """Everything that a merge will write, from headers alone."""

    #: The base.
    checkpoint: Checkpoint
    #: The base's architecture.
    architecture: Architecture
    #: The adapters, each with the weight that its delta is multiplied by.
    adapters: tuple[tuple[Adapter, float], ...]
    #: What the user asked for.
    options: MergeOptions
    #: The files of the output.
    shards: tuple[OutShard, ...]
    #: The base's quantized weights by key.
    quantized: Mapping[str, QuantizedTensor]
    #: Keys of quantized weights that are written as plain numbers.
    dequantized: frozenset[str]
    #: Keys of tensors that an adapter holds whole (`modules_to_save`).
    replaced: frozenset[str]
    #: The output head, which the base shares with the embedding, becomes a tensor of its own.
    untied: bool
    #: Pairs of tensors of one adapter that are one tensor in the model, so that their bytes must be equal.
    aliases: tuple[tuple[TensorRef, TensorRef], ...] = ()
    #: The absorbed tensors that will be written beside the checkpoint; None where none were asked for.
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
