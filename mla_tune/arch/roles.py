"""Roles: what each weight matrix of an MLA model is for, and what an adapter on it does.

Dimension letters used everywhere in mla-tune:

    B batch   T query tokens   S cached tokens   D hidden size   H heads
    P qk_nope_head_dim   R qk_rope_head_dim   V v_head_dim
    C kv_lora_rank (the latent)   L q_lora_rank   I MLP width   E routed experts   r LoRA rank

Symbols follow DeepSeek-V2 (arXiv:2405.04434, section 2.1): D for down (compression), U for up.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What a weight matrix is for.  The values are the names that recipes, tables and JSON use."""

    W_DQ = "W_DQ"
    W_UQ = "W_UQ"
    W_Q = "W_Q"
    W_DKV = "W_DKV"
    W_UKV = "W_UKV"
    W_O = "W_O"
    GATE = "gate"
    UP = "up"
    DOWN = "down"
    SHARED_GATE = "shared_gate"
    SHARED_UP = "shared_up"
    SHARED_DOWN = "shared_down"
    EXPERTS_GATE_UP = "experts_gate_up"
    EXPERTS_DOWN = "experts_down"
    ROUTER = "router"
    LM_HEAD = "lm_head"
    ATTENTION_GATE = "attention_gate"
    INDEXER = "indexer"
    LINEAR_ATTENTION = "linear_attention"
    HYPER_CONNECTION = "hyper_connection"
    NORM_GATE = "norm_gate"
    MTP_PROJECTION = "mtp_projection"
    TOWER = "tower"


@dataclass(frozen=True, slots=True)
class RoleFacts:
    """What is known about the matrices of one role and about an adapter on them; `mla-tune inspect` shows it."""

    meaning: str
    """What the matrix does."""
    shape: str
    """Its shape (out, in) in dimension letters."""
    nemo: str
    """The module's name in NVIDIA NeMo and Megatron-Core, which may fuse two roles; empty where it is not known."""
    risk: str
    """How easily an adapter here damages the model: low, medium or high."""
    note: str
    """Why the risk is what it is."""
    cache: str
    """What an adapter here does to the KV cache."""
    absorption: str
    """What absorbed decoding (`split` and `fold`) asks of an adapter here."""


_KEEPS_CACHE = "cache unchanged"
_NOT_INVOLVED = "not involved"
_MLP_NOTE = "does not touch attention; new knowledge is usually learned here"

