"""The family table: one entry for each model type whose layout mla-tune knows.

An entry (`arch.family.Family`) says where transformers puts the matrices of a decoder layer, which keys of config.json
give their sizes, and how checkpoints name them.  `arch.build.architecture` turns an entry and a config.json into sites.
`arch.layer_types` has the rules that say what each layer is.  Models around a text model (vision, audio) are in
`arch.multimodal`.
"""

from __future__ import annotations

from mla_tune.arch.family import Family, MoELayout
from mla_tune.arch.key_mapping import KeyMapping
from mla_tune.arch.parts import Part
from mla_tune.arch.roles import GROUPS, Role

#: Why folding is exact in a family like DeepSeek's (read in `modeling_*.py` of transformers 5.23, the attention module
#: with `expand_kv`).
_FOLD_PLAIN = (
    "q_b_proj and kv_b_proj have no bias; nothing but the split into nope and rope lies between them and the scores"
)


def _matrices(role: Role, **shapes: tuple[str, ...]) -> tuple[Part, ...]:
    """Return a part of this role for each path=shape; `__` in a path stands for a dot."""
    return tuple(Part(path.replace("__", "."), shape, role) for path, shape in shapes.items())


#: The indexer of DeepSeek Sparse Attention: X index heads of Y numbers each.
_INDEXER = (
    *_matrices(Role.INDEXER, wq_b=("X*Y", "L"), wk=("Y", "D"), weights_proj=("X", "D")),
    Part("k_norm", ("2*Y",)),
)
#: Kimi Delta Attention (KDA, arXiv:2510.26692): K heads of Z numbers each, F taps of the short convolution.  These
#: matrices are in every family that has it.
_KDA_COMMON = _matrices(
    Role.LINEAR_ATTENTION,
    q_proj=("K*Z", "D"), k_proj=("K*Z", "D"), v_proj=("K*Z", "D"), conv1d=("3*K*Z", "F"),
    b_proj=("K", "D"), o_proj=("D", "K*Z"),
)  # fmt: skip
_KDA_VECTORS = (Part("forget_gate.A_log", ("K",)), Part("forget_gate.dt_bias", ("K*Z",)), Part("o_norm", ("Z",)))
_KDA = (
    *_KDA_COMMON,
    *_matrices(
        Role.LINEAR_ATTENTION,
        forget_gate__f_a_proj=("Z", "D"), forget_gate__f_b_proj=("K*Z", "Z"),
        g_a_proj=("Z", "D"), g_b_proj=("K*Z", "Z"),
    ),
    *_KDA_VECTORS,
)  # fmt: skip
#: The convolution of q, k and v is one parameter in memory and three tensors on disk.
_CONV_SPLIT = (("conv1d", ("q_conv1d", "k_conv1d", "v_conv1d")),)
#: Endings of KDA tensors that transformers keeps in float32.
_KDA_FLOAT32 = ("A_log", "dt_bias", "conv1d.weight")
#: What belongs to the forget gate lies directly in the attention on disk.
_FLAT_FORGET_GATE = (r"\.forget_gate\.", ".")


def _hyper_connection(path: str, rows: str, scales: str) -> tuple[Part, ...]:
    """Return the parts of a hyper-connection of S residual streams."""
    return (
        Part(f"{path}.fn", (rows, "S*D"), Role.HYPER_CONNECTION, is_parameter=True),
        Part(f"{path}.base", (rows,)),
        Part(f"{path}.scale", (scales,)),
    )


