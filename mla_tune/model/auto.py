"""What differs between transformers' classes for text models and for models around one."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText


def auto_class(config: Any) -> Any:
    """The class for a transformers configuration; models with `auto_map` are causal LMs of their own code.

    mistral4, a text model, is among those that only `AutoModelForImageTextToText` knows (transformers 5.23).
    """
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return AutoModelForCausalLM
    known = type(config) in AutoModelForCausalLM._model_mapping
    other = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if other and not known else AutoModelForCausalLM


def set_experts(base: Any, name: str) -> None:
    """Choose how routed experts are computed.  Some wrappers don't know the setting; the text model in them does."""
    try:
        base.set_experts_implementation(name)
    except ValueError:
        base.get_decoder().set_experts_implementation(name)
