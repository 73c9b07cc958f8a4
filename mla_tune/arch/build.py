"""config.json → `Architecture`.  Reads numbers only: no weights, no torch, no network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mla_tune.arch.config import Config, ConfigReader, dims_of, letters_of, numbers_of
from mla_tune.arch.dims import MLADims
from mla_tune.arch.family import Family
from mla_tune.arch.key_mapping import KeyMapping
from mla_tune.arch.layer_types import INDEXERS, KINDS, LAYER_DIMS, MOE_LAYERS
from mla_tune.arch.multimodal import Wrapper, tower_parts, unwrapped
from mla_tune.arch.parts import Part, numbers, size
from mla_tune.arch.recognize import family_of, model_type_of
from mla_tune.arch.roles import REASONS, Role
from mla_tune.arch.site import HEAD, Architecture, Attention, Site
from mla_tune.errors import InputError


def architecture(config: Config, where: str = "config.json") -> Architecture:
    """The sites, dimensions and totals of the model that `config` (a parsed config.json) describes.

    Totals count the main model as transformers instantiates it: MTP layers are not in it, nor is a tower whose layout
    is not known (`Architecture.tower_counted`).
    Raises `NotMLAError` for a model without MLA and `InputError` for a family or key that is not known.
    """
    text, kind, wrapper = unwrapped(config)
    family, warnings = family_of(config, text, kind, where)
    return _Builder(config, ConfigReader(text, family, where), family, wrapper, warnings).build()


class _Builder:
    """Lists the sites of one model, layer by layer."""

    def __init__(
        self, config: Config, keys: ConfigReader, family: Family, wrapper: Wrapper | None, warnings: tuple[str, ...]
    ) -> None:
        self.config, self.c, self.family, self.wrapper, self.warnings = config, keys, family, wrapper, warnings
        self.prefix = wrapper.prefix if wrapper else "model"
        self.n = keys.int(family.layers_key)
        self.D, self.vocab = keys.int("hidden_size"), keys.int("vocab_size")
        self.key_mapping = _naming(family, wrapper)
        self.letters = {"D": self.D, **letters_of(keys, family)}
        self.attention_types = self._list(KINDS[family.attention_types])
        self.indexers = self._list(INDEXERS[family.indexers]) if family.indexers else [False] * self.n
        self.moe_layers = (
            self._list(MOE_LAYERS[family.moe.layers]) if family.moe and self._experts() else [False] * self.n
        )
        own = LAYER_DIMS[family.layer_dims](keys, self.attention_types) if family.layer_dims else [{}] * self.n
        self.dims = [dims_of(keys.with_(sizes), self.D) for sizes in own]
        self.vectors = 0

    def build(self) -> Architecture:
        """Everything but MTP layers goes into the totals."""
        sites: list[Site] = []
        attention: list[Attention] = []
        for layer in range(self.n):
            sites += self._layer(layer, self.attention_types[layer], self.moe_layers[layer], self.dims[layer])
            attention += self._attentions(layer)
        if not attention:
            raise InputError(f"{self.c.where}: no layer of this {self.family.title} model has MLA")
        sites += self._parts("decoder", self.prefix, None, self.letters)
        tied = self._tied()
        reason = "tied to the embedding: an adapter would change both" if tied else "large; not adapted by mla-tune"
        head = Site("lm_head", Role.LM_HEAD, None, (self.vocab, self.D), attachable=False, reason=reason)
        sites.append(self._placed(head))
        sites += self._tower()
        mtp_layers, mtp = self._mtp()
        matrices = sum(s.params for s in sites if s.role != Role.LM_HEAD)
        total = matrices + self.vectors + self.D + self.vocab * self.D * (1 if tied else 2)
        top_k = idle = 0
        moe = self.family.moe
        if moe and any(self.moe_layers):
            routed = sum(s.params for s in sites if s.is_experts)
            top_k = self.c.int(moe.top_k_key)
            idle = round(routed * (1 - top_k / self.c.int(moe.experts_key)))
        main = next((a for a in attention if not a.window and a.dims.R), attention[0])
        quantization = self.config.get("quantization_config") or self.c.config.get("quantization_config")
        return Architecture(
            model_type=model_type_of(self.config) or self.family.model_type,
            family=self.family,
            num_layers=self.n,
            dims=main.dims,
            attention=tuple(attention),
            sites=tuple(sites),
            params_total=total,
            vocab_size=self.vocab,
            max_position_embeddings=int(self.c.get("max_position_embeddings", 0) or 0),
            tied=tied,
            mtp_layers=mtp_layers,
            quantization=str(quantization.get("quant_method", "unknown")) if quantization else None,
            active_params=total - idle,
            experts_per_token=top_k,
            prefix=self.prefix,
            wrapper=self.wrapper,
            key_mapping=self.key_mapping,
            mtp_sites=tuple(mtp),
            warnings=self.warnings,
            embedding_key=self.key_mapping.candidates(f"{self.prefix}.embed_tokens.weight")[0],
            head_key=self.key_mapping.candidates(HEAD)[0],
            letters=self.letters,
        )

    def _list(self, rule: Any) -> list[Any]:
        found = rule(self.c, self.n)
        if len(found) < self.n:
            raise InputError(
                f"{self.c.where}: a list that has an entry for each layer has {len(found)}, and there are {self.n}"
            )
        return found[: self.n]

    def _experts(self) -> int:
        assert self.family.moe is not None
        return int(self.c.get(self.family.moe.experts_key) or 0)

    def _tied(self) -> bool:
        """transformers reads a wrapper's from the top level."""
        if self.wrapper and self.c.config is not self.config:
            found = self.config.get("tie_word_embeddings")
            return self.wrapper.tied if found is None else bool(found)
        return bool(self.c.get("tie_word_embeddings", False))

    def _layer(self, layer: int, kind: str, has_experts: bool, dims: MLADims) -> Iterator[Site]:
        family, c = self.family, self.c
        base = f"{self.prefix}.layers.{layer}"
        letters = self.letters | numbers_of(dims)
        self.vectors += family.norms * self.D
        for name in family.attention:
            if kind == "linear":
                yield from self._parts("linear", f"{base}.{name}", layer, letters)
            else:
                yield from self._attention(f"{base}.{name}", layer, dims, letters)
        yield from self._parts("layer", base, layer, letters)
        if not has_experts or family.dense_beside_moe:
            width, bias = c.int(family.width_key), bool(c.get("mlp_bias", False))
            for name in family.dense_mlp:
                yield from self._mlp(f"{base}.{name}", layer, width, (Role.GATE, Role.UP, Role.DOWN), bias)
        if has_experts:
            yield from self._moe(base, layer)
        yield from self._parts("moe" if has_experts else "dense", base, layer, letters)

    def _attentions(self, layer: int) -> Iterator[Attention]:
        if self.attention_types[layer] != "linear":
            for name in self.family.attention:
                yield Attention(
                    f"{self.prefix}.layers.{layer}.{name}",
                    layer,
                    self.dims[layer],
                    owns_cache=not self._borrows(layer),
                    window=self.attention_types[layer] == "sliding",
                    indexer=self._has_indexer(layer),
                )

    def _borrows(self, layer: int) -> bool:
        sources = self.c.get(self.family.kv_source_key) if self.family.kv_source_key else None
        return bool(sources) and layer < self.n and sources[layer] != layer

    def _has_indexer(self, layer: int) -> bool:
        if layer >= self.n:  # an MTP layer
            return self.family.indexers is not None
        return self.indexers[layer] and self.attention_types[layer] == "mla"

    def _attention(self, path: str, layer: int, d: MLADims, letters: Mapping[str, int]) -> Iterator[Site]:
        bias = bool(self.c.get("attention_bias", False))
        if d.L is None:
            yield self._matrix(f"{path}.q_proj", Role.W_Q, layer, (d.H * (d.P + d.R), d.D))
        else:
            yield self._matrix(f"{path}.q_a_proj", Role.W_DQ, layer, (d.L, d.D), bias)
            name, (rows, columns) = self.family.query
            yield self._matrix(f"{path}.{name}", Role.W_UQ, layer, (size(rows, letters), size(columns, letters)))
            self.vectors += d.L
        if not self._borrows(layer):
            yield self._matrix(f"{path}.kv_a_proj_with_mqa", Role.W_DKV, layer, (d.C + d.R, d.D), bias)
            self.vectors += d.C
        yield self._matrix(f"{path}.kv_b_proj", Role.W_UKV, layer, (d.H * (d.P + d.V), d.C))
        yield self._matrix(f"{path}.o_proj", Role.W_O, layer, (d.D, d.H * d.V), bias)
        yield from self._parts("mla", path, layer, letters)
        if self._has_indexer(layer):
            yield from self._parts("indexer", f"{path}.indexer", layer, letters)

    def _mlp(
        self, path: str, layer: int, width: int, roles: tuple[Role, Role, Role], bias: bool = False
    ) -> Iterator[Site]:
        gate, up, down = roles
        yield self._matrix(f"{path}.gate_proj", gate, layer, (width, self.D), bias)
        yield self._matrix(f"{path}.up_proj", up, layer, (width, self.D), bias)
        yield self._matrix(f"{path}.down_proj", down, layer, (self.D, width), bias)

    def _moe(self, base: str, layer: int) -> Iterator[Site]:
        moe, c = self.family.moe, self.c
        assert moe is not None
        path, E, width = f"{base}.{moe.path}", c.int(moe.experts_key), c.int(moe.width_key)
        outputs = E + (c.int(moe.identity_experts_key) if moe.identity_experts_key else 0)
        yield replace(
            self._matrix(
                f"{path}.{moe.router}",
                Role.ROUTER,
                layer,
                (outputs, self.D),
                bias=bool(moe.router_bias_key and c.get(moe.router_bias_key)),
            ),
            attachable=False,
            reason=moe.router_reason,
        )
        for leaf, role, shape in (
            ("gate_up_proj", Role.EXPERTS_GATE_UP, (2 * width, self.D)),
            ("down_proj", Role.EXPERTS_DOWN, (self.D, width)),
        ):
            yield self._placed(Site(f"{path}.experts.{leaf}", role, layer, shape, E))
        if moe.shared_key and c.get(moe.shared_key):
            roles = (Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN)
            one = c.int(moe.shared_width_key) if moe.shared_width_key else width
            bias = bool(c.get("mlp_bias", False))
            yield from self._mlp(f"{path}.shared_experts", layer, one * c.int(moe.shared_key), roles, bias)

    def _parts(self, where: Any, base: str, layer: int | None, letters: Mapping[str, int]) -> Iterator[Site]:
        for part in self.family.parts.get(where, ()):
            yield from self._part(part, f"{base}.{part.path}", layer, letters)

    def _part(self, part: Part, path: str, layer: int | None, letters: Mapping[str, int]) -> Iterator[Site]:
        if part.role is None or len(part.shape) == 1:
            self.vectors += numbers(part, letters)
            return
        rows, columns = (size(e, letters) for e in part.shape)
        site = Site(path, part.role, layer, (rows, columns), bias=part.bias, is_parameter=part.is_parameter)
        yield self._placed(replace(site, attachable=False, reason=REASONS[part.role]))

    def _tower(self) -> Iterator[Site]:
        if self.wrapper:
            parts, letters = tower_parts(self.wrapper, self.config, self.D)
            for part, path in parts:
                bias = part.bias or ("projector.linear" in path and bool(self.config.get("multimodal_projector_bias")))
                yield from self._part(replace(part, bias=bias), path, None, letters)

    def _mtp(self) -> tuple[int, list[Site]]:
        """The number of MTP layers, and their sites where their layout is known."""
        count = int(self.c.get("num_nextn_predict_layers", 0) or 0)
        if not self.family.mtp or not count:
            return count, []
        vectors, sites = self.vectors, []
        has_experts = self.family.moe is not None and any(self.moe_layers)
        for layer in range(self.n, self.n + count):
            projection = f"{self.prefix}.layers.{layer}.eh_proj"
            sites.append(self._matrix(projection, Role.MTP_PROJECTION, layer, (self.D, 2 * self.D)))
            sites += self._layer(layer, "mla", has_experts, dims_of(self.c, self.D))
        self.vectors = vectors
        reason = REASONS[Role.MTP_PROJECTION]
        return count, [replace(s, attachable=False, reason=reason, mtp=True) for s in sites]

    def _matrix(self, path: str, role: Role, layer: int, shape: tuple[int, int], bias: bool = False) -> Site:
        return self._placed(Site(path, role, layer, shape, bias=bias))

    def _placed(self, site: Site) -> Site:
        """With the place on disk that published checkpoints of the family have."""
        path = self.key_mapping.candidates(site.path)[0]
        if not site.is_experts:
            return replace(site, disk_path=path if path != site.path else "")
        moe = self.family.moe
        if moe is not None and moe.fused_on_disk:
            return replace(site, disk="fused", disk_path=path if path != site.path else "")
        gate, up, down = self.key_mapping.experts
        leaves = (gate, up) if site.role == Role.EXPERTS_GATE_UP else (down,)
        return replace(site, disk="per_expert", disk_path=path.rpartition(".")[0], leaves=leaves)


def _naming(family: Family, wrapper: Wrapper | None) -> KeyMapping:
    """The family's names and, after them, the wrapper's."""
    around = wrapper.ways if wrapper else ((),)
    return replace(
        family.key_mapping, ways=tuple((*inner, *outer) for outer in around for inner in family.key_mapping.ways)
    )
