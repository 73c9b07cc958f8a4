"""Build an `Architecture` from config.json: `architecture`.  No weights, no torch, no network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mla_tune.arch.config import Config, ConfigReader, dims_of, letters_of_dims, letters_of_family
from mla_tune.arch.dims import MLADims
from mla_tune.arch.family import Family, Where
from mla_tune.arch.key_mapping import KeyMapping
from mla_tune.arch.layer_types import ATTENTION_TYPES, INDEXERS, LAYER_DIMS, MOE_LAYERS, Rule
from mla_tune.arch.multimodal import Wrapper, tower_parts, unwrap
from mla_tune.arch.parts import Part, evaluate_size, parameter_count
from mla_tune.arch.recognize import family_of, model_type_of
from mla_tune.arch.roles import REASONS_NOT_ADAPTED, Role
from mla_tune.arch.site import HEAD, Architecture, Attention, Site
from mla_tune.errors import InputError


def architecture(config: Config, where: str = "config.json") -> Architecture:
    """Return the sites, dimensions and totals of the model that `config` (a parsed config.json) describes.

    `where` names the file in errors.  Totals count the main model as transformers instantiates it: without MTP layers,
    and without a tower whose layout is not known (`Architecture.tower_counted`).

    Raises `NotMLAError` for a model without MLA, and `InputError` for a layout that is not known and for a key of
    config.json that is missing or has a wrong value.
    """
    text, kind, wrapper = unwrap(config)
    family, warnings = family_of(config, text, kind, where)
    return _Builder(config, ConfigReader(text, family, where), family, wrapper, warnings).build()


class _Builder:
    """Lists the sites of one model, layer by layer.

    Vectors (norms, biases of routers) are no sites: methods that yield sites add the vectors' sizes to `self.vectors`,
    which becomes a part of the model's total.
    """

    def __init__(
        self, config: Config, keys: ConfigReader, family: Family, wrapper: Wrapper | None, warnings: tuple[str, ...]
    ) -> None:
        self.config, self.keys, self.family, self.wrapper, self.warnings = config, keys, family, wrapper, warnings
        self.prefix = wrapper.prefix if wrapper else "model"
        self.num_layers = keys.int(family.layers_key)
        self.D, self.vocab_size = keys.int("hidden_size"), keys.int("vocab_size")
        self.key_mapping = _key_mapping(family, wrapper)
        self.letters = {"D": self.D, **letters_of_family(keys, family)}
        no_layer = [False] * self.num_layers
        self.attention_types = self._apply(ATTENTION_TYPES[family.attention_types])
        self.indexers = self._apply(INDEXERS[family.indexers]) if family.indexers else no_layer
        has_experts = family.moe is not None and bool(keys.get(family.moe.experts_key))
        self.moe_layers = self._apply(MOE_LAYERS[family.moe.layers]) if family.moe and has_experts else no_layer
        own_values: list[Mapping[str, Any]] = [{}] * self.num_layers
        if family.layer_dims:
            own_values = self._checked_length(LAYER_DIMS[family.layer_dims](keys, self.attention_types))
        cache_sources = keys.get(family.kv_source_key) if family.kv_source_key else None
        self.cache_sources = self._checked_length(cache_sources) if cache_sources else [*range(self.num_layers)]
        self.dims = [dims_of(keys.replaced(values), self.D) for values in own_values]
        self.vectors = 0

    def build(self) -> Architecture:
        """List all sites and return the architecture.  Raises `InputError` if no layer has MLA."""
        sites = [site for layer in range(self.num_layers) for site in self._layer_sites(layer)]
        attention = [module for layer in range(self.num_layers) for module in self._attention_modules(layer)]
        if not attention:
            raise InputError(f"{self.keys.where}: no layer of this {self.family.title} model has MLA")
        sites += self._part_sites("decoder", self.prefix, None, self.letters)
        sites.append(self._head())
        sites += self._tower_sites()
        mtp_layers, mtp_sites = self._mtp()
        total, active, top_k = self._totals(sites)
        main = next((module for module in attention if not module.has_window and module.dims.R), attention[0])
        quantization = self.config.get("quantization_config") or self.keys.config.get("quantization_config")
        return Architecture(
            model_type=model_type_of(self.config) or self.family.model_type,
            family=self.family,
            num_layers=self.num_layers,
            dims=main.dims,
            attention=tuple(attention),
            sites=tuple(sites),
            params_total=total,
            vocab_size=self.vocab_size,
            max_position_embeddings=int(self.keys.get("max_position_embeddings", 0) or 0),
            tied=self._is_tied(),
            mtp_layers=mtp_layers,
            quantization=str(quantization.get("quant_method", "unknown")) if quantization else None,
            active_params=active,
            experts_per_token=top_k,
            prefix=self.prefix,
            wrapper=self.wrapper,
            key_mapping=self.key_mapping,
            mtp_sites=tuple(mtp_sites),
            warnings=self.warnings,
            embedding_key=self.key_mapping.candidates(f"{self.prefix}.embed_tokens.weight")[0],
            head_key=self.key_mapping.candidates(HEAD)[0],
            letters=self.letters,
        )

    def _apply(self, rule: Rule) -> list[Any]:
        """Return what a rule says of each decoder layer.  Raises `InputError` if config.json's list is too short."""
        return self._checked_length(rule(self.keys, self.num_layers))

    def _checked_length(self, per_layer: list[Any]) -> list[Any]:
        """Return the entries of the decoder layers.  Raises `InputError` if there are too few."""
        if len(per_layer) < self.num_layers:
            raise InputError(
                f"{self.keys.where}: a list that has an entry for each layer has {len(per_layer)} entries, and there "
                f"are {self.num_layers} layers"
            )
        return per_layer[: self.num_layers]

    def _totals(self, sites: list[Site]) -> tuple[int, int, int]:
        """Return (parameters, those that one token passes through, experts that a token goes to)."""
        matrices = sum(site.params for site in sites if site.role != Role.LM_HEAD)
        ends = self.vocab_size * self.D * (1 if self._is_tied() else 2)
        total = matrices + self.vectors + self.D + ends  # D: the final norm
        moe = self.family.moe
        if not moe or not any(self.moe_layers):
            return total, total, 0
        routed = sum(site.params for site in sites if site.is_experts)
        top_k = self.keys.int(moe.top_k_key)
        idle = round(routed * (1 - top_k / self.keys.int(moe.experts_key)))
        return total, total - idle, top_k

    def _is_tied(self) -> bool:
        """Whether the output head is the embedding; transformers reads a wrapper's flag from the top level."""
        if self.wrapper and self.keys.config is not self.config:
            found = self.config.get("tie_word_embeddings")
            return self.wrapper.tied if found is None else bool(found)
        return bool(self.keys.get("tie_word_embeddings", False))

    def _head(self) -> Site:
        tied = self._is_tied()
        reason = "tied to the embedding: an adapter would change both" if tied else "large; not adapted by mla-tune"
        shape = (self.vocab_size, self.D)
        return self._with_disk_path(Site("lm_head", Role.LM_HEAD, None, shape, attachable=False, reason=reason))

    def _layer_sites(self, layer: int) -> Iterator[Site]:
        """Yield the sites of a decoder layer."""
        return self._sites_of_layer(
            layer, kind=self.attention_types[layer], has_experts=self.moe_layers[layer], dims=self.dims[layer]
        )

    def _sites_of_layer(self, layer: int, *, kind: str, has_experts: bool, dims: MLADims) -> Iterator[Site]:
        """Yield the sites of a decoder layer or an MTP layer with this kind of attention."""
        family, keys = self.family, self.keys
        base = f"{self.prefix}.layers.{layer}"
        letters = self.letters | letters_of_dims(dims)
        self.vectors += family.norms * self.D
        for name in family.attention:
            if kind == "linear":
                yield from self._part_sites("linear", f"{base}.{name}", layer, letters)
            else:
                yield from self._attention_sites(f"{base}.{name}", layer, dims, letters)
        yield from self._part_sites("layer", base, layer, letters)
        if not has_experts or family.dense_beside_moe:
            width, bias = keys.int(family.width_key), bool(keys.get("mlp_bias", False))
            for name in family.dense_mlp:
                yield from self._mlp_sites(f"{base}.{name}", layer, width, (Role.GATE, Role.UP, Role.DOWN), bias)
        if has_experts:
            yield from self._moe_sites(base, layer)
        yield from self._part_sites("moe" if has_experts else "dense", base, layer, letters)

    def _attention_modules(self, layer: int) -> Iterator[Attention]:
        if self.attention_types[layer] != "linear":
            for name in self.family.attention:
                yield Attention(
                    f"{self.prefix}.layers.{layer}.{name}",
                    layer,
                    self.dims[layer],
                    owns_cache=not self._reads_other_cache(layer),
                    has_window=self.attention_types[layer] == "sliding",
                    has_indexer=self._has_indexer(layer),
                )

    def _is_mtp(self, layer: int) -> bool:
        """Whether this index is that of an MTP layer: they come after the decoder layers."""
        return layer >= self.num_layers

    def _reads_other_cache(self, layer: int) -> bool:
        """Whether the layer's attention has no latent of its own but reads another layer's."""
        return not self._is_mtp(layer) and self.cache_sources[layer] != layer

    def _has_indexer(self, layer: int) -> bool:
        if self._is_mtp(layer):
            return self.family.indexers is not None
        return self.indexers[layer] and self.attention_types[layer] == "mla"

    def _attention_sites(self, path: str, layer: int, d: MLADims, letters: Mapping[str, int]) -> Iterator[Site]:
        bias = bool(self.keys.get("attention_bias", False))
        if d.L is None:
            yield self._matrix(f"{path}.q_proj", Role.W_Q, layer, (d.H * (d.P + d.R), d.D))
        else:
            yield self._matrix(f"{path}.q_a_proj", Role.W_DQ, layer, (d.L, d.D), bias)
            name, (rows, columns) = self.family.query
            shape = (evaluate_size(rows, letters), evaluate_size(columns, letters))
            yield self._matrix(f"{path}.{name}", Role.W_UQ, layer, shape)
            self.vectors += d.L  # the norm of the query latent
        if not self._reads_other_cache(layer):
            yield self._matrix(f"{path}.kv_a_proj_with_mqa", Role.W_DKV, layer, (d.C + d.R, d.D), bias)
            self.vectors += d.C  # the norm of the latent
        yield self._matrix(f"{path}.kv_b_proj", Role.W_UKV, layer, (d.H * (d.P + d.V), d.C))
        yield self._matrix(f"{path}.o_proj", Role.W_O, layer, (d.D, d.H * d.V), bias)
        yield from self._part_sites("mla", path, layer, letters)
        if self._has_indexer(layer):
            yield from self._part_sites("indexer", f"{path}.indexer", layer, letters)

    def _mlp_sites(
        self, path: str, layer: int, width: int, roles: tuple[Role, Role, Role], bias: bool
    ) -> Iterator[Site]:
        """Yield gate, up and down of one MLP; `roles` are theirs in this order."""
        gate, up, down = roles
        yield self._matrix(f"{path}.gate_proj", gate, layer, (width, self.D), bias)
        yield self._matrix(f"{path}.up_proj", up, layer, (width, self.D), bias)
        yield self._matrix(f"{path}.down_proj", down, layer, (self.D, width), bias)

    def _moe_sites(self, base: str, layer: int) -> Iterator[Site]:
        """Yield the router, the fused routed experts and the shared experts of a layer."""
        moe, keys = self.family.moe, self.keys
        assert moe is not None
        path, E, width = f"{base}.{moe.path}", keys.int(moe.experts_key), keys.int(moe.width_key)
        outputs = E + (keys.int(moe.identity_experts_key) if moe.identity_experts_key else 0)
        router_bias = bool(moe.router_bias_key and keys.get(moe.router_bias_key))
        router = self._matrix(f"{path}.{moe.router}", Role.ROUTER, layer, (outputs, self.D), router_bias)
        yield replace(router, attachable=False, reason=moe.router_reason)
        gate_up = Site(f"{path}.experts.gate_up_proj", Role.EXPERTS_GATE_UP, layer, (2 * width, self.D), E)
        yield self._with_disk_path(gate_up)
        down = Site(f"{path}.experts.down_proj", Role.EXPERTS_DOWN, layer, (self.D, width), E)
        yield self._with_disk_path(down)
        if moe.shared_key and keys.get(moe.shared_key):
            roles = (Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN)
            one = keys.int(moe.shared_width_key) if moe.shared_width_key else width
            bias = bool(keys.get("mlp_bias", False))
            # All shared experts are one MLP, as wide as all of them together.
            yield from self._mlp_sites(f"{path}.shared_experts", layer, one * keys.int(moe.shared_key), roles, bias)

    def _part_sites(self, where: Where, base: str, layer: int | None, letters: Mapping[str, int]) -> Iterator[Site]:
        """Yield the sites of the family's parts at `where`, whose paths begin below `base`; count its vectors."""
        for part in self.family.parts.get(where, ()):
            yield from self._sites_of_part(part, f"{base}.{part.path}", layer, letters)

    def _sites_of_part(self, part: Part, path: str, layer: int | None, letters: Mapping[str, int]) -> Iterator[Site]:
        """Yield the site of a matrix, or count a vector and yield nothing."""
        if part.role is None or len(part.shape) == 1:
            self.vectors += parameter_count(part, letters)
            return
        rows, columns = (evaluate_size(e, letters) for e in part.shape)
        site = Site(path, part.role, layer, (rows, columns), bias=part.bias, is_parameter=part.is_parameter)
        yield self._with_disk_path(replace(site, attachable=False, reason=REASONS_NOT_ADAPTED[part.role]))

    def _tower_sites(self) -> Iterator[Site]:
        if self.wrapper:
            parts, letters = tower_parts(self.wrapper, self.config, self.D)
            for part, path in parts:
                bias = part.bias or ("projector.linear" in path and bool(self.config.get("multimodal_projector_bias")))
                yield from self._sites_of_part(replace(part, bias=bias), path, None, letters)

    def _mtp(self) -> tuple[int, list[Site]]:
        """Return (number of MTP layers, their sites); no sites if their layout is not known."""
        count = int(self.keys.get("num_nextn_predict_layers", 0) or 0)
        if not self.family.mtp or not count:
            return count, []
        vectors, sites = self.vectors, []
        has_experts = self.family.moe is not None and any(self.moe_layers)
        for layer in range(self.num_layers, self.num_layers + count):
            projection = f"{self.prefix}.layers.{layer}.eh_proj"
            sites.append(self._matrix(projection, Role.MTP_PROJECTION, layer, (self.D, 2 * self.D)))
            dims = dims_of(self.keys, self.D)
            sites += self._sites_of_layer(layer, kind="mla", has_experts=has_experts, dims=dims)
        self.vectors = vectors  # no total counts an MTP layer
        reason = REASONS_NOT_ADAPTED[Role.MTP_PROJECTION]
        return count, [replace(site, attachable=False, reason=reason, mtp=True) for site in sites]

    def _matrix(self, path: str, role: Role, layer: int, shape: tuple[int, int], bias: bool = False) -> Site:
        return self._with_disk_path(Site(path, role, layer, shape, bias=bias))

    def _with_disk_path(self, site: Site) -> Site:
        """Return the site at the place where published checkpoints of the family hold it."""
        path = self.key_mapping.candidates(site.path)[0]
        if not site.is_experts:
            return replace(site, disk_path=path if path != site.path else "")
        moe = self.family.moe
        if moe is not None and moe.fused_on_disk:
            return replace(site, disk="fused", disk_path=path if path != site.path else "")
        gate, up, down = self.key_mapping.experts
        leaves = (gate, up) if site.role == Role.EXPERTS_GATE_UP else (down,)
        return replace(site, disk="per_expert", disk_path=path.rpartition(".")[0], leaves=leaves)


def _key_mapping(family: Family, wrapper: Wrapper | None) -> KeyMapping:
    """Return the family's renames, each followed by those of the wrapper."""
    outer_variants = wrapper.key_variants if wrapper else ((),)
    variants = tuple((*inner, *outer) for outer in outer_variants for inner in family.key_mapping.variants)
    return replace(family.key_mapping, variants=variants)
