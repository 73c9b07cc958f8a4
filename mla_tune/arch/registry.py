"""config.json → `Architecture`.  Reads numbers only: no weights, no torch, no network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mla_tune.arch.dims import MLADims
from mla_tune.arch.families import BY_TYPE, FAMILIES, Family
from mla_tune.arch.roles import Role
from mla_tune.arch.site import Architecture, Site
from mla_tune.errors import InputError, NotMLAError

Config = Mapping[str, Any]


def architecture(config: Config, where: str = "config.json") -> Architecture:
    """The sites, dimensions and totals of the model that `config` (a parsed config.json) describes.

    Totals count the main model as transformers instantiates it: MTP layers are not in it.
    Raises `NotMLAError` for a model without MLA and `InputError` for a family or key that is not known.
    """
    family = _family(config, where)
    c = _Keys(config, family, where)
    D, vocab, layers = c.int("hidden_size"), c.int("vocab_size"), c.int(family.layers_key)
    dims = _dims(c, D)
    sites: list[Site] = []
    attention_paths: list[str] = []
    moe_layers = [i for i in range(layers) if _has_moe(family, c, i)]
    for layer in range(layers):
        base = f"model.layers.{layer}"
        for name in family.attention:
            attention_paths.append(f"{base}.{name}")
            sites += _attention(f"{base}.{name}", layer, dims, bool(c.get("attention_bias", False)))
        is_moe = layer in set(moe_layers)
        if not is_moe or family.dense_beside_moe:
            width, bias = c.int(family.width_key), bool(c.get("mlp_bias", False))
            for name in family.dense_mlp:
                roles = (Role.GATE, Role.UP, Role.DOWN)
                sites += _mlp(f"{base}.{name}", layer, D, width, roles, bias)
        if is_moe:
            sites += _moe(base, layer, D, family, c)
    tied = bool(c.get("tie_word_embeddings", False))
    reason = "tied to the embedding: an adapter would change both" if tied else "large; not adapted by mla-tune"
    sites.append(Site("lm_head", Role.LM_HEAD, None, (vocab, D), attachable=False, reason=reason))

    norms_attention = (dims.L or 0) + dims.C
    norms = layers * family.norms * D + len(attention_paths) * norms_attention + D
    matrices = sum(s.params for s in sites if s.role != Role.LM_HEAD)
    total = matrices + norms + vocab * D * (1 if tied else 2)
    idle, top_k = 0, 0
    if family.moe and moe_layers:
        routed = sum(s.params for s in sites if s.is_experts)
        top_k = c.int(family.moe.top_k_key)
        idle = round(routed * (1 - top_k / c.int(family.moe.experts_key)))
    quantization = config.get("quantization_config")
    return Architecture(
        model_type=_model_type(config) or family.model_type,
        family=family,
        num_layers=layers,
        dims=dims,
        attention_paths=tuple(attention_paths),
        sites=tuple(sites),
        params_total=total,
        vocab_size=vocab,
        max_position_embeddings=int(c.get("max_position_embeddings", 0) or 0),
        tied=tied,
        mtp_layers=int(c.get("num_nextn_predict_layers", 0) or 0),
        quantization=str(quantization.get("quant_method", "unknown")) if quantization else None,
        active_params=total - idle,
        experts_per_token=top_k,
    )


def _family(config: Config, where: str) -> Family:
    model_type = _model_type(config)
    if not model_type:
        raise InputError(f"{where}: no 'model_type': not a Hugging Face model configuration")
    text = config.get("text_config")
    if isinstance(text, Mapping) and text.get("kv_lora_rank"):
        raise InputError(
            f"{where}: model_type '{model_type}' is a wrapper around an MLA text model ('{text.get('model_type')}'), "
            f"and its layout is not known yet; known: {', '.join(sorted(BY_TYPE))}"
        )
    if not config.get("kv_lora_rank"):
        raise NotMLAError(f"{where}: {_what_it_is(config)}. mla-tune is for models with Multi-head Latent Attention")
    if model_type not in BY_TYPE:
        known = ", ".join(sorted(BY_TYPE))
        raise InputError(f"{where}: model_type '{model_type}' has MLA, but its layout is not known yet; known: {known}")
    return BY_TYPE[model_type]


def _model_type(config: Config) -> str | None:
    """The config's `model_type`; where it has none (LongCat-Flash's published file), that of its architecture."""
    if config.get("model_type"):
        return str(config["model_type"])
    names = config.get("architectures") or []
    return next((f.model_type for f in FAMILIES if f.architecture in names), None)


def _what_it_is(config: Config) -> str:
    """A sentence on a model that has no MLA, from the keys that tell attention kinds apart."""
    name = f"model_type '{_model_type(config)}' has no 'kv_lora_rank'"
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if not heads:
        return f"{name} and no attention heads that could be read"
    if groups in (None, heads):
        return f"{name}: multi-head attention with {heads} heads"
    kind = "multi-query" if groups == 1 else "grouped-query"
    return f"{name}: {kind} attention with {heads} query and {groups} key/value heads"


class _Keys:
    """Reads config keys with the family's defaults; a missing or non-numeric key is an error that names it."""

    def __init__(self, config: Config, family: Family, where: str) -> None:
        self.config, self.family, self.where = config, family, where

    def get(self, key: str, default: Any = None) -> Any:
        value = self.config.get(key)
        return self.family.defaults.get(key, default) if value is None else value

    def int(self, key: str) -> int:
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            got = "missing" if value is None else f"{value!r}"
            raise InputError(f"{self.where}: '{key}' is {got}; {self.family.title} needs a whole number there")
        return value


