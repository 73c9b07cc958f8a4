"""What the adapters of a merge do to the base, key by key: which tensors they add to, replace or untie.

What can't be merged without becoming another model than the one that was trained is refused here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from mla_tune.adapter.deltas import Adapter, LoraDelta
from mla_tune.adapter.merge_options import MergeOptions
from mla_tune.arch.roles import Role
from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.index import Checkpoint, TensorRef
from mla_tune.checkpoint.quantized.base import QuantizedTensor
from mla_tune.errors import InputError
from mla_tune.merge.output import OutTensor, WeightedDelta


@dataclass
class AdapterChanges:
    """The tensors that the adapters change, collected one adapter at a time."""

    #: The base.
    checkpoint: Checkpoint
    #: The base's architecture.
    arch: Architecture
    #: What the user asked for.
    options: MergeOptions
    #: The base's quantized weights by key.
    quantized: Mapping[str, QuantizedTensor]
    #: Changed tensors by key, with the base's dtype; how they are written is decided later (`merge.plan`).
    outs: dict[str, OutTensor] = field(default_factory=dict)
    #: Key of a tensor that an adapter holds whole → that adapter.
    replaced: dict[str, Adapter] = field(default_factory=dict)
    #: The output head becomes a tensor of its own.
    untied: bool = False
    #: Pairs of tensors of one adapter whose bytes must be equal.
    aliases: list[tuple[TensorRef, TensorRef]] = field(default_factory=list)

    def add(self, adapter: Adapter, weight: float) -> None:
        """Add what one adapter does, its deltas multiplied by `weight`.

        Raises `InputError` for a missing tensor, and for a change whose merge would not be the model that was trained.
        """
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
        """The tensors that one update changes, with the numbers of the base; a trained bias is one of them.

        A checkpoint may hold one weight under two names: both are merged, since a program may read either.
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
        """The base's weight or tensor of this key, with the shape of its numbers (not of its codes)."""
        ref = source_of(self.checkpoint, self.quantized, key)
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


def check_weights(adapters: Sequence[tuple[Adapter, float]]) -> None:
    """Raises `InputError` for an adapter that can't be summed or weighted: a DoRA, or one with whole tensors."""
    alone = len(adapters) == 1 and adapters[0][1] == 1
    for adapter, _ in adapters:
        sums = adapter.method.additive or not adapter.deltas
        if not alone and (not sums or adapter.saved):
            what = f"holds whole tensors ('{adapter.saved[0].key}')" if sums else f"is a {adapter.method.title}"
            raise InputError(
                f"{adapter.folder}: {what}: it can be merged alone and with the weight 1 only, since a part of it, or "
                "a sum with others, is not defined. Merge it first, then the others into the result"
            )


def source_of(checkpoint: Checkpoint, quantized: Mapping[str, QuantizedTensor], key: str) -> TensorRef:
    """Where the numbers of a weight are: the codes of a quantized one.  Raises `InputError` for one that is missing."""
    return quantized[key].codes if key in quantized else checkpoint[key]
