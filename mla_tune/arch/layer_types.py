"""Rules for what each decoder layer is, by the names that the family table uses; they read a config.json's keys.

A layer's attention is of one of these kinds:

    mla        multi-head latent attention          sliding   the same over a window of tokens
    linear     linear attention, without a cache
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mla_tune.arch.config import ConfigReader

Rule = Callable[[ConfigReader, int], list[Any]]


def _first_k_dense(c: ConfigReader, n: int) -> list[bool]:
    return [i >= c.int("first_k_dense_replace") for i in range(n)]


def _mlp_layer_types(c: ConfigReader, n: int) -> list[bool]:
    """A list, by default all from `first_k_dense_replace` on, every `moe_layer_freq`-th of them."""
    if mlp_types := c.get("mlp_layer_types"):
        return [kind == "sparse" for kind in mlp_types]
    every = c.get("moe_layer_freq", 1)
    if isinstance(every, list):
        return [i >= c.int("first_k_dense_replace") and bool(every[i]) for i in range(n)]
    return [i >= c.int("first_k_dense_replace") and i % every == 0 for i in range(n)]


def _mlp_layer_types_only(c: ConfigReader, n: int) -> list[bool]:
    """A list, by default all but the family's first few, whatever other keys say."""
    if mlp_types := c.get("mlp_layer_types"):
        return [kind == "sparse" for kind in mlp_types]
    return [i >= c.int("dense_layers") for i in range(n)]


#: Which layers have routed experts.
MOE_LAYERS: dict[str, Rule] = {
    "all": lambda _, n: [True] * n,
    "first_k_dense": _first_k_dense,
    "mlp_layer_types": _mlp_layer_types,
    "mlp_layer_types_only": _mlp_layer_types_only,
}

_KINDS = {"linear_attention": "linear", "sliding_attention": "sliding"}


def _layer_types(c: ConfigReader) -> list[str] | None:
    types = c.get("layer_types")
    return [_KINDS.get(t, "mla") for t in types] if types else None


def _every(n: int, is_mla: Callable[[int], bool], other: str = "linear") -> list[str]:
    return ["mla" if is_mla(i) else other for i in range(n)]


def _bailing_hybrid(c: ConfigReader, n: int) -> list[str]:
    group = c.int("layer_group_size")
    return _layer_types(c) or _every(n, lambda i: (i + 1) % group == 0)


def _kimi_linear(c: ConfigReader, n: int) -> list[str]:
    linear = c.get("linear_attn_config") or {}
    full = linear.get("full_attn_layers")
    if full is not None:  # counted from 1
        return _layer_types(c) or _every(n, lambda i: i + 1 in full)
    return _layer_types(c) or _every(n, lambda i: i > 0 and i % 4 == 0)


def _glm5_next(c: ConfigReader, n: int) -> list[str]:
    return _layer_types(c) or _every(n, lambda i: i % 4 == 3)


def _dots3_note(c: ConfigReader, n: int) -> list[str]:
    windows = c.get("use_sliding_window", True)
    return _layer_types(c) or _every(n, lambda i: not windows or i < 2 or i % 4 == 1, "sliding")


#: The kind of attention of each layer.
KINDS: dict[str, Rule] = {
    "mla": lambda _, n: ["mla"] * n,
    "bailing_hybrid": _bailing_hybrid,
    "dots3_note": _dots3_note,
    "glm5_next": _glm5_next,
    "kimi_linear": _kimi_linear,
}


def _indexer_types(c: ConfigReader, n: int) -> list[bool]:
    """A list, a pattern of F and S, or every `index_topk_freq`-th layer from `index_skip_topk_offset` on."""
    types = c.get("indexer_types") or c.get("index_topk_pattern")
    if types:
        return [t in ("full", "F") for t in types]
    every, offset = max(c.get("index_topk_freq", 1), 1), c.get("index_skip_topk_offset", 2)
    return [max(i - offset + 1, 0) % every == 0 for i in range(n)]


def _hy_v4_indexers(c: ConfigReader, n: int) -> list[bool]:
    types = c.get("indexer_types")
    return [t == "full" for t in types] if types else [i == 0 or (i - 1) % 4 == 0 for i in range(n)]


def _indexed_attention(c: ConfigReader, n: int) -> list[bool]:
    """Layers that the list calls so; `full_attention` is the same thing unless `use_dsa` is False."""
    dense = c.get("use_dsa") is False
    types = c.get("layer_types")
    if not types:
        return [kind == "mla" and not dense for kind in _dots3_note(c, n)]
    legacy = c.get("use_dsa", c.get("per_layer_config") is None)
    return [not dense and (t == "indexed_attention" or (t == "full_attention" and bool(legacy))) for t in types]


#: Which layers have an indexer of their own.
INDEXERS: dict[str, Rule] = {
    "all": lambda _, n: [True] * n,
    "hy_v4": _hy_v4_indexers,
    "indexed_attention": _indexed_attention,
    "indexer_types": _indexer_types,
}


def _sliding(c: ConfigReader, attention_types: list[str]) -> list[Mapping[str, Any]]:
    """dots3: windows have sizes of their own, as `swa_*` keys or, as transformers writes them, layer by layer."""
    own = {int(i): sizes for i, sizes in (c.get("per_layer_config") or {}).items()}
    default = {
        "num_attention_heads": 64, "q_lora_rank": 1024, "kv_lora_rank": 1024, "head_dim": 256,
        "qk_nope_head_dim": 192, "v_head_dim": 128,
    }  # fmt: skip
    sizes = {name: c.get(f"swa_{name}", value) for name, value in default.items()}
    sizes["qk_rope_head_dim"] = c.get("swa_qk_rope_head_dim", sizes["head_dim"] - sizes["qk_nope_head_dim"])
    return [own.get(i, sizes if not own else {}) if kind == "sliding" else {} for i, kind in enumerate(attention_types)]


def _no_rope(c: ConfigReader, attention_types: list[str]) -> list[Mapping[str, Any]]:
    """Mistral Large 4: a layer without rope has the numbers of the rope part among its others."""
    P, R = c.int("qk_nope_head_dim"), c.int("qk_rope_head_dim")
    every = c.get("no_rope_layer_interval", 4)
    ropes = c.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(len(attention_types))]
    return [{} if rope else {"qk_nope_head_dim": P + R, "qk_rope_head_dim": 0} for rope in ropes]


#: Keys of config.json that are others in some layers.
LAYER_DIMS: dict[str, Callable[[ConfigReader, list[str]], list[Mapping[str, Any]]]] = {
    "no_rope": _no_rope,
    "sliding": _sliding,
}
