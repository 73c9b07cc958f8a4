"""What a merge will do, from headers alone: every tensor of every output shard, and where its numbers come from.

    base headers + adapter headers + options → OutShard (a file) → OutTensor (a tensor) → Update (one low-rank update)

Nothing is read but headers, so a plan for a checkpoint of any size takes seconds, and everything that can be refused is
refused before a byte is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from mla_tune.adapter.files import Adapter, LoraDelta
from mla_tune.adapter.merge_options import DTYPES, MergeOptions
from mla_tune.arch.roles import Role
from mla_tune.arch.site import Architecture, Site
from mla_tune.checkpoint.dtypes import FLOATS
from mla_tune.checkpoint.index import Checkpoint, Shard, TensorRef, tensor_bytes
from mla_tune.checkpoint.quantized.config import dequantize_fused_group
from mla_tune.checkpoint.quantized.fp8 import Quantized, quantized_weights
from mla_tune.checkpoint.writer import TensorLayout
from mla_tune.errors import InputError
from mla_tune.merge.absorb_plan import AbsorbedPlan, plan_absorbed

#: Families whose router is a Linear that is never called, only read: an adapter on it acts once merged, not before.
_ROUTER_READ_DIRECTLY = frozenset({"longcat_flash"})


@dataclass(frozen=True, slots=True)
class WeightedDelta:
    """One low-rank update, times the `weight` of its adapter."""

    delta: LoraDelta
    weight: float


@dataclass(frozen=True, slots=True)
class OutTensor:
    """One tensor of the output.

    Its numbers are those of `source` (coded as `quant` says), plus the `updates`, written as `dtype`: as codes with
    the scales of `requantize`, where that is set.  `scale_of` marks the tensor that holds these scales, and names the
    weight.  `site` is the matrix that the tensor is a part of: rows from `first_row` on, of the expert `expert`; None
    with a site of experts means that the tensor holds them all, (E, out, in).  A tensor whose `source` is not the
    base's of this key was replaced by the adapter or untied.  `is_bias` adds the `updates`' biases, not their matrices.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    source: TensorRef
    quant: Quantized | None = None
    requantize: Quantized | None = None
    scale_of: str | None = None
    site: Site | None = None
    first_row: int = 0
    expert: int | None = None
    updates: tuple[WeightedDelta, ...] = ()
    is_bias: bool = False

    @property
    def nbytes(self) -> int:
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
        return {out.key: (out.dtype, out.shape) for out in self.tensors}

    @property
    def nbytes(self) -> int:
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
    quantized: Mapping[str, Quantized]
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
    quantized = quantized_weights(checkpoint)
    _check_weights(adapters)
    changes = _Changes(checkpoint, arch, options)
    for adapter, weight in adapters:
        changes.add(adapter, weight)
    touched = {key for key in changes.outs if key in quantized}
    dequantized: set[str] = set()
    if options.dtype != "keep":
        dequantized = set(quantized)
    elif options.quantized == "dequantize":
        dequantized = touched | dequantize_fused_group(arch, checkpoint, touched) if touched else set()
    dequantized |= {key for key in changes.replaced if key in quantized}
    shards = tuple(_shards(checkpoint, changes, options, quantized, dequantized))
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
        _check(checkpoint[site.disk_keys()[0]], site.shape, checkpoint, quantized)
    layout = {out.key: (out.dtype, out.shape) for shard in shards for out in shard.tensors}
    return replace(plan, absorbed=plan_absorbed(arch, layout, options.absorb))


@dataclass
class _Changes:
    """Collects, key by key, what the adapters do."""

    checkpoint: Checkpoint
    arch: Architecture
    options: MergeOptions
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
            for out in _tensors(self.checkpoint, self.arch, delta):
                known = self.outs.get(out.key)
                # Whole tensors come first: an adapted output head may be saved as a whole beside its LoRA.
                start = out if known is None else replace(out, source=known.source, updates=known.updates)
                self.outs[out.key] = replace(start, updates=(*start.updates, update))

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
        if site.role == Role.ROUTER and self.arch.family.model_type in _ROUTER_READ_DIRECTLY:
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


