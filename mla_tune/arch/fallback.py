"""A model type that has MLA and no entry in the family table: taken for a plain relative of DeepSeek, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mla_tune.arch.families import BY_TYPE
from mla_tune.arch.family import Family
from mla_tune.errors import InputError

#: Keys of parts that a plain relative doesn't have: with one of them set, names and sizes would be guesses.
_PECULIAR = (
    "index_topk", "index_n_heads", "layer_types", "linear_attn_config", "hc_mult", "kv_source_layers", "no_rope_layers",
    "sliding_window", "per_layer_config", "swa_kv_lora_rank", "zero_expert_num", "gated_norm_rank", "text_config",
    "mlp_layer_types", "moe_layer_freq", "attn_module_list_cfg", "layer_group_size",
)  # fmt: skip
#: Values of these keys that say nothing.
_PLAIN: dict[str, tuple[Any, ...]] = {"moe_layer_freq": (1,), "sliding_window": (None, 0)}
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim")


def detected(config: Mapping[str, Any], kind: str, where: str) -> tuple[Family, tuple[str, ...]]:
    """The family that an unknown model type is read as, with a warning that says so.

    Safe are models whose keys are those of DeepSeek-V2, with or without experts: what a recipe adapts is compared with
    the loaded model's weights before anything is trained, and a merge with the checkpoint's headers.  Raises
    `InputError` where a key tells of parts whose names and sizes would be guesses.
    """
    known = ", ".join(sorted(BY_TYPE))
    says_nothing: tuple[Any, ...] = (None, False, [], {})
    peculiar = [key for key in _PECULIAR if config.get(key) not in (*says_nothing, *_PLAIN.get(key, ()))]
    missing = [key for key in _NEEDED if config.get(key) is None]
    why = f"it has '{peculiar[0]}'" if peculiar else f"it has no '{missing[0]}'" if missing else ""
    if why:
        raise InputError(
            f"{where}: model_type '{kind}' has MLA, but its layout is not known and {why}, so it can't be read as a "
            f"plain relative of DeepSeek-V2; known: {known}"
        )
    has_experts = bool(config.get("n_routed_experts"))
    pattern = BY_TYPE["deepseek_v2" if has_experts else "minicpm3"]
    defaults = {k: v for k, v in pattern.defaults.items() if k != "tie_word_embeddings"}
    # Nobody has read its attention: whether folding would be exact is not known.
    plain = {"aliases": (), "architecture": None, "defaults": defaults, "fold": None}
    family = replace(pattern, model_type=kind, title=kind, **plain)
    return family, (
        f"model_type '{kind}' is not known: it is read as a plain relative of {pattern.title}, from its keys alone. "
        "Shapes are compared with the weights before anything is trained or merged",
    )
