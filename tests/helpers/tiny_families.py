"""A tiny random model of every family with MLA that transformers has, for tests that run whole models.

Every size of a model differs from its others as far as the family allows, so that a transposed or mixed-up dimension
can't hide, and every parameter matters: what a fresh model leaves at 0 or 1 (biases, norms, sinks, router corrections,
hyper-connections) is moved away from it, and the weights are large enough that attention is far from uniform.
Sparse layers (indexers, sliding windows) keep 5 or 6 keys, so that 12 tokens are enough to lose some.

`model(input_ids=...)` is all a caller needs: the vision-language models take text alone, and their image tokens lie
above the vocabulary, so that no random token is one.  There is no padding, start or end token either: `generate`
guesses a mask from padding tokens in the prompt and stops at end tokens, and random tokens would contain both.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

Config = dict[str, Any]

VOCABULARY = 101
STD = 0.2
TOPK = 5
WINDOW = 6

# D 48, H 3, P 20, R 6, V 12, C 28, L 44: also P+R 26, P+V 32, C+R 34, HV 36, H(P+R) 78 and H(P+V) 96 are all different.
MLA: Config = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 28,
    "q_lora_rank": 44,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 6,
    "v_head_dim": 12,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "initializer_range": STD,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# The widths of the experts are multiples of 8, which torch's grouped matmul needs.
EXPERTS: Config = {"moe_intermediate_size": 40, "n_routed_experts": 4, "n_shared_experts": 2, "num_experts_per_tok": 2}
GROUPS: Config = {"n_group": 2, "topk_group": 1}
ONE_GROUP: Config = {"n_group": 1, "topk_group": 1}
DENSE_FIRST: Config = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
# With few heads a key's score is often exactly 0 (a sum of ReLUs), and which of such ties is kept depends on how many
# keys there are: a cached step then disagrees with a full forward in transformers itself.  9 heads leave no ties.
INDEXER: Config = {"index_topk": TOPK, "index_head_dim": 10, "index_n_heads": 9}
LINEAR: Config = {"linear_head_dim": 14, "linear_num_heads": 4, "linear_conv_kernel_dim": 3}
# A rotary embedding that is scaled: the softmax scale is then not 1/√(P+R) in the families that follow DeepSeek-V3.
YARN: Config = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
# Two KDA layers and two MLA layers, of which one has a dense MLP.
HYBRID: Config = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
}
PIXTRAL: Config = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "image_size": 8,
    "patch_size": 4,
}


def without(config: Config, *keys: str) -> Config:
    return {k: v for k, v in config.items() if k not in keys}


MISTRAL4: Config = {
    **MLA, **EXPERTS, **ONE_GROUP, "model_type": "mistral4", "first_k_dense_replace": 1,
    # The query is scaled by its position from the 4th token on.
    "rope_parameters": YARN | {"original_max_position_embeddings": 4, "llama_4_scaling_beta": 0.5},
}  # fmt: skip
DEEPSEEK_V3: Config = {**MLA, **EXPERTS, **GROUPS, "model_type": "deepseek_v3", "first_k_dense_replace": 1}

# Sliding layers have sizes of their own; a full layer's rotary fraction is R / head_dim.
DOTS3: Config = {
    **MLA, **EXPERTS, **GROUPS, **INDEXER, "model_type": "dots3_note_text", "num_hidden_layers": 4,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "layer_types": ["indexed_attention", "sliding_attention", "sliding_attention", "indexed_attention"],
    "sliding_window": WINDOW, "head_dim": 26, "shared_experts_intermediate_size": 24,
    "swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_q_lora_rank": 38, "swa_kv_lora_rank": 30,
    "swa_head_dim": 22, "swa_qk_nope_head_dim": 18, "swa_v_head_dim": 10,
}  # fmt: skip
# name → config.json, as AutoConfig reads it
FAMILIES: dict[str, Config] = {
    "axk1": {**MLA, **EXPERTS, **GROUPS, **DENSE_FIRST, "model_type": "axk1"},
    "axk2": {**MLA, **EXPERTS, **GROUPS, **DENSE_FIRST, **INDEXER, "model_type": "axk2", "gated_norm_rank": 7},
    "bailing_hybrid": {
        **without(MLA, "q_lora_rank"), **without(EXPERTS, "n_routed_experts"), **GROUPS, **HYBRID,
        "model_type": "bailing_hybrid", "num_local_experts": 4, "num_mtp_layers": 0, "head_dim": 14,
        "short_conv_kernel_size": 3,
    },
    "deepseek_v2": {
        **MLA, **EXPERTS, **GROUPS, "model_type": "deepseek_v2", "topk_method": "group_limited_greedy",
        "first_k_dense_replace": 1,
    },
    "deepseek_v2_q_proj": {
        **MLA, **EXPERTS, "model_type": "deepseek_v2", "q_lora_rank": None, "first_k_dense_replace": 1,
        "attention_bias": True, "mlp_bias": True,
    },
    "deepseek_v3": {**DEEPSEEK_V3, "rope_parameters": YARN},
    "deepseek_v32": {**MLA, **EXPERTS, **GROUPS, **DENSE_FIRST, **INDEXER, "model_type": "deepseek_v32"},
    "dots3_note": DOTS3,
    # With its towers, of which transformers' causal LM loads nothing.
    "dots3_note_towers": {
        "model_type": "dots3_note", "text_config": DOTS3,
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "patch_size": 4, "mlp_layer_types": ["dense", "dense"], "adapter_in_dim": 16, "adapter_out_dim": 48,
        },
        "audio_config": {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
            "feature_size": 16, "downsample_hidden_size": 8, "adapter_input_size": 16, "adapter_out_dim": 48,
        },
        **{f"{kind}_token_id": VOCABULARY + n for n, kind in enumerate(("image", "video", "audio"))},
    },
    "glm4_moe_lite": {**MLA, **EXPERTS, **ONE_GROUP, **DENSE_FIRST, "model_type": "glm4_moe_lite"},
    "glm5_next": {
        "model_type": "glm5_next",
        "text_config": {
            **MLA, **EXPERTS, **ONE_GROUP, **INDEXER, **LINEAR, **HYBRID, "model_type": "glm5_next_text",
            # The indexer picks groups of 2 tokens.
            "qk_rope_head_dim": 0, "index_topk": 6, "index_kpool": 2, "hc_mult": 3, "num_hidden_layers": 6,
            "layer_types": ["linear_attention", "indexed_attention", "indexed_attention"] * 2,
            "indexer_types": ["full", "full", "shared"] * 2,
            "mlp_layer_types": ["dense", "dense", "sparse"] * 2,
        },
        "vision_config": {
            "depth": 1, "hidden_size": 16, "num_heads": 2, "image_size": 8, "patch_size": 4, "out_hidden_size": 48,
            "intermediate_size": 24, "projection_intermediate_size": 20,
        },
        **{
            f"{kind}_token_id": VOCABULARY + n
            for n, kind in enumerate(
                ("image", "video", "image_start", "image_end", "video_start", "video_end")
            )
        },
    },
    "glm_moe_dsa": {
        **MLA, **EXPERTS, **ONE_GROUP, **INDEXER, "model_type": "glm_moe_dsa", "num_hidden_layers": 4,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "indexer_types": ["full", "shared", "full", "shared"],
    },
    "hy_v4": {
        **MLA, **EXPERTS, **ONE_GROUP, **INDEXER, "model_type": "hy_v4", "num_hidden_layers": 4, "hc_mult": 3,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "indexer_types": ["full", "shared", "full", "shared"],
    },
    "kimi_linear": {
        **without(MLA, "q_lora_rank"), **without(EXPERTS, "n_routed_experts"), **GROUPS, **LINEAR, **HYBRID,
        "model_type": "kimi_linear", "num_local_experts": 4,
    },
    "longcat_flash": {
        **without(MLA, "num_hidden_layers", "intermediate_size"), "model_type": "longcat_flash", "num_layers": 2,
        "ffn_hidden_size": 56, "expert_ffn_hidden_size": 40, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 3,
        "head_dim": 6,
    },
    "minicpm3": {**MLA, "model_type": "minicpm3", "dim_model_base": 32},
    "mistral4": MISTRAL4,
    # Layers 0 and 1 lend their cache to 2 and 3, the latter with an indexer of its own; 1, 3 and 5 have no rope.
    "mistral_large4": {
        "model_type": "mistral_large4",
        "text_config": {
            **without(MLA, "q_lora_rank"), **EXPERTS, **ONE_GROUP, **INDEXER, "model_type": "mistral_large4_text",
            "num_hidden_layers": 6,
            "no_rope_layers": [1, 0, 1, 0, 1, 0],
            "kv_source_layers": [0, 1, 0, 1, 4, 5],
            "indexer_types": ["full", "full", "shared", "full", "full", "shared"],
            "mlp_layer_types": ["dense", "sparse", "sparse", "dense", "sparse", "sparse"],
        },
        "vision_config": PIXTRAL,
        "image_token_index": VOCABULARY,
    },
    "youtu": {**MLA, "model_type": "youtu"},
    "kimi_k25": {
        "model_type": "kimi_k25",
        "text_config": DEEPSEEK_V3,
        "vision_config": {
            "patch_size": 4, "pos_emb_height": 2, "pos_emb_width": 2, "pos_emb_time": 2, "num_attention_heads": 2,
            "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24,
        },
        "projection_hidden_size": 16, "image_token_id": VOCABULARY, "video_token_id": VOCABULARY + 1,
        "vision_start_token_id": VOCABULARY + 2, "vision_end_token_id": VOCABULARY + 3, "tie_word_embeddings": False,
    },
    "llava": {
        "model_type": "llava",
        "text_config": {**MLA, **EXPERTS, "model_type": "deepseek_v2", "first_k_dense_replace": 1},
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 16,
        },
        "image_token_index": VOCABULARY,
    },
    "mistral3": {
        "model_type": "mistral3", "text_config": MISTRAL4, "vision_config": PIXTRAL, "image_token_index": VOCABULARY,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


def tiny(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """The family's model with random weights, in eval mode; one `seed` gives the same weights in every dtype."""
    model = build(name, torch.float32, seed)
    randomize(model, torch.Generator().manual_seed(seed))
    if dtype != torch.float32:
        # Built anew rather than cast: a cast would round the rotary frequencies too, which transformers never does.
        weights, model = model.state_dict(), build(name, dtype, seed)
        # What `from_pretrained` keeps in float32, and `from_config` doesn't.
        kept = model._keep_in_fp32_modules_strict or ()
        for key, tensor in model.state_dict(keep_vars=True).items():
            if any(part in key for part in kept):
                tensor.data = tensor.data.float()
        model.load_state_dict(weights)
    return model.eval()


