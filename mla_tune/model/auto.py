"""Handle differences between transformers' classes for text models and for multimodal models."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText


def auto_class(config: Any) -> Any:
    """The auto class that loads a model with this transformers configuration.

    It is `AutoModelForCausalLM`, except for models that only `AutoModelForImageTextToText` knows; in transformers 5.23
    mistral4, a text model, is one of these.  A model with code of its own (`auto_map`) is a causal LM.
    """
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return AutoModelForCausalLM
    known = type(config) in AutoModelForCausalLM._model_mapping
    other = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if other and not known else AutoModelForCausalLM


def set_experts(base: Any, name: str) -> None:
    """Choose transformers' implementation of the routed experts, by name.

    Some multimodal models don't know the setting: there it is set on the text model inside.
    """
    try:
        base.set_experts_implementation(name)
    except ValueError:
        base.get_decoder().set_experts_implementation(name)
