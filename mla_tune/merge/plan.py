"""What a merge will do, from headers alone: every tensor of every output shard, and where its numbers come from.

    base headers + adapter headers + options → OutShard (a file) → OutTensor (a tensor) → WeightedDelta

Nothing is read but headers, so a plan for a checkpoint of any size takes seconds, and everything that can be refused is
refused before a byte is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from mla_tune.adapter.deltas import Adapter, LoraDelta
from mla_tune.adapter.merge_options import DTYPES, MergeOptions
from mla_tune.arch.roles import Role
from mla_tune.arch.site import Architecture, Site
from mla_tune.checkpoint.dtypes import FLOATS
from mla_tune.checkpoint.index import Checkpoint, Shard, TensorRef, tensor_bytes
from mla_tune.checkpoint.quantized.base import QuantizedTensor
from mla_tune.checkpoint.quantized.config import dequantize_fused_group, quantized_tensors
from mla_tune.checkpoint.writer import TensorLayout
from mla_tune.errors import InputError
from mla_tune.merge.absorb_plan import AbsorbedPlan, plan_absorbed


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


def plan_merge(
    checkpoint: Checkpoint, arch: Architecture, adapters: Sequence[tuple[Adapter, float]], options: MergeOptions
) -> MergePlan:
    """Find every tensor that the adapters change in `checkpoint`, and check the shape and dtype of each.

    Raises `InputError` for weights that can't be dequantized for certain, for tensors that are missing or of another
    shape, for adapters whose merge would not be the model that was trained, and for options that exclude each other.
    """
    options.check()
    quantized = quantized_tensors(checkpoint)
    _check_weights(adapters)
    changes = _Changes(checkpoint, arch, options, quantized)
    for adapter, weight in adapters:
        changes.add(adapter, weight)
    touched = {key for key in changes.outs if key in quantized}
    dequantized: set[str] = set()
    if options.dtype != "keep":
        dequantized = set(quantized)
    elif options.quantized == "dequantize":
        dequantized = touched | dequantize_fused_group(arch, quantized.keys(), touched) if touched else set()
    dequantized |= {key for key in changes.replaced if key in quantized}
    shards = tuple(_Writing(checkpoint, changes, options, quantized, dequantized).shards())
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
        _check(_source(checkpoint, quantized, key), site.shape, checkpoint, quantized.get(key))
    layout = {out.key: (out.dtype, out.shape) for shard in shards for out in shard.tensors}
    kept = {key: tensor for key, tensor in quantized.items() if key not in dequantized}
    headers = layout | {key: (tensor.codes.dtype, tensor.shape) for key, tensor in kept.items()}
    return replace(plan, absorbed=plan_absorbed(arch, headers, options.absorb, quantized=kept))


@dataclass
class _Changes:
    """Collects, key by key, what the adapters do."""

    checkpoint: Checkpoint
    arch: Architecture
    options: MergeOptions
    quantized: Mapping[str, QuantizedTensor]
    outs: dict[str, OutTensor] = field(default_factory=dict)
    replaced: dict[str, Adapter] = field(default_factory=dict)
    untied: bool = False
    aliases: list[tuple[TensorRef, TensorRef]] = field(default_factory=list)

    def add(self, adapter: Adapter, weight: float) -> None:
        for saved in adapter.saved:
            self._replace(adapter, saved.key, saved.ref)
        for delta in adapter.deltas:
            self._refuse_unmergeable(adapter, delta)
            update = WeightedDelta(delta, weight)
            for out in self._tensors(delta):
                known = self.outs.get(out.key)
                # Whole tensors come first: an adapted output head may be saved as a whole beside its LoRA.
                start = out if known is None else replace(out, source=known.source, updates=known.updates)
                self.outs[out.key] = replace(start, updates=(*start.updates, update))

    def _tensors(self, delta: LoraDelta) -> list[OutTensor]:
        """The tensors that one update reaches, as the base has them; the bias of a LoRA bias is one of them.

        A checkpoint may hold a weight under two of its names: each is merged, whichever a program reads.
        """
        site = delta.site
        outs = []
        for keys in (site.disk_keys(), *site.alias_keys()):
            if site.disk != "per_expert":
                # A tied output head is not on disk.
                there = keys[0] in self.quantized or keys[0] in self.checkpoint.tensors
                tied = not there and site.role == Role.LM_HEAD
                outs.append(replace(self._out(self.arch.embedding_key if tied else keys[0]), key=keys[0], site=site))
                continue
            rows = site.shape[0] // site.disk_parts
            for i, key in enumerate(keys):
                expert, part = divmod(i, site.disk_parts)
                wanted = delta.rows is None or (delta.rows[0] < (part + 1) * rows and part * rows < delta.rows[1])
                if wanted and delta.expert in (None, expert):
                    outs.append(replace(self._out(key), site=site, first_row=part * rows, expert=expert))
        if delta.bias is not None:
            outs.append(replace(self._out(site.disk_key("bias")), site=site, is_bias=True))
        return outs

    def _out(self, key: str) -> OutTensor:
        """The weight or tensor of this key as it is, with the shape of its numbers."""
        ref = _source(self.checkpoint, self.quantized, key)
        shape = self.quantized[key].shape if key in self.quantized else ref.shape
        return OutTensor(key, ref.dtype, shape, ref)

    def _replace(self, adapter: Adapter, key: str, ref: TensorRef) -> None:
        if key in self.replaced or key in self.outs:
            raise InputError(
                f"{adapter.folder}: '{key}' is changed by two adapters, of which one replaces it as a whole"
            )
        embedding, head = self.arch.embedding_key, self.arch.head_key
        alias = {embedding: head, head: embedding}.get(key) if self.arch.tied else None
        if alias and adapter.settings.get("ensure_weight_tying"):
            if alias in self.replaced:  # one tensor, saved under both names
                self.aliases.append((self.outs[embedding].source, ref))
                return
            key = embedding
        elif alias and not self.options.untie_embeddings:
            raise InputError(
                f"{adapter.folder}: holds a whole '{key}', but the embedding and the output head are one tensor in "
                "this model. With --untie-embeddings both are written, each as it was trained"
            )
        else:
            self.untied |= alias is not None
        base = self.checkpoint[embedding if key == head and self.arch.tied else key]
        self.replaced[key] = adapter
        self.outs[key] = OutTensor(key, base.dtype, base.shape, ref)

    def _refuse_unmergeable(self, adapter: Adapter, delta: LoraDelta) -> None:
        site = delta.site
        if delta.expert is not None and not delta.method.additive and site.disk != "per_expert":
            raise InputError(
                f"{adapter.folder}: a {delta.method.title} on single experts can't be merged where {site.path} is one "
                "tensor of all"
            )
        what = f"{adapter.folder}: adapts {site.path} ({site.reason})"
        moe = self.arch.family.moe
        if site.role == Role.ROUTER and moe is not None and moe.router_read_directly:
            raise InputError(f"{what}: merged, it would not be the model that was trained")
        if site.role == Role.LM_HEAD and self.arch.tied:
            if not self.options.untie_embeddings:
                raise InputError(
                    f"{what}: merged into both, it would not be the model that was trained. "
                    "With --untie-embeddings the output head is written as a tensor of its own"
                )
            self.untied = True


def _check_weights(adapters: Sequence[tuple[Adapter, float]]) -> None:
    alone = len(adapters) == 1 and adapters[0][1] == 1
    for adapter, _ in adapters:
        sums = adapter.method.additive or not adapter.deltas
        if not alone and (not sums or adapter.saved):
            what = f"holds whole tensors ('{adapter.saved[0].key}')" if sums else f"is a {adapter.method.title}"
            raise InputError(
                f"{adapter.folder}: {what}: it can be merged alone and with the weight 1 only, since a part of it, or "
                "a sum with others, is not defined. Merge it first, then the others into the result"
            )


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


def _source(checkpoint: Checkpoint, quantized: Mapping[str, QuantizedTensor], key: str) -> TensorRef:
    """Where the numbers of a weight are: the codes of a quantized one.  Raises `InputError` for one that is missing."""
    return quantized[key].codes if key in quantized else checkpoint[key]


@dataclass
class _Writing:
    """How each tensor of the base is written, once it is decided what changes and what leaves its format."""

    checkpoint: Checkpoint
    changes: _Changes
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
        """Check the tensor and decide how it is read and written."""
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