def build(name: str, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """The family's model as transformers initializes it."""
    # A copy, because a config keeps and edits the dictionaries that it is made of.
    config = AutoConfig.for_model(**deepcopy(FAMILIES[name]))
    auto = auto_class(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto.from_config(config, dtype=dtype)


def auto_class(name: str) -> Any:
    """AutoModelForCausalLM rejects the wrappers but one, and mistral4 too."""
    wrapped = "text_config" in FAMILIES[name] and name != "dots3_note_towers"
    return AutoModelForImageTextToText if wrapped or name == "mistral4" else AutoModelForCausalLM


@torch.no_grad()
def randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Draw every matrix anew, and move whatever has a natural value (norms, biases, buffers) away from it.

    A vector or a constant tensor keeps the value that the family initializes it with, plus noise: the decay of a KDA
    layer only works around its own.  Buffers that checkpoints don't hold (rotary frequencies) are left alone.
    """
    stored = {id(t): (key, t) for key, t in model.state_dict(keep_vars=True).items() if t.is_floating_point()}
    for key, tensor in stored.values():
        # Added to probabilities: with more, some experts would get no token at all.
        std = 0.05 if key.endswith("e_score_correction_bias") else STD
        noise = std * torch.randn(tensor.shape, generator=generator)
        natural = tensor.dim() < 2 or tensor.numel() == max(tensor.shape) or bool((tensor == tensor.flatten()[0]).all())
        tensor.copy_(tensor + noise if natural else noise)


def vocabulary(name: str) -> int:
    """How many tokens `tiny(name)` knows: any of them may stand in its input."""
    config = FAMILIES[name]
    return config.get("text_config", config)["vocab_size"]


def text_model(model: PreTrainedModel) -> nn.Module:
    """The decoder inside a model of any kind, without its head and its vision tower."""
    return model.get_decoder()


def mla_modules(model: nn.Module) -> dict[str, nn.Module]:
    """name → MLA attention module, recognized by what it can do: expand a cached latent with its `kv_b_proj`."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "kv_b_proj") and hasattr(m, "expand_kv")}
