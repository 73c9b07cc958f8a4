"""Tiny config.json dictionaries, one for each family and variant.  No two sizes of one model are equal, so that a
transposed or mixed-up dimension can't go unseen."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

MLA: Config = {
    "vocab_size": 130,
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 20,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "intermediate_size": 44,
    "max_position_embeddings": 64,
}
MOE: Config = {
    "moe_intermediate_size": 22,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LONGCAT: Config = {
    **{k: v for k, v in MLA.items() if k not in ("num_hidden_layers", "intermediate_size")},
    "model_type": "longcat_flash",
    "num_layers": 2,
    "ffn_hidden_size": 44,
    "expert_ffn_hidden_size": 22,
    "n_routed_experts": 6,
    "zero_expert_num": 5,
    "moe_topk": 2,
}

TINY: dict[str, Config] = {
    "deepseek_v2": {**MLA, **MOE, "model_type": "deepseek_v2"},
    "deepseek_v2 without query compression": {**MLA, **MOE, "model_type": "deepseek_v2", "q_lora_rank": None},
    "deepseek_v2 with biases": {
        **MLA, **MOE, "model_type": "deepseek_v2", "attention_bias": True, "mlp_bias": True,
    },
    "deepseek_v3": {**MLA, **MOE, "model_type": "deepseek_v3", "num_nextn_predict_layers": 0},
    "deepseek_v3 all dense": {
        **MLA, **MOE, "model_type": "deepseek_v3", "first_k_dense_replace": 3, "num_nextn_predict_layers": 0,
    },
    "deepseek_v3 with biases, all MoE, q_proj": {
        **MLA, **MOE, "model_type": "deepseek_v3", "first_k_dense_replace": 0, "q_lora_rank": None,
        "attention_bias": True, "num_nextn_predict_layers": 0,
    },
    "glm4_moe_lite": {**MLA, **MOE, "model_type": "glm4_moe_lite"},
    "glm4_moe_lite by layer types": {
        **MLA, **MOE, "model_type": "glm4_moe_lite", "mlp_layer_types": ["sparse", "dense", "sparse"],
    },
    "minicpm3": {**MLA, "model_type": "minicpm3"},
    "minicpm3 untied, with biases": {
        **MLA, "model_type": "minicpm3", "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True,
    },
    "longcat_flash": LONGCAT,
    "longcat_flash with biases": {**LONGCAT, "attention_bias": True, "router_bias": True},
}  # fmt: skip