FACTS: dict[Role, RoleFacts] = {
    Role.W_DQ: RoleFacts(
        "query compression", "(L, D)", "linear_q_down_proj", "medium",
        "every head's query passes through it", _KEEPS_CACHE, _NOT_INVOLVED,
    ),
    Role.W_UQ: RoleFacts(
        "query up-projection, per head [nope P | rope R]", "(H(P+R), L)", "linear_q_up_proj", "low",
        "changes attention scores only", _KEEPS_CACHE, "fold: merge the adapter first; split: not involved",
    ),
    Role.W_Q: RoleFacts(
        "query projection without compression, per head [nope P | rope R]", "(H(P+R), D)", "linear_q_proj", "low",
        "changes attention scores only", _KEEPS_CACHE, "fold: merge the adapter first; split: not involved",
    ),
    Role.W_DKV: RoleFacts(
        "KV compression, [latent C | shared rope key R]", "(C+R, D)", "linear_kv_down_proj", "high",
        "the bottleneck: keys and values of all heads are computed from its C numbers",
        "changes the latent: a cached prefix can't be shared with another adapter", _NOT_INVOLVED,
    ),
    Role.W_UKV: RoleFacts(
        "KV up-projection, per head [key P | value V]", "(H(P+V), C)", "linear_kv_up_proj", "medium",
        "sets keys and values of every head, so the attention scores too", _KEEPS_CACHE,
        "this matrix is absorbed: merge the adapter first, or keep it as low-rank factors beside the split",
    ),
    Role.W_O: RoleFacts(
        "attention output", "(D, HV)", "linear_proj", "low",
        "comes after the attention scores and can't disturb them", _KEEPS_CACHE,
        "fold: merge the adapter first; split: not involved",
    ),
    Role.GATE: RoleFacts("gate of a dense layer's MLP", "(I, D)", "linear_fc1", "low", _MLP_NOTE,
                         _KEEPS_CACHE, _NOT_INVOLVED),
    Role.UP: RoleFacts("up-projection of a dense layer's MLP", "(I, D)", "linear_fc1", "low", _MLP_NOTE,
                       _KEEPS_CACHE, _NOT_INVOLVED),
    Role.DOWN: RoleFacts("down-projection of a dense layer's MLP", "(D, I)", "linear_fc2", "low", _MLP_NOTE,
                         _KEEPS_CACHE, _NOT_INVOLVED),
    Role.SHARED_GATE: RoleFacts("gate of the shared experts", "(I, D)", "shared_experts.linear_fc1", "low", _MLP_NOTE,
                                _KEEPS_CACHE, _NOT_INVOLVED),
    Role.SHARED_UP: RoleFacts("up-projection of the shared experts", "(I, D)", "shared_experts.linear_fc1", "low",
                              _MLP_NOTE, _KEEPS_CACHE, _NOT_INVOLVED),
    Role.SHARED_DOWN: RoleFacts("down-projection of the shared experts", "(D, I)", "shared_experts.linear_fc2", "low",
                                _MLP_NOTE, _KEEPS_CACHE, _NOT_INVOLVED),
    Role.EXPERTS_GATE_UP: RoleFacts(
        "gate and up-projection of the routed experts, fused", "E × (2I, D)", "experts.linear_fc1", "medium",
        "an expert learns only from the tokens routed to it", _KEEPS_CACHE, _NOT_INVOLVED,
    ),
    Role.EXPERTS_DOWN: RoleFacts(
        "down-projection of the routed experts", "E × (D, I)", "experts.linear_fc2", "medium",
        "an expert learns only from the tokens routed to it", _KEEPS_CACHE, _NOT_INVOLVED,
    ),
    Role.ROUTER: RoleFacts(
        "router: which experts a token goes to", "(E, D)", "router", "high",
        "a small change re-routes tokens and unbalances the experts", _KEEPS_CACHE, _NOT_INVOLVED,
    ),
    Role.LM_HEAD: RoleFacts(
        "output head", "(vocabulary, D)", "output_layer", "medium",
        "large, and often tied to the embedding", _KEEPS_CACHE, _NOT_INVOLVED,
    ),
    Role.ATTENTION_GATE: RoleFacts(
        "gate on the output of the attention's heads", "(H, D) or (HV, D)", "", "medium",
        "can switch whole heads off", _KEEPS_CACHE, _NOT_INVOLVED,
    ),
    Role.INDEXER: RoleFacts(
        "indexer of sparse attention: which cached tokens a token attends to", "several", "", "high",
        "chooses tokens, and no gradient passes through a choice", "has a cache of its own", _NOT_INVOLVED,
    ),
    Role.LINEAR_ATTENTION: RoleFacts(
        "linear attention (KDA) of a hybrid model's other layers", "several", "", "medium",
        "no MLA: a state of constant size instead of a cache", _KEEPS_CACHE, _NOT_INVOLVED,
    ),
    Role.HYPER_CONNECTION: RoleFacts(
        "hyper-connection: mixes several residual streams", "several", "", "high",
        "every layer's input and output pass through it", _KEEPS_CACHE, _NOT_INVOLVED,
    ),
    Role.NORM_GATE: RoleFacts(
        "low-rank gate of a norm", "several", "", "high", "scales a whole layer's input", _KEEPS_CACHE,
        _NOT_INVOLVED,
    ),
    Role.MTP_PROJECTION: RoleFacts(
        "input of an MTP layer: [embedding D | hidden D]", "(D, 2D)", "", "high",
        "an MTP layer's whole input passes through it", _KEEPS_CACHE, _NOT_INVOLVED,
    ),
    Role.TOWER: RoleFacts(
        "vision or audio tower and its projector", "several", "", "medium",
        "processes images and audio only, no text", _KEEPS_CACHE, _NOT_INVOLVED,
    ),
}  # fmt: skip

#: Why mla-tune puts no adapter on the matrices of these roles.
REASONS_NOT_ADAPTED: dict[Role, str] = {
    Role.ATTENTION_GATE: "attention gate: small, and it can switch whole heads off; not adapted by mla-tune",
    Role.INDEXER: "indexer: runs without gradients, so an adapter there would never learn",
    Role.LINEAR_ATTENTION: "linear attention (KDA): no MLA; not adapted by mla-tune",
    Role.HYPER_CONNECTION: "hyper-connection: a parameter, not a layer that an adapter could wrap",
    Role.NORM_GATE: "norm gate: scales a whole layer's input; not adapted by mla-tune",
    Role.MTP_PROJECTION: "MTP layer: in the checkpoint, but transformers does not load it",
    Role.TOWER: "tower: processes no text; not adapted by mla-tune",
}

#: Groups of roles that a recipe may name besides single roles.  Roles that the model lacks are skipped.
GROUPS: dict[str, tuple[Role, ...]] = {
    "query": (Role.W_DQ, Role.W_UQ, Role.W_Q),
    "attention": (Role.W_DQ, Role.W_UQ, Role.W_Q, Role.W_DKV, Role.W_UKV, Role.W_O),
    "dense": (Role.GATE, Role.UP, Role.DOWN),
    "shared": (Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN),
    "mlp": (Role.GATE, Role.UP, Role.DOWN, Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN),
    "experts": (Role.EXPERTS_GATE_UP, Role.EXPERTS_DOWN),
}

#: Presets of `adapter.targets`: each is a list of roles and groups.
PRESETS: dict[str, tuple[str, ...]] = {
    "safe": ("W_O", "mlp"),
    "all-linear": ("attention", "mlp", "experts"),
    "W_UKV-priority": ("query", "W_UKV", "W_O", "mlp"),
    "attention-only": ("attention",),
    "bottleneck": ("W_DKV",),
}

#: The roles that mla-tune can adapt, in the order of tables.
ADAPTABLE: tuple[Role, ...] = (*GROUPS["attention"], *GROUPS["mlp"], *GROUPS["experts"])