def _dims(c: _Keys, D: int) -> MLADims:
    H = c.int("num_attention_heads")
    L = c.get("q_lora_rank")
    V = c.get("v_head_dim") or D // H
    dims = MLADims(H, c.int("qk_nope_head_dim"), c.int("qk_rope_head_dim"), V, c.int("kv_lora_rank"), L, D)
    if L is not None:
        c.int("q_lora_rank")
    return dims


def _has_moe(family: Family, c: _Keys, layer: int) -> bool:
    if family.moe is None or not c.get(family.moe.experts_key):
        return False
    match family.moe.layers:
        case "all":
            return True
        case "first_k_dense":
            return layer >= c.int("first_k_dense_replace")
        case "mlp_layer_types":
            kinds = c.get("mlp_layer_types")
            return layer > 0 if kinds is None else kinds[layer] == "sparse"
        case rule:  # a fault in the family table
            raise AssertionError(f"{family.model_type}: unknown rule {rule!r}")


def _attention(path: str, layer: int, d: MLADims, bias: bool) -> list[Site]:
    if d.L is None:
        query = [Site(f"{path}.q_proj", Role.W_Q, layer, (d.H * (d.P + d.R), d.D))]
    else:
        query = [
            Site(f"{path}.q_a_proj", Role.W_DQ, layer, (d.L, d.D), bias=bias),
            Site(f"{path}.q_b_proj", Role.W_UQ, layer, (d.H * (d.P + d.R), d.L)),
        ]
    return [
        *query,
        Site(f"{path}.kv_a_proj_with_mqa", Role.W_DKV, layer, (d.C + d.R, d.D), bias=bias),
        Site(f"{path}.kv_b_proj", Role.W_UKV, layer, (d.H * (d.P + d.V), d.C)),
        Site(f"{path}.o_proj", Role.W_O, layer, (d.D, d.H * d.V), bias=bias),
    ]


def _mlp(path: str, layer: int, D: int, width: int, roles: tuple[Role, Role, Role], bias: bool = False) -> list[Site]:
    gate, up, down = roles
    return [
        Site(f"{path}.gate_proj", gate, layer, (width, D), bias=bias),
        Site(f"{path}.up_proj", up, layer, (width, D), bias=bias),
        Site(f"{path}.down_proj", down, layer, (D, width), bias=bias),
    ]


def _moe(base: str, layer: int, D: int, family: Family, c: _Keys) -> list[Site]:
    moe = family.moe
    assert moe is not None
    path, E, width = f"{base}.{moe.path}", c.int(moe.experts_key), c.int(moe.width_key)
    outputs = E + (c.int(moe.identity_experts_key) if moe.identity_experts_key else 0)
    router = Site(
        f"{path}.{moe.router}",
        Role.ROUTER,
        layer,
        (outputs, D),
        bias=bool(moe.router_bias_key and c.get(moe.router_bias_key)),
        attachable=False,
        reason=moe.router_reason,
    )
    experts = [
        Site(f"{path}.experts.gate_up_proj", Role.EXPERTS_GATE_UP, layer, (2 * width, D), E, disk="per_expert"),
        Site(f"{path}.experts.down_proj", Role.EXPERTS_DOWN, layer, (D, width), E, disk="per_expert"),
    ]
    shared: list[Site] = []
    if moe.shared_key and c.get(moe.shared_key):
        roles = (Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN)
        bias = bool(c.get("mlp_bias", False))
        shared = _mlp(f"{path}.shared_experts", layer, D, width * c.int(moe.shared_key), roles, bias)
    return [router, *experts, *shared]
