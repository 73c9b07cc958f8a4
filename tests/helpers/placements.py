"""The matrices that each shipped recipe adapts in the embedded model, listed by hand."""

from __future__ import annotations

# Written by hand for the embedded model: layer 0 is dense, layers 1 to 3 have 8 routed experts and a shared one.
W_O = [
    "model.layers.0.self_attn.o_proj.weight",
    "model.layers.1.self_attn.o_proj.weight",
    "model.layers.2.self_attn.o_proj.weight",
    "model.layers.3.self_attn.o_proj.weight",
]
MLP = [
    "model.layers.0.mlp.gate_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.1.mlp.shared_experts.gate_proj.weight",
    "model.layers.1.mlp.shared_experts.up_proj.weight",
    "model.layers.1.mlp.shared_experts.down_proj.weight",
    "model.layers.2.mlp.shared_experts.gate_proj.weight",
    "model.layers.2.mlp.shared_experts.up_proj.weight",
    "model.layers.2.mlp.shared_experts.down_proj.weight",
    "model.layers.3.mlp.shared_experts.gate_proj.weight",
    "model.layers.3.mlp.shared_experts.up_proj.weight",
    "model.layers.3.mlp.shared_experts.down_proj.weight",
]
EXPERTS = [
    "model.layers.1.mlp.experts.gate_up_proj",
    "model.layers.1.mlp.experts.down_proj",
    "model.layers.2.mlp.experts.gate_up_proj",
    "model.layers.2.mlp.experts.down_proj",
    "model.layers.3.mlp.experts.gate_up_proj",
    "model.layers.3.mlp.experts.down_proj",
]
QUERY = [
    "model.layers.0.self_attn.q_a_proj.weight",
    "model.layers.0.self_attn.q_b_proj.weight",
    "model.layers.1.self_attn.q_a_proj.weight",
    "model.layers.1.self_attn.q_b_proj.weight",
    "model.layers.2.self_attn.q_a_proj.weight",
    "model.layers.2.self_attn.q_b_proj.weight",
    "model.layers.3.self_attn.q_a_proj.weight",
    "model.layers.3.self_attn.q_b_proj.weight",
]
W_UKV = [
    "model.layers.0.self_attn.kv_b_proj.weight",
    "model.layers.1.self_attn.kv_b_proj.weight",
    "model.layers.2.self_attn.kv_b_proj.weight",
    "model.layers.3.self_attn.kv_b_proj.weight",
]
W_DKV = [
    "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
    "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
    "model.layers.2.self_attn.kv_a_proj_with_mqa.weight",
    "model.layers.3.self_attn.kv_a_proj_with_mqa.weight",
]
BY_HAND = {
    "safe": [*W_O, *MLP],
    "all-linear": [*QUERY, *W_DKV, *W_UKV, *W_O, *MLP, *EXPERTS],
    "W_UKV-priority": [*QUERY, *W_UKV, *W_O, *MLP],
    "attention-only": [*QUERY, *W_DKV, *W_UKV, *W_O],
    "bottleneck": W_DKV,
}
