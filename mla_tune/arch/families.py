"""The family table: one entry for each model type whose layout mla-tune knows.  Data only.

An entry says where transformers puts the matrices of a decoder layer and which config.json keys give their sizes.
`registry.architecture()` turns an entry and a config.json into sites.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class MoELayout:
    """Mixture-of-experts block of a decoder layer.

    `layers` names the rule for which layers have one: `first_k_dense` (config key `first_k_dense_replace`),
    `mlp_layer_types` (a list, by default all but the first), or `all`.
    """

    layers: str
    path: str = "mlp"
    router: str = "gate"
    router_reason: str = "router: an adapter would re-route tokens and unbalance the experts"
    router_bias_key: str | None = None
    experts_key: str = "n_routed_experts"
    identity_experts_key: str | None = None
    top_k_key: str = "num_experts_per_tok"
    width_key: str = "moe_intermediate_size"
    shared_key: str | None = "n_shared_experts"


@dataclass(frozen=True, slots=True)
class Family:
    """One model type.

    `attention` and `dense_mlp` are paths inside a decoder layer.  `dense_beside_moe`: every layer has its dense MLPs,
    and the MoE block beside them.  `norms` counts the D-wide norms of a layer.  `peft_remaps_experts`: PEFT rewrites
    any target that ends in gate_proj, up_proj, down_proj or gate to the fused routed experts, so that dense and shared
    MLPs have to be named as parameters.  `architecture` is the entry of `architectures` that tells a published file
    without a model_type.  `defaults` are transformers' values for keys that a config.json may leave out.
    """

    model_type: str
    title: str
    attention: tuple[str, ...] = ("self_attn",)
    dense_mlp: tuple[str, ...] = ("mlp",)
    dense_beside_moe: bool = False
    moe: MoELayout | None = None
    norms: int = 2
    layers_key: str = "num_hidden_layers"
    width_key: str = "intermediate_size"
    peft_remaps_experts: bool = False
    aliases: tuple[str, ...] = ()
    architecture: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


FAMILIES: tuple[Family, ...] = (
    Family(
        "deepseek_v2",
        "DeepSeek-V2",
        moe=MoELayout("first_k_dense"),
        peft_remaps_experts=True,
        defaults={"first_k_dense_replace": 0, "n_shared_experts": 2, "num_experts_per_tok": 6},
    ),
    Family(
        "deepseek_v3",
        "DeepSeek-V3",
        moe=MoELayout("first_k_dense"),
        peft_remaps_experts=True,
        aliases=("kimi_k2",),
        defaults={"first_k_dense_replace": 3, "n_shared_experts": 1, "num_experts_per_tok": 8},
    ),
    Family(
        "glm4_moe_lite",
        "GLM-4.7-Flash",
        moe=MoELayout("mlp_layer_types"),
        peft_remaps_experts=True,
        defaults={"n_shared_experts": 1, "num_experts_per_tok": 4},
    ),
    Family(
        "minicpm3",
        "MiniCPM3",
        defaults={"tie_word_embeddings": True},
    ),
    Family(
        "longcat_flash",
        "LongCat-Flash",
        attention=("self_attn.0", "self_attn.1"),
        dense_mlp=("mlps.0", "mlps.1"),
        dense_beside_moe=True,
        moe=MoELayout(
            "all",
            router="router.classifier",
            router_reason="router: its weight is read directly, so a LoRA there does nothing until it is merged",
            router_bias_key="router_bias",
            identity_experts_key="zero_expert_num",
            top_k_key="moe_topk",
            width_key="expert_ffn_hidden_size",
            shared_key=None,
        ),
        norms=4,
        layers_key="num_layers",
        width_key="ffn_hidden_size",
        peft_remaps_experts=True,
        architecture="LongcatFlashForCausalLM",
        defaults={"zero_expert_num": 256, "router_bias": False, "moe_topk": 12},
    ),
)

BY_TYPE: dict[str, Family] = {name: f for f in FAMILIES for name in (f.model_type, *f.aliases)}
