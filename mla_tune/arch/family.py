"""An entry of the family table: `Family`, with its mixture-of-experts block, `MoELayout`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mla_tune.arch.key_mapping import KeyMapping
from mla_tune.arch.parts import Part
from mla_tune.arch.roles import Role

#: Where a family's parts are: in the module of MLA, of linear attention or of an indexer, in a layer, in a layer with
#: or without experts, in the decoder.
Where = Literal["mla", "linear", "indexer", "layer", "moe", "dense", "decoder"]


@dataclass(frozen=True, slots=True)
class MoELayout:
    """Mixture-of-experts block of a decoder layer.

    `layers` names the rule for which layers have one (`layer_types.MOE_LAYERS`).  `shared_width_key`: the width of one
    shared expert where it is not that of a routed one.  `fused_on_disk`: published files hold all experts of a layer in
    one tensor.
    """

    layers: str
    path: str = "mlp"
    router: str = "gate"
    router_reason: str = "router: an adapter would re-route tokens and unbalance the experts"
    #: transformers reads the router's weight instead of calling it: an adapter there acts only once it is merged.
    router_read_directly: bool = False
    router_bias_key: str | None = None
    experts_key: str = "n_routed_experts"
    identity_experts_key: str | None = None
    top_k_key: str = "num_experts_per_tok"
    width_key: str = "moe_intermediate_size"
    shared_key: str | None = "n_shared_experts"
    shared_width_key: str | None = None
    fused_on_disk: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """One model type.

    `attention` and `dense_mlp` are paths inside a decoder layer.  `dense_beside_moe`: every layer has its dense MLPs,
    and the MoE block beside them.  `norms` counts the D-wide norms of a layer.  `parts` are all other weights.
    `peft_remaps_experts`: PEFT rewrites any target that ends in gate_proj, up_proj, down_proj or gate to the fused
    routed experts, so that dense and shared MLPs have to be named as parameters.  `architecture` is the entry of
    `architectures` that tells a published file without a model_type.  `defaults` are transformers' values for keys that
    a config.json may leave out.

    `query` names W_UQ where it is not q_b_proj, and its shape; `compresses_query` is False where the family has no
    query compression whatever config.json says.  `attention_types` names the rule for what attention each layer has
    (`schedules.KINDS`), `indexers` that for which layers have an indexer, `layer_dims` that for layers with dimensions
    of their own.  `kv_source_key` is a list with, for each layer, the layer whose cache it reads.

    `mtp`: published checkpoints hold MTP layers as further decoder layers, `model.layers.<num_hidden_layers + i>`.
    `keeps_dtype` are endings of tensors on disk that stay as they are when others change their dtype: transformers
    keeps them in float32 (`_keep_in_fp32_modules_strict`), because small steps of theirs matter.
    `eager_only`: transformers has no other attention for it.  `not_reloaded` are roles whose adapters PEFT saves and
    does not load again.
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
    query: tuple[str, tuple[str, str]] = ("q_b_proj", ("H*P+H*R", "L"))
    compresses_query: bool = True
    attention_types: str = "mla"
    indexers: str | None = None
    layer_dims: str | None = None
    kv_source_key: str | None = None
    parts: Mapping[Where, tuple[Part, ...]] = field(default_factory=dict)
    key_mapping: KeyMapping = field(default_factory=KeyMapping)
    mtp: bool = False
    keeps_dtype: tuple[str, ...] = ("e_score_correction_bias",)
    eager_only: bool = False
    not_reloaded: tuple[Role, ...] = ()
    #: Why `--absorb fold` is exact here: what stands between its factors in transformers' code; None where nobody has
    #: read it for that, and then folding is refused.
    fold: str | None = None
    #: The query and the normed latent are multiplied by √(D/L) and √(D/C), numbers that are in no tensor.
    scaled_latents: bool = False

    @property
    def carries_state(self) -> bool:
        """Linear attention carries what it has seen from token to token, over the borders of packed samples too."""
        return "linear" in self.parts

    @property
    def needs_mask(self) -> bool:
        """Its attention can't do with the borders of samples alone: indexers choose keys by a mask."""
        return self.indexers is not None or self.carries_state
