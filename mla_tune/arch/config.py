"""Read a text model's config.json: a key under any of its names, with the family's default; sizes by letter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mla_tune.arch.dims import MLADims
from mla_tune.arch.family import Family
from mla_tune.errors import InputError

#: A parsed config.json, or the part of it that describes one model.
Config = Mapping[str, Any]

#: Other names of a key, in transformers or in published files.
_SYNONYMS: dict[str, tuple[str, ...]] = {
    "max_position_embeddings": ("model_max_length",),
    "n_routed_experts": ("num_local_experts", "num_experts"),
    "n_shared_experts": ("num_shared_experts",),
    "num_experts_per_tok": ("num_experts_per_token",),
    "num_local_experts": ("num_experts", "n_routed_experts"),
    "num_nextn_predict_layers": ("num_mtp_layers",),
    "shared_experts_intermediate_size": ("moe_shared_expert_intermediate_size",),
}
#: Keys that published files hold inside `linear_attn_config`, with their names there.
_LINEAR_ATTENTION_KEYS: dict[str, str] = {
    "linear_head_dim": "head_dim",
    "linear_num_heads": "num_heads",
    "linear_conv_kernel_dim": "short_conv_kernel_size",
}


class ConfigReader:
    """Reads keys of a text model's config.json.  `where` names the file in errors."""

    def __init__(self, config: Config, family: Family, where: str) -> None:
        self.config, self.family, self.where = config, family, where

    def replaced(self, values: Config) -> ConfigReader:
        """Return a reader of the same config.json with `values` in place of some keys."""
        return ConfigReader({**self.config, **values}, self.family, self.where) if values else self

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key under any of its names, else the family's default, else `default`."""
        linear = self.config.get("linear_attn_config")
        name_there = _LINEAR_ATTENTION_KEYS.get(key)
        if name_there is not None and isinstance(linear, Mapping) and name_there in linear:
            return linear[name_there]  # it has priority over the key itself, as in transformers
        for name in (key, *_SYNONYMS.get(key, ())):
            value = self.config.get(name)
            if value is not None:
                return value
        return self.family.defaults.get(key, default)

    def int(self, key: str) -> int:
        """Return the value of a key that must be a whole number of at least 0.  Raises `InputError` if it is not."""
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            got = "missing" if value is None else f"{value!r}"
            raise InputError(f"{self.where}: '{key}' is {got}; {self.family.title} needs a whole number there")
        return value


def dims_of(c: ConfigReader, D: int) -> MLADims:
    """Return the dimensions of MLA; `D` is the hidden size.  Raises `InputError` for a missing key."""
    H = c.int("num_attention_heads")
    L = c.get("q_lora_rank") if c.family.compresses_query else None
    V = c.get("v_head_dim") or D // H
    dims = MLADims(H, c.int("qk_nope_head_dim"), c.int("qk_rope_head_dim"), V, c.int("kv_lora_rank"), L, D)
    if L is not None:
        c.int("q_lora_rank")
    return dims


def letters_of_family(c: ConfigReader, family: Family) -> dict[str, int]:
    """Return the sizes of what only some families have, by letter.

    X index heads of Y numbers each; G tokens that an indexer pools into one; S residual streams of hyper-connections; g
    rank of gated norms; K heads of Z numbers each and F taps of linear attention (KDA).
    """
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
        if c.get(names[0]) is None:  # published files of bailing_hybrid
            names = ("num_attention_heads", "head_dim", "short_conv_kernel_size")
        letters |= {letter: c.int(name) for letter, name in zip("KZF", names, strict=True)}
    return letters


def letters_of_dims(d: MLADims) -> dict[str, int]:
    """Return the dimensions of an MLA module by letter, for shapes such as "H*P+H*R"; L is 0 without W_DQ."""
    return {"H": d.H, "P": d.P, "R": d.R, "V": d.V, "C": d.C, "L": d.L or 0}
