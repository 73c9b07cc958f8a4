"""Rules that say what each decoder layer is, from config.json: its kind of attention, experts, indexer, dimensions.

The family table names a rule for each of these questions, and the four dictionaries here hold the rules by name.  A
layer's attention is of one of these kinds:

    mla        multi-head latent attention
    sliding    multi-head latent attention over a window of tokens
    linear     linear attention (KDA), without a KV cache
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mla_tune.arch.config import ConfigReader

#: (config.json, number of layers) → one value for each layer; a list from config.json may be longer or shorter.
Rule = Callable[[ConfigReader, int], list[Any]]


def _first_k_dense(c: ConfigReader, n: int) -> list[bool]:
    return [i >= c.int("first_k_dense_replace") for i in range(n)]


def _mlp_layer_types(c: ConfigReader, n: int) -> list[bool]:
    """`mlp_layer_types` if it is there, else the layers from `first_k_dense_replace` on that `moe_layer_freq` selects:
    a list of flags, or a number m for every layer whose index is a multiple of m."""
    if mlp_types := c.get("mlp_layer_types"):
        return [kind == "sparse" for kind in mlp_types]
    every = c.get("moe_layer_freq", 1)
    if isinstance(every, list):
        return [i >= c.int("first_k_dense_replace") and bool(flag) for i, flag in enumerate(every)]
    return [i >= c.int("first_k_dense_replace") and i % every == 0 for i in range(n)]


def _mlp_layer_types_only(c: ConfigReader, n: int) -> list[bool]:
    """`mlp_layer_types` if it is there, else all but the family's first `dense_layers`; other keys are ignored."""
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

#: Names in `layer_types` of config.json → kinds of attention; any other name is `mla`.
_KIND_OF_LAYER_TYPE = {"linear_attention": "linear", "sliding_attention": "sliding"}


def _from_layer_types(c: ConfigReader) -> list[str] | None:
    """The kinds of attention that `layer_types` gives; None if config.json has no such key."""
    types = c.get("layer_types")
    return [_KIND_OF_LAYER_TYPE.get(t, "mla") for t in types] if types else None


def _mla_where(n: int, is_mla: Callable[[int], bool], other: str = "linear") -> list[str]:
    """`mla` for the layers that `is_mla` selects by their index, `other` for the rest."""
    return ["mla" if is_mla(i) else other for i in range(n)]


def _bailing_hybrid(c: ConfigReader, n: int) -> list[str]:
    group = c.int("layer_group_size")
    return _from_layer_types(c) or _mla_where(n, lambda i: (i + 1) % group == 0)


def _kimi_linear(c: ConfigReader, n: int) -> list[str]:
    linear = c.get("linear_attn_config") or {}
    full = linear.get("full_attn_layers")
    if full is not None:  # this list counts layers from 1
        return _from_layer_types(c) or _mla_where(n, lambda i: i + 1 in full)
    return _from_layer_types(c) or _mla_where(n, lambda i: i > 0 and i % 4 == 0)


def _glm5_next(c: ConfigReader, n: int) -> list[str]:
    return _from_layer_types(c) or _mla_where(n, lambda i: i % 4 == 3)


def _dots3_note(c: ConfigReader, n: int) -> list[str]:
    windows = c.get("use_sliding_window", True)
    return _from_layer_types(c) or _mla_where(n, lambda i: not windows or i < 2 or i % 4 == 1, "sliding")


#: The kind of attention of each layer.
ATTENTION_TYPES: dict[str, Rule] = {
    "mla": lambda _, n: ["mla"] * n,
    "bailing_hybrid": _bailing_hybrid,
    "dots3_note": _dots3_note,
    "glm5_next": _glm5_next,
    "kimi_linear": _kimi_linear,
}


def _indexer_types(c: ConfigReader, n: int) -> list[bool]:
    """`indexer_types` (`full` or not), else `index_topk_pattern` (a letter for each layer, F for an indexer),
    else the first `index_skip_topk_offset` layers and every `index_topk_freq`-th after them."""
    types = c.get("indexer_types") or c.get("index_topk_pattern")
    if types:
        return [t in ("full", "F") for t in types]
    every, offset = max(c.get("index_topk_freq", 1), 1), c.get("index_skip_topk_offset", 2)
    return [max(i - offset + 1, 0) % every == 0 for i in range(n)]


def _hy_v4_indexers(c: ConfigReader, n: int) -> list[bool]:
    types = c.get("indexer_types")
    return [t == "full" for t in types] if types else [i == 0 or (i - 1) % 4 == 0 for i in range(n)]


def _indexed_attention(c: ConfigReader, n: int) -> list[bool]:
    """The layers that `layer_types` calls `indexed_attention`; without the list, those with full attention.

    Older files say `full_attention` for the same thing: they have `use_dsa: true`, or neither `use_dsa` nor
    `per_layer_config`.  `use_dsa: false` means no indexer at all.
    """
    no_indexers = c.get("use_dsa") is False
    types = c.get("layer_types")
    if not types:
        return [kind == "mla" and not no_indexers for kind in _dots3_note(c, n)]
    is_older_file = bool(c.get("use_dsa", c.get("per_layer_config") is None))
    indexed = ("indexed_attention", "full_attention") if is_older_file else ("indexed_attention",)
    return [not no_indexers and t in indexed for t in types]


#: Which layers have an indexer of their own; in some families other layers use the tokens that it chose.
INDEXERS: dict[str, Rule] = {
    "all": lambda _, n: [True] * n,
    "hy_v4": _hy_v4_indexers,
    "indexed_attention": _indexed_attention,
    "indexer_types": _indexer_types,
}


def _sliding(c: ConfigReader, attention_types: list[str]) -> list[Mapping[str, Any]]:
    """dots3: layers with a window have other dimensions, from `swa_*` keys in published files, or layer by layer from
    `per_layer_config` in those that transformers writes."""
    per_layer = {int(i): sizes for i, sizes in (c.get("per_layer_config") or {}).items()}
    default = {
        "num_attention_heads": 64, "q_lora_rank": 1024, "kv_lora_rank": 1024, "head_dim": 256,
        "qk_nope_head_dim": 192, "v_head_dim": 128,
    }  # fmt: skip
    sizes = {name: c.get(f"swa_{name}", value) for name, value in default.items()}
    sizes["qk_rope_head_dim"] = c.get("swa_qk_rope_head_dim", sizes["head_dim"] - sizes["qk_nope_head_dim"])
    return [
        per_layer.get(i, {} if per_layer else sizes) if kind == "sliding" else {}
        for i, kind in enumerate(attention_types)
    ]


def _no_rope(c: ConfigReader, attention_types: list[str]) -> list[Mapping[str, Any]]:
    """Mistral Large 4: in a layer without rope the R numbers of the rope part belong to the P numbers without rope."""
    P, R = c.int("qk_nope_head_dim"), c.int("qk_rope_head_dim")
    every = c.get("no_rope_layer_interval", 4)
    ropes = c.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(len(attention_types))]
    return [{} if rope else {"qk_nope_head_dim": P + R, "qk_rope_head_dim": 0} for rope in ropes]


#: (config.json, kind of attention of each layer) → for each layer the keys of config.json with another value there.
LAYER_DIMS: dict[str, Callable[[ConfigReader, list[str]], list[Mapping[str, Any]]]] = {
    "no_rope": _no_rope,
    "sliding": _sliding,
}
