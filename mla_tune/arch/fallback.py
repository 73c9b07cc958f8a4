"""Model types that have MLA but no entry in the family table: read as a plain relative of DeepSeek-V2, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mla_tune.arch.families import BY_TYPE
from mla_tune.arch.family import Family
from mla_tune.errors import InputError

#: Keys of parts that DeepSeek-V2 does not have.  If one is set, names and sizes of matrices would be guesses.
_OTHER_PARTS = (
    "index_topk", "index_n_heads", "layer_types", "linear_attn_config", "hc_mult", "kv_source_layers", "no_rope_layers",
    "sliding_window", "per_layer_config", "swa_kv_lora_rank", "zero_expert_num", "gated_norm_rank", "text_config",
    "mlp_layer_types", "moe_layer_freq", "attn_module_list_cfg", "layer_group_size",
)  # fmt: skip
#: Values with which a key of `_OTHER_PARTS` means no other part.
_HARMLESS: dict[str, tuple[Any, ...]] = {"moe_layer_freq": (1,), "sliding_window": (None, 0)}
_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim")


def fallback_family(config: Mapping[str, Any], model_type: str, where: str) -> tuple[Family, tuple[str, ...]]:
    """Return a family for an unknown model type, with a warning that says so; `where` names config.json in errors.

    This is safe for a config.json with the keys of DeepSeek-V2 alone, with or without experts: the sites are compared
    with the loaded model's weights before training, and with the checkpoint's headers before a merge.  Raises
    `InputError` if a key shows that the model has other parts, or if a size is missing.
    """
    known = ", ".join(sorted(BY_TYPE))
    unset: tuple[Any, ...] = (None, False, [], {})
    other_parts = [key for key in _OTHER_PARTS if config.get(key) not in (*unset, *_HARMLESS.get(key, ()))]
    missing = [key for key in _REQUIRED if config.get(key) is None]
    why = f"it has '{other_parts[0]}'" if other_parts else f"it has no '{missing[0]}'" if missing else ""
    if why:
        raise InputError(
            f"{where}: model_type '{model_type}' has MLA, but its layout is not known and {why}, so it can't be "
            f"read as a plain relative of DeepSeek-V2; known: {known}"
        )
    has_experts = bool(config.get("n_routed_experts"))
    pattern = BY_TYPE["deepseek_v2" if has_experts else "minicpm3"]
    defaults = {k: v for k, v in pattern.defaults.items() if k != "tie_word_embeddings"}
    # `fold` is None: whether folding is exact is known only of attention code that somebody has read.
    changes = {"aliases": (), "architecture": None, "defaults": defaults, "fold": None}
    family = replace(pattern, model_type=model_type, title=model_type, **changes)
    return family, (
        f"model_type '{model_type}' is not known: it is read as a plain relative of {pattern.title}, from its keys "
        "alone. Shapes are compared with the weights before anything is trained or merged",
    )