def _tensors(checkpoint: Checkpoint, arch: Architecture, delta: LoraDelta) -> list[OutTensor]:
    """The tensors on disk that one update reaches, as the base has them; the bias of a LoRA bias is one of them.

    A checkpoint may hold a weight under two of its names: each is merged, whichever a program reads.
    """
    site = delta.site
    outs = []
    for keys in (site.disk_keys(), *site.alias_keys()):
        if site.disk != "per_expert":
            # A tied output head is not on disk.
            ref = checkpoint.tensors.get(keys[0])
            tied = ref is None and site.role == Role.LM_HEAD
            ref = checkpoint[arch.embedding_key if tied else keys[0]]
            outs.append(OutTensor(keys[0], ref.dtype, ref.shape, ref, site=site))
            continue
        rows = site.shape[0] // site.disk_parts
        for i, key in enumerate(keys):
            expert, part = divmod(i, site.disk_parts)
            wanted = delta.rows is None or (delta.rows[0] < (part + 1) * rows and part * rows < delta.rows[1])
            if wanted and delta.expert in (None, expert):
                ref = checkpoint[key]
                outs.append(OutTensor(key, ref.dtype, ref.shape, ref, site=site, first_row=part * rows, expert=expert))
    if delta.bias is not None:
        ref = checkpoint[site.disk_key("bias")]
        outs.append(OutTensor(ref.key, ref.dtype, ref.shape, ref, site=site, is_bias=True))
    return outs


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


def _shards(
    checkpoint: Checkpoint,
    changes: _Changes,
    options: MergeOptions,
    quantized: Mapping[str, Quantized],
    dequantized: set[str],
) -> Iterator[OutShard]:
    scales = {q.scale.key: key for key, q in quantized.items()}
    dropped = {key for weight in dequantized for key in (quantized[weight].scale.key, *quantized[weight].companions)}
    for shard in checkpoint.shards:
        outs = _outs(checkpoint, shard, changes, options, quantized, dequantized, scales, dropped)
        same = all(out.is_copy and out.source.file == shard.file for out in outs) and len(outs) == len(shard.tensors)
        if outs:
            yield OutShard(checkpoint.name(shard), shard, tuple(outs), same)


def _outs(
    checkpoint: Checkpoint,
    shard: Shard,
    changes: _Changes,
    options: MergeOptions,
    quantized: Mapping[str, Quantized],
    dequantized: set[str],
    scales: Mapping[str, str],
    dropped: set[str],
) -> list[OutTensor]:
    """The tensors of one file, in the base's order."""
    outs: list[OutTensor] = []
    keeps = changes.arch.family.keeps_dtype
    for key, ref in shard.tensors.items():
        if key in dropped:
            continue
        weight = scales.get(key)
        if weight is not None and weight in changes.outs:
            out = _finish(changes.outs[weight], checkpoint, options, quantized, dequantized, keeps)
            outs.append(replace(out, key=key, dtype=ref.dtype, shape=ref.shape, scale_of=weight))
            continue
        out = changes.outs.get(key) or OutTensor(key, ref.dtype, ref.shape, ref)
        outs.append(_finish(out, checkpoint, options, quantized, dequantized, keeps))
        head_key = changes.arch.head_key
        if key == changes.arch.embedding_key and changes.untied and head_key not in checkpoint.tensors:
            head = changes.outs.get(head_key) or OutTensor(head_key, ref.dtype, ref.shape, ref)
            outs.append(_finish(head, checkpoint, options, quantized, dequantized, keeps))
    return outs


def _finish(
    out: OutTensor,
    checkpoint: Checkpoint,
    options: MergeOptions,
    quantized: Mapping[str, Quantized],
    dequantized: set[str],
    keeps: tuple[str, ...],
) -> OutTensor:
    """Check the tensor and decide how it is read and written."""
    if out.site is not None:
        _check(out.source, _site_shape(out), checkpoint, quantized)
    is_base = checkpoint.tensors.get(out.source.key) is out.source
    quant = quantized.get(out.source.key) if is_base else None
    if out.key in quantized:
        if out.key in dequantized:
            dtype = "BF16" if options.dtype == "keep" else DTYPES[options.dtype]
            return replace(out, dtype=dtype, quant=quant)
        return replace(out, quant=quant, requantize=quant if out.updates else None)
    if options.dtype == "keep" or out.dtype not in FLOATS or out.key.endswith(keeps):
        return out
    return replace(out, dtype=DTYPES[options.dtype])


def _check(ref: TensorRef, shape: tuple[int, ...], checkpoint: Checkpoint, quantized: Mapping[str, Quantized]) -> None:
    if ref.shape != shape:
        raise InputError(
            f"{ref.file}: '{ref.key}' is {ref.shape}, but {checkpoint.folder / 'config.json'} describes {shape}: "
            "weights and configuration are of different models"
        )
    if ref.dtype not in FLOATS and ref.key not in quantized:
        raise InputError(f"{ref.file}: '{ref.key}' is {ref.dtype}; only {', '.join(FLOATS)} can be merged into")
