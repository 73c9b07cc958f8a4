"""Which family a config.json belongs to: its entry in the family table, or an error that says what the model is."""

from __future__ import annotations

from collections.abc import Mapping

from mla_tune.arch.config import Config
from mla_tune.arch.fallback import detected
from mla_tune.arch.families import BY_TYPE, FAMILIES
from mla_tune.arch.family import Family
from mla_tune.arch.multimodal import WRAPPERS
from mla_tune.errors import InputError, NotMLAError


def family_of(config: Config, text: Config, kind: str | None, where: str) -> tuple[Family, tuple[str, ...]]:
    """The family of a text model, and warnings about it."""
    kind = kind or model_type_of(config)
    if not kind:
        raise InputError(f"{where}: no 'model_type': not a Hugging Face model configuration")
    if not text.get("kv_lora_rank"):
        inner = config.get("text_config")
        if text is config and isinstance(inner, Mapping) and inner.get("kv_lora_rank"):
            raise InputError(
                f"{where}: model_type '{kind}' is a wrapper around an MLA text model ('{inner.get('model_type')}'), "
                f"and its layout is not known; known: {', '.join(sorted(WRAPPERS))}"
            )
        what = _what_it_is(text, kind)
        raise NotMLAError(f"{where}: {what}. mla-tune is for models with Multi-head Latent Attention")
    if kind in BY_TYPE:
        return BY_TYPE[kind], ()
    return detected(text, kind, where)


def model_type_of(config: Config) -> str | None:
    """The config's `model_type`; where it has none (LongCat-Flash's published file), that of its architecture."""
    if config.get("model_type"):
        return str(config["model_type"])
    names = config.get("architectures") or []
    return next((f.model_type for f in FAMILIES if f.architecture in names), None)


def _what_it_is(config: Config, kind: str) -> str:
    """A sentence on a model that has no MLA, from the keys that tell attention kinds apart."""
    name = f"model_type '{kind}' has no 'kv_lora_rank'"
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if not heads:
        return f"{name} and no attention heads that could be read"
    if groups in (None, heads):
        return f"{name}: multi-head attention with {heads} heads"
    kind = "multi-query" if groups == 1 else "grouped-query"
    return f"{name}: {kind} attention with {heads} query and {groups} key/value heads"
