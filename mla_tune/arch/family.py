"""`Family` and `MoELayout`: the types of an entry of the family table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mla_tune.arch.key_mapping import KeyMapping
from mla_tune.arch.parts import Part
from mla_tune.arch.roles import Role

#: Which modules a family's extra parts belong to: each MLA module, each linear-attention module, each indexer, each
#: decoder layer, each layer with experts, each layer without, or the decoder.
Where = Literal["mla", "linear", "indexer", "layer", "moe", "dense", "decoder"]


@dataclass(frozen=True, slots=True)
class MoELayout:
    """The mixture-of-experts block of a decoder layer.  Fields that end in `_key` name keys of config.json."""

    layers: str
    """Name of the rule that says which layers have the block (`layer_types.MOE_LAYERS`)."""
    path: str = "mlp"
    """Path of the block inside a decoder layer."""
    router: str = "gate"
    """Path of the router inside the block."""
    router_reason: str = "router: an adapter would re-route tokens and unbalance the experts"
    """Why mla-tune does not adapt the router, as `inspect` prints it."""
    router_read_directly: bool = False
    """Whether transformers reads the router's weight instead of calling it, so that a LoRA there does nothing until it
    is merged."""
    router_bias_key: str | None = None
    """Whether the router has a bias; None: it has none."""
    experts_key: str = "n_routed_experts"
    """The number of routed experts."""
    identity_experts_key: str | None = None
    """The number of experts without weights, which return their input; None: there are none."""
    top_k_key: str = "num_experts_per_tok"
    """The number of experts that a token goes to."""
    width_key: str = "moe_intermediate_size"
    """The width of a routed expert."""
    shared_key: str | None = "n_shared_experts"
    """The number of shared experts; None: there are none."""
    shared_width_key: str | None = None
    """The width of one shared expert; None: that of a routed expert."""
    fused_on_disk: bool = False
    """Whether published checkpoints hold all experts of a layer in one tensor."""


@dataclass(frozen=True, slots=True)
class Family:
    """One model type: where its matrices are, which keys of config.json give their sizes, how checkpoints name them."""

    model_type: str
    """`model_type` in config.json."""
    title: str
    """The name that people use."""
    attention: tuple[str, ...] = ("self_attn",)
    """Paths of the attention modules inside a decoder layer."""
    dense_mlp: tuple[str, ...] = ("mlp",)
    """Paths of the dense MLPs inside a decoder layer."""
    dense_beside_moe: bool = False
    """Whether layers with experts have their dense MLPs too, not in their place."""
    moe: MoELayout | None = None
    """The mixture-of-experts block; None if no layer has one."""
    norms: int = 2
    """Norms of size D in a decoder layer."""
    layers_key: str = "num_hidden_layers"
    """The key of config.json with the number of decoder layers."""
    width_key: str = "intermediate_size"
    """The key of config.json with the width of a dense MLP."""
    peft_remaps_experts: bool = False
    """Whether PEFT rewrites every target that ends in gate_proj, up_proj, down_proj or gate to the fused routed
    experts.  Dense and shared MLPs then have to be adapted as parameters (`adapter.peft_config`)."""
    aliases: tuple[str, ...] = ()
    """Other values of `model_type` with the same layout."""
    architecture: str | None = None
    """The entry of `architectures` by which a published config.json without a model_type is recognized."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """transformers' values for keys that a config.json may leave out."""
    query: tuple[str, tuple[str, str]] = ("q_b_proj", ("H*P+H*R", "L"))
    """The module of W_UQ and its shape in letters."""
    compresses_query: bool = True
    """False if the family has no query compression, whatever `q_lora_rank` says."""
    attention_types: str = "mla"
    """Name of the rule that gives each layer's kind of attention (`layer_types.ATTENTION_TYPES`)."""
    indexers: str | None = None
    """Name of the rule that says which layers have an indexer (`layer_types.INDEXERS`); None: no layer has one."""
    layer_dims: str | None = None
    """Name of the rule for layers whose dimensions differ (`layer_types.LAYER_DIMS`); None: all are alike."""
    kv_source_key: str | None = None
    """The key of config.json with, for each layer, the layer whose KV cache it reads; None: each has its own."""
    parts: Mapping[Where, tuple[Part, ...]] = field(default_factory=dict)
    """All weights that are not common to the families, by the modules that they belong to."""
    key_mapping: KeyMapping = field(default_factory=KeyMapping)
    """How checkpoints name the weights."""
    mtp: bool = False
    """Whether published checkpoints hold MTP layers, as `model.layers.<num_hidden_layers + i>`."""
    keeps_dtype: tuple[str, ...] = ("e_score_correction_bias",)
    """Endings of tensors on disk that keep their dtype when a merge changes that of the others.  transformers keeps
    them in float32 (`_keep_in_fp32_modules_strict`), because small differences in them matter."""
    eager_only: bool = False
    """Whether transformers has only the eager attention for it."""
    not_reloaded: tuple[Role, ...] = ()
    """Roles whose adapters PEFT saves but does not load again."""
    fold: str | None = None
    """Why `--absorb fold` is exact: what stands between the folded matrices in transformers' code.  None if nobody has
    read the code for that; folding is then refused."""
    scaled_latents: bool = False
    """Whether the query and the normed latent are multiplied by √(D/L) and √(D/C), factors that no tensor holds."""

    @property
    def carries_state(self) -> bool:
        """Whether some layers have linear attention, whose state crosses the borders of packed samples."""
        return "linear" in self.parts

    @property
    def needs_mask(self) -> bool:
        """Whether its attention needs a mask, because the borders of samples are not enough: indexers choose keys by
        the mask, and linear attention carries a state."""
        return self.indexers is not None or self.carries_state