FAMILIES: tuple[Family, ...] = (
    Family(
        "axk1",
        "A.X-K1",
        fold=_FOLD_PLAIN,
        moe=MoELayout("mlp_layer_types"),
        parts={"moe": (Part("mlp.post_mlp_layernorm", ("D",)),)},
        defaults={"n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 1},
        key_mapping=KeyMapping((((r"\.mlp\.post_mlp_layernorm\b", ".post_mlp_layernorm"),),)),
    ),
    Family(
        "axk2",
        "A.X-K2",
        moe=MoELayout("mlp_layer_types"),
        query=("q_gate_proj", ("H*P+H*R+H*V", "2*L")),
        indexers="all",
        parts={
            "indexer": _INDEXER,
            "layer": _matrices(
                Role.NORM_GATE, input_layernorm__mlp__fc1=("g", "D"), input_layernorm__mlp__fc2=("D", "g")
            ),
            "moe": _matrices(
                Role.NORM_GATE,
                post_attention_layernorm__mlp__fc1=("g", "D"), post_attention_layernorm__mlp__fc2=("D", "g"),
            ),
        },
        defaults={
            "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 1, "index_head_dim": 128,
            "index_n_heads": 16, "gated_norm_rank": 16,
        },
        key_mapping=KeyMapping(
            (
                (
                    (r"\.q_gate_proj\b", ".q_b_proj"),
                    (r"layernorm\.mlp\.fc1\b", "layernorm.W_down"), (r"layernorm\.mlp\.fc2\b", "layernorm.W_up"),
                ),
            )
        ),
    ),
    Family(
        "bailing_hybrid",
        "Ling (Bailing hybrid)",
        moe=MoELayout("mlp_layer_types", experts_key="num_local_experts"),
        compresses_query=False,
        attention_types="bailing_hybrid",
        parts={
            "mla": (Part("g_proj", ("H", "D"), Role.ATTENTION_GATE),),
            "linear": (
                *_KDA_COMMON,
                *_matrices(Role.LINEAR_ATTENTION, forget_gate__f_proj=("K*Z", "D"), g_proj=("K*Z", "D")),
                *_KDA_VECTORS,
            ),
        },
        defaults={
            "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 2, "num_local_experts": 512,
            "head_dim": 128, "short_conv_kernel_size": 4, "layer_group_size": 6, "num_nextn_predict_layers": 1,
        },
        key_mapping=KeyMapping(
            (
                (
                    (r"^(.*\.)?embed_tokens\b", r"\1word_embeddings"), (r"\.self_attn\.o_proj\b", ".self_attn.dense"),
                    (r"\.self_attn\b", ".attention"), _FLAT_FORGET_GATE,
                    (r"\.gate\.e_score_correction_bias$", ".gate.expert_bias"),
                ),
            ),
            splits=_CONV_SPLIT,
        ),
        keeps_dtype=("expert_bias", *_KDA_FLOAT32),
        mtp=True,
    ),
    Family(
        "deepseek_v2",
        "DeepSeek-V2",
        fold=_FOLD_PLAIN,
        moe=MoELayout("first_k_dense"),
        peft_remaps_experts=True,
        defaults={"first_k_dense_replace": 0, "n_shared_experts": 2, "num_experts_per_tok": 6},
    ),
    Family(
        "deepseek_v3",
        "DeepSeek-V3",
        fold=_FOLD_PLAIN,
        moe=MoELayout("first_k_dense"),
        peft_remaps_experts=True,
        aliases=("kimi_k2",),
        defaults={"first_k_dense_replace": 3, "n_shared_experts": 1, "num_experts_per_tok": 8},
        mtp=True,
    ),
    Family(
        "deepseek_v32",
        "DeepSeek-V3.2",
        moe=MoELayout("mlp_layer_types"),
        peft_remaps_experts=True,
        indexers="all",
        parts={"indexer": _INDEXER},
        defaults={
            "first_k_dense_replace": 3, "n_shared_experts": 1, "num_experts_per_tok": 8, "index_head_dim": 128,
            "index_n_heads": 64,
        },
        mtp=True,
    ),
    Family(
        "dots3_note",
        "dots3 Note",
        moe=MoELayout("mlp_layer_types", shared_width_key="shared_experts_intermediate_size"),
        aliases=("dots3_note_text",),
        attention_types="dots3_note",
        indexers="indexed_attention",
        layer_dims="sliding",
        parts={
            "mla": (Part("g_proj", ("H", "D"), Role.ATTENTION_GATE), Part("k_rope_only_layernorm", ("R",))),
            "indexer": _INDEXER,
        },
        defaults={
            "first_k_dense_replace": 1, "n_shared_experts": 1, "num_experts_per_tok": 8, "index_head_dim": 128,
            "index_n_heads": 64, "shared_experts_intermediate_size": 1536,
        },
    ),
    Family(
        "glm4_moe_lite",
        "GLM-4.7-Flash",
        fold=_FOLD_PLAIN,
        moe=MoELayout("mlp_layer_types_only"),
        peft_remaps_experts=True,
        defaults={"n_shared_experts": 1, "num_experts_per_tok": 4, "dense_layers": 1},
        mtp=True,
    ),
    Family(
        "glm5_next",
        "GLM-5.3-Flash",
        moe=MoELayout("mlp_layer_types_only"),
        aliases=("glm5_next_text",),
        attention_types="glm5_next",
        indexers="indexer_types",
        parts={
            "linear": _KDA,
            "indexer": (
                *_INDEXER,
                Part("index_kpool_compress_gate", ("Y", "D"), Role.INDEXER, is_parameter=True),
                Part("index_kpool_compress_ape", ("G", "Y"), Role.INDEXER, is_parameter=True),
            ),
            "layer": (*_hyper_connection("attn_hc", "2*S+S*S", "3"), *_hyper_connection("ffn_hc", "2*S+S*S", "3")),
        },
        defaults={
            "n_shared_experts": 1, "num_experts_per_tok": 8, "dense_layers": 3, "qk_rope_head_dim": 0,
            "index_head_dim": 128, "index_n_heads": 32, "index_kpool": 16, "hc_mult": 4, "linear_head_dim": 128,
            "linear_num_heads": 64, "linear_conv_kernel_dim": 4,
        },
        keeps_dtype=(
            "e_score_correction_bias", "hc_attn_base", "hc_attn_scale", "hc_ffn_base", "hc_ffn_scale", *_KDA_FLOAT32,
        ),
        key_mapping=KeyMapping(
            ((_FLAT_FORGET_GATE, (r"\.attn_hc\.(\w+)$", r".hc_attn_\1"), (r"\.ffn_hc\.(\w+)$", r".hc_ffn_\1")),),
            splits=_CONV_SPLIT,
        ),
    ),
    Family(
        "glm_moe_dsa",
        "GLM-5",
        moe=MoELayout("mlp_layer_types"),
        peft_remaps_experts=True,
        indexers="indexer_types",
        parts={"indexer": _INDEXER},
        defaults={
            "first_k_dense_replace": 3, "n_shared_experts": 1, "num_experts_per_tok": 8, "index_head_dim": 128,
            "index_n_heads": 32,
        },
        mtp=True,
    ),
    Family(
        "hy_v4",
        "Hunyuan V4",
        moe=MoELayout("mlp_layer_types_only", fused_on_disk=True),
        indexers="hy_v4",
        eager_only=True,
        keeps_dtype=(
            "e_score_correction_bias", "hc_fn", "hc_base", "hc_scale", "hc_head_fn", "hc_head_base", "hc_head_scale",
            "learnable_sink_param", "lm_head.weight", "indexer.k_norm.weight", "indexer.k_norm.bias",
            "indexer.weights_proj.weight",
        ),
        parts={
            "mla": (Part("gate_proj", ("H*V", "D"), Role.ATTENTION_GATE), Part("sinks", ("H",))),
            "indexer": _INDEXER,
            "layer": (*_hyper_connection("attn_hc", "2*S", "2"), *_hyper_connection("ffn_hc", "2*S", "2")),
            "decoder": (
                Part("hc_head.hc_fn", ("S", "S*D"), Role.HYPER_CONNECTION, is_parameter=True),
                Part("hc_head.hc_base", ("S",)),
                Part("hc_head.hc_scale", ("1",)),
            ),
        },
        defaults={
            "n_shared_experts": 1, "num_experts_per_tok": 8, "dense_layers": 1, "index_head_dim": 128,
            "index_n_heads": 16, "hc_mult": 4,
        },
        key_mapping=KeyMapping(
            tuple(
                (
                    *mlp_gate,
                    (r"\.self_attn\.gate_proj\b", ".self_attn.linear_gate"),
                    (r"\.sinks$", ".learnable_sink_param"),
                    (r"\.attn_hc\.(\w+)$", r".hc_pre.hc_attn_layer.hc_\1"),
                    (r"\.ffn_hc\.(\w+)$", r".hc_pre.hc_mlp_layer.hc_\1"),
                    (r"\.hc_head\.hc_(\w+)$", r".hc_pre.hc_head.hc_head_\1"),
                )
                # The second variant is what transformers writes: it names the MLPs' gates like the attention's.
                for mlp_gate in ((), ((r"\.gate_proj\b", ".linear_gate"),))
            )
        ),
    ),
    Family(
        "kimi_linear",
        "Kimi Linear",
        moe=MoELayout("mlp_layer_types", experts_key="num_local_experts"),
        attention_types="kimi_linear",
        parts={"linear": _KDA},
        defaults={
            "first_k_dense_replace": 1, "n_shared_experts": 1, "num_experts_per_tok": 8, "num_local_experts": 256,
            "linear_head_dim": 128, "linear_num_heads": 32, "linear_conv_kernel_dim": 4,
        },
        key_mapping=KeyMapping(
            (
                (_FLAT_FORGET_GATE, (r"\.mlp\.(experts|gate|shared_experts)\b", r".block_sparse_moe.\1")),
                # What transformers writes: the dense MLPs have the name of the experts' block, too.
                (_FLAT_FORGET_GATE, (r"\.mlp\b", ".block_sparse_moe")),
            ),
            experts=("w1", "w3", "w2"),
            splits=_CONV_SPLIT,
        ),
    ),
    Family(
        "longcat_flash",
        "LongCat-Flash",
        fold="as in deepseek_v3; one number scales the query and one the latent, and both commute with the products",
        scaled_latents=True,
        attention=("self_attn.0", "self_attn.1"),
        dense_mlp=("mlps.0", "mlps.1"),
        dense_beside_moe=True,
        moe=MoELayout(
            "all",
            router="router.classifier",
            router_reason="router: its weight is read directly, so a LoRA there does nothing until it is merged",
            router_read_directly=True,
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
    Family(
        "minicpm3",
        "MiniCPM3",
        fold=f"{_FOLD_PLAIN}; its half-split rope acts on the rope part of the query alone",
        defaults={"tie_word_embeddings": True},
    ),
    Family(
        "mistral4",
        "Mistral 4",
        moe=MoELayout("first_k_dense", fused_on_disk=True),
        defaults={"first_k_dense_replace": 0, "n_shared_experts": 1, "num_experts_per_tok": 4},
    ),
    Family(
        "mistral_large4",
        "Mistral Large 4",
        moe=MoELayout("mlp_layer_types"),
        aliases=("mistral_large4_text",),
        compresses_query=False,
        indexers="indexer_types",
        layer_dims="no_rope",
        kv_source_key="kv_source_layers",
        keeps_dtype=("lerope.alpha", ".gate.weight"),
        not_reloaded=(*GROUPS["shared"], *GROUPS["experts"]),
        parts={
            "mla": (Part("softmax_scaling", ("2*H",)),),
            "indexer": (
                *_matrices(Role.INDEXER, wq_b=("X*Y", "D"), wk=("Y", "D"), weights_proj=("X", "D")),
                Part("k_norm", ("2*Y",)), Part("q_input_norm", ("2*D",)), Part("softmax_scaling", ("2*X",)),
            ),
        },
        defaults={
            "first_k_dense_replace": 1, "n_shared_experts": 1, "num_experts_per_tok": 4, "index_head_dim": 128,
            "index_n_heads": 32,
        },
        key_mapping=KeyMapping(
            (
                (
                    (r"^model\.language_model\.embed_tokens\b", "tok_embeddings"), (r"^lm_head\b", "output"),
                    (r"^model\.language_model\.rotary_emb\.alpha$", "lerope.alpha"),
                    (r"^model\.language_model\.", ""),
                    (r"\.self_attn\.kv_a_proj_with_mqa\b", ".self_attn.wkv_a_with_mqa"),
                    (r"\.self_attn\.kv_b_proj\b", ".self_attn.wkv_b"), (r"\.self_attn\.o_proj\b", ".self_attn.wo"),
                    (r"\.self_attn\.q_proj\b", ".self_attn.wq"), (r"\.kv_a_layernorm\b", ".kv_a_norm"),
                    (r"\.softmax_scaling\.scale$", ".ssmax_scaling.s"),
                    (r"\.softmax_scaling\.bias$", ".ssmax_scaling.b"),
                    (r"\.self_attn\b", ".attention"), (r"\.input_layernorm\b", ".attention_norm"),
                    (r"\.post_attention_layernorm\b", ".ffn_norm"),
                    (r"\.mlp\.(experts|gate|shared_experts)\b", r".\1"), (r"\.mlp\.", ".feed_forward."),
                    (r"\.gate_proj\b", ".w1"), (r"\.down_proj\b", ".w2"), (r"\.up_proj\b", ".w3"),
                ),
            ),
            experts=("w1", "w3", "w2"),
        ),
    ),
    Family(
        "youtu",
        "Youtu-LLM",
        fold=_FOLD_PLAIN,
        aliases=("youtu_llm",),
        defaults={"tie_word_embeddings": True},
    ),
)  # fmt: skip

#: Entries by model type, aliases included.
BY_TYPE: dict[str, Family] = {name: f for f in FAMILIES for name in (f.model_type, *f.aliases)}
