"""Find the family of a config.json in the family table, or raise an error that says what kind of model it is."""

from __future__ import annotations

from collections.abc import Mapping

from mla_tune.arch.config import Config
from mla_tune.arch.fallback import fallback_family
from mla_tune.arch.families import BY_TYPE, FAMILIES
from mla_tune.arch.family import Family
from mla_tune.arch.multimodal import WRAPPERS
from mla_tune.errors import InputError, NotMLAError


def family_of(config: Config, text: Config, kind: str | None, where: str) -> tuple[Family, tuple[str, ...]]:
    """Return the family of a text model, and warnings about it.

    `config` is the whole config.json, `text` the part of it that describes the text model, `kind` the text model's type
    (None if it is not given), `where` the file's name in errors.  Raises `NotMLAError` for a model without MLA, and
    `InputError` for one that has MLA in a layout that is not known.
    """
    kind = kind or model_type_of(config)
    if not kind:
        raise InputError(f"{where}: no 'model_type': not a Hugging Face model configuration")
    if not text.get("kv_lora_rank"):
        inner = config.get("text_config")
        if text is config and isinstance(inner, Mapping) and inner.get("kv_lora_rank"):
            raise InputError(
                f"{where}: model_type '{kind}' is a wrapper around an MLA text model ('{inner.get('model_type')}'), "
                f"and its layout is not known; known wrappers: {', '.join(sorted(WRAPPERS))}"
            )
        found = _attention_of(text, kind)
        raise NotMLAError(f"{where}: {found}. mla-tune is for models with Multi-head Latent Attention")
    if kind in BY_TYPE:
        return BY_TYPE[kind], ()
    return fallback_family(text, kind, where)


def model_type_of(config: Config) -> str | None:
    """Return the `model_type`; if it is missing (LongCat-Flash as published), look it up by `architectures`."""
    if config.get("model_type"):
        return str(config["model_type"])
    names = config.get("architectures") or []
    return next((f.model_type for f in FAMILIES if f.architecture in names), None)


def _attention_of(config: Config, kind: str) -> str:
    """Say which kind of attention a model without MLA has, from its numbers of heads."""
    name = f"model_type '{kind}' has no 'kv_lora_rank'"
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if not heads:
        return f"{name} and no attention heads that could be read"
    if groups in (None, heads):
        return f"{name}: multi-head attention with {heads} heads"
    attention = "multi-query" if groups == 1 else "grouped-query"
    return f"{name}: {attention} attention with {heads} query and {groups} key/value heads"
