"""A text model's config.json as the registry reads it: keys under all their names, and sizes by letter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mla_tune.arch.dims import MLADims
from mla_tune.arch.family import Family
from mla_tune.errors import InputError

Config = Mapping[str, Any]

#: Other names of a key: transformers' own, and those of published files.
_SYNONYMS: dict[str, tuple[str, ...]] = {
    "max_position_embeddings": ("model_max_length",),
    "n_routed_experts": ("num_local_experts", "num_experts"),
    "n_shared_experts": ("num_shared_experts",),
    "num_experts_per_tok": ("num_experts_per_token",),
    "num_local_experts": ("num_experts", "n_routed_experts"),
    "num_nextn_predict_layers": ("num_mtp_layers",),
    "shared_experts_intermediate_size": ("moe_shared_expert_intermediate_size",),
}
#: Keys that stand in a table of their own in published files.
_LINEAR: dict[str, str] = {
    "linear_head_dim": "head_dim",
    "linear_num_heads": "num_heads",
    "linear_conv_kernel_dim": "short_conv_kernel_size",
}


class ConfigReader:
    """Reads config keys with the family's defaults; a missing or non-numeric key is an error that names it."""

    def __init__(self, config: Config, family: Family, where: str) -> None:
        self.config, self.family, self.where = config, family, where

    def with_(self, others: Config) -> ConfigReader:
        """The same with other values for some keys."""
        return ConfigReader({**self.config, **others}, self.family, self.where) if others else self

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key under any of its names, else the family's default, else `default`."""
        linear = self.config.get("linear_attn_config")
        if key in _LINEAR and isinstance(linear, Mapping) and _LINEAR[key] in linear:
            return linear[_LINEAR[key]]  # it wins, as in transformers
        for name in (key, *_SYNONYMS.get(key, ())):
            value = self.config.get(name)
            if value is not None:
                return value
        return self.family.defaults.get(key, default)

    def int(self, key: str) -> int:
        """The value of a key that must be a whole number of at least 0.  Raises `InputError` that names the key."""
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            got = "missing" if value is None else f"{value!r}"
            raise InputError(f"{self.where}: '{key}' is {got}; {self.family.title} needs a whole number there")
        return value


def dims_of(c: ConfigReader, D: int) -> MLADims:
    """The MLA dimensions that a config.json gives; `D` is the hidden size.  Raises `InputError` for a missing key."""
    H = c.int("num_attention_heads")
    L = c.get("q_lora_rank") if c.family.compresses_query else None
    V = c.get("v_head_dim") or D // H
    dims = MLADims(H, c.int("qk_nope_head_dim"), c.int("qk_rope_head_dim"), V, c.int("kv_lora_rank"), L, D)
    if L is not None:
        c.int("q_lora_rank")
    return dims


def letters_of(c: ConfigReader, family: Family) -> dict[str, int]:
    """Sizes of what only some families have, by the letters of `families`."""
    letters: dict[str, int] = {}
    if family.indexers:
        letters |= {"X": c.int("index_n_heads"), "Y": c.int("index_head_dim")}
    if "index_kpool" in family.defaults:
        letters["G"] = c.int("index_kpool")
    if "hc_mult" in family.defaults:
        letters["S"] = c.int("hc_mult")
    if "gated_norm_rank" in family.defaults:
        letters["g"] = c.int("gated_norm_rank")
    if "linear" in family.parts:
        names = ("linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim")
        if c.get(names[0]) is None:  # bailing_hybrid, as it was published
            names = ("num_attention_heads", "head_dim", "short_conv_kernel_size")
        letters |= {letter: c.int(name) for letter, name in zip("KZF", names, strict=True)}
    return letters


def numbers_of(d: MLADims) -> dict[str, int]:
    """The dimension letters of a module with their sizes, for shapes such as "H*P+H*R"; L is 0 without W_DQ."""
    return {"H": d.H, "P": d.P, "R": d.R, "V": d.V, "C": d.C, "L": d.L or 0}
