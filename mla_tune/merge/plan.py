"""Plan a merge from headers alone: base headers + adapter headers + options → `MergePlan`.

No weights are read, so the plan for a checkpoint of any size takes seconds, and everything that can be refused is
refused before a byte is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mla_tune.adapter.deltas import Adapter
from mla_tune.adapter.merge_options import DTYPES, MergeOptions
from mla_tune.arch.roles import Role
from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.dtypes import FLOATS
from mla_tune.checkpoint.index import Checkpoint, Shard, TensorRef
from mla_tune.checkpoint.quantized.base import QuantizedTensor
from mla_tune.checkpoint.quantized.config import dequantize_fused_group, quantized_tensors
from mla_tune.errors import InputError
from mla_tune.merge.absorb_plan import plan_absorbed
from mla_tune.merge.changes import AdapterChanges, check_weights, source_of
from mla_tune.merge.output import MergePlan, OutShard, OutTensor


def plan_merge(
    checkpoint: Checkpoint, arch: Architecture, adapters: Sequence[tuple[Adapter, float]], options: MergeOptions
) -> MergePlan:
    """Find every tensor that the adapters change in `checkpoint`, and check the shape and dtype of each.

    Raises `InputError` for weights that can't be dequantized for certain, for tensors that are missing or of another
    shape, for adapters whose merge would not be the model that was trained, and for options that exclude each other.
    """
    options.check()
    quantized = quantized_tensors(checkpoint)
    check_weights(adapters)
    changes = AdapterChanges(checkpoint, arch, options, quantized)
    for adapter, weight in adapters:
        changes.add(adapter, weight)
    touched = {key for key in changes.outs if key in quantized}
    dequantized: set[str] = set()
    if options.dtype != "keep":
        dequantized = set(quantized)
    elif options.quantized == "dequantize":
        dequantized = touched | dequantize_fused_group(arch, quantized.keys(), touched) if touched else set()
    dequantized |= {key for key in changes.replaced if key in quantized}
    shards = tuple(_OutputLayout(checkpoint, changes, options, quantized, dequantized).shards())
    replaced = frozenset(changes.replaced)
    plan = MergePlan(
        checkpoint,
        arch,
        tuple(adapters),
        options,
        shards,
        quantized,
        frozenset(dequantized),
        replaced,
        changes.untied,
        tuple(changes.aliases),
    )
    if options.absorb == "none":
        return plan
    for site in arch.by_role(Role.W_UKV):
        key = site.disk_keys()[0]
        _check(source_of(checkpoint, quantized, key), site.shape, checkpoint, quantized.get(key))
    layout = {out.key: (out.dtype, out.shape) for shard in shards for out in shard.tensors}
    kept = {key: tensor for key, tensor in quantized.items() if key not in dequantized}
    headers = layout | {key: (tensor.codes.dtype, tensor.shape) for key, tensor in kept.items()}
    return replace(plan, absorbed=plan_absorbed(arch, headers, options.absorb, quantized=kept))


def _site_shape(out: OutTensor) -> tuple[int, ...]:
    """The shape that config.json gives to a tensor of a site."""
    site = out.site
    assert site is not None
    rows, columns = site.shape
    if out.is_bias:
        return (rows,)
    if not site.is_experts:
        return (rows, columns)
    if out.expert is None:
        return (site.count, rows, columns)
    return (rows // site.disk_parts, columns)


@dataclass
class _OutputLayout:
    """How each tensor of the base is written, once it is known what changes and what leaves its quantized format."""

    checkpoint: Checkpoint
    changes: AdapterChanges
    options: MergeOptions
    quantized: Mapping[str, QuantizedTensor]
    dequantized: set[str]

    def __post_init__(self) -> None:
        #: Key of codes or of scales → key of the weight.
        self.by_codes = {tensor.codes.key: key for key, tensor in self.quantized.items()}
        self.by_scale = {scale.key: key for key, tensor in self.quantized.items() for scale in tensor.scales}
        self.dropped = {dependent for key in self.dequantized for dependent in self.quantized[key].dependent_keys}

    def shards(self) -> Iterator[OutShard]:
        """The files of the output, in the order of the base's; one that would be empty is left out."""
        for shard in self.checkpoint.shards:
            outs = self._tensors(shard)
            copies = all(out.is_copy and out.source.file == shard.file for out in outs)
            if outs:
                same = copies and len(outs) == len(shard.tensors)
                yield OutShard(self.checkpoint.name(shard), shard, tuple(outs), same)

    def _tensors(self, shard: Shard) -> list[OutTensor]:
        """The tensors of one file, in the base's order."""
        changed, arch = self.changes.outs, self.changes.arch
        outs: list[OutTensor] = []
        for key, ref in shard.tensors.items():
            if key in self.dropped:
                continue
            weight = self.by_scale.get(key)
            if weight is not None and weight in changed:
                out = self._finish(changed[weight])
                outs.append(replace(out, key=key, dtype=ref.dtype, shape=ref.shape, scale_of=out.key))
                continue
            name = self.by_codes.get(key, key)
            shape = self.quantized[name].shape if name in self.quantized else ref.shape
            outs.append(self._finish(changed.get(name) or OutTensor(name, ref.dtype, shape, ref)))
            head_key = arch.head_key
            if key == arch.embedding_key and self.changes.untied and head_key not in self.checkpoint.tensors:
                outs.append(self._finish(changed.get(head_key) or OutTensor(head_key, ref.dtype, ref.shape, ref)))
        return outs

    def _finish(self, out: OutTensor) -> OutTensor:
        """Check the shape of the tensor, and decide how it is read and written."""
        is_base = self.checkpoint.tensors.get(out.source.key) is out.source
        quant = self.quantized.get(self.by_codes.get(out.source.key, "")) if is_base else None
        if out.site is not None:
            _check(out.source, _site_shape(out), self.checkpoint, quant)
        if out.key in self.quantized:
            codes = self.quantized[out.key].codes
            if out.key in self.dequantized:
                dtype = "BF16" if self.options.dtype == "keep" else DTYPES[self.options.dtype]
                return replace(out, dtype=dtype, quant=quant)
            stored = replace(out, key=codes.key, dtype=codes.dtype, shape=codes.shape)
            return replace(stored, quant=quant, requantize=quant if out.updates else None)
        keeps = self.changes.arch.family.keeps_dtype
        if self.options.dtype == "keep" or out.dtype not in FLOATS or out.key.endswith(keeps):
            return out
        return replace(out, dtype=DTYPES[self.options.dtype])


def _check(ref: TensorRef, shape: tuple[int, ...], checkpoint: Checkpoint, quant: QuantizedTensor | None) -> None:
    """Raise `InputError` unless the numbers of a tensor have this shape and can be merged into."""
    found = ref.shape if quant is None else quant.shape
    if found != shape:
        raise InputError(
            f"{ref.file}: '{ref.key}' is {found}, but {checkpoint.folder / 'config.json'} describes {shape}: "
            "weights and configuration are of different models"
        )
    if ref.dtype not in FLOATS and quant is None:
        raise InputError(f"{ref.file}: '{ref.key}' is {ref.dtype}; only {', '.join(FLOATS)} can be merged into")
