"""Find out which formats config.json declares, and edit it for weights that leave their format.

The quantized weights of a checkpoint are found by asking every format of `sockets.QUANT_FORMATS` that claims the
description in config.json.  Nothing is inferred from shapes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from mla_tune.arch.roles import Role
from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.index import Checkpoint
from mla_tune.checkpoint.quantized.base import QuantFormat, QuantizedTensor
from mla_tune.errors import InputError
from mla_tune.sockets import QUANT_FORMATS, QUANTIZED_BASES

#: Keys of config.json that may hold the description of quantized weights; compressed-tensors used the second until
#: 2024.
FIELDS = ("quantization_config", "compression_config")
#: The end of messages about weights that can't be read.
ADVICE = "Give the bfloat16 or float32 checkpoint of the same model with --base"
#: A key of routed experts, one by one or as one 3-D tensor; group 1 is the module of all of them.  Not
#: `shared_experts`.
_EXPERT = re.compile(r"(.+\.experts)\.(?:\d+\..+|[^.]+)")
#: Role → the layer that engines make of it and of the other roles with this name in the same module.  All parts of such
#: a layer need one precision.  vLLM calls the first two `fused_qkv_a_proj` and `gate_up_proj`.
FUSED_LAYERS: Mapping[Role, str] = {
    Role.W_DQ: "qkv_a",
    Role.W_DKV: "qkv_a",
    **dict.fromkeys((Role.GATE, Role.UP, Role.SHARED_GATE, Role.SHARED_UP), "gate_up"),
    **dict.fromkeys((Role.EXPERTS_GATE_UP, Role.EXPERTS_DOWN), "experts"),
}


def quantization_field(config: Mapping[str, Any]) -> str | None:
    """The key of config.json that holds the description of quantized weights; None where they are not quantized."""
    return next((name for name in FIELDS if config.get(name)), None)


def format_in_memory(config: Mapping[str, Any], quantize: str, where: Any) -> str | None:
    """The entry of `sockets.QUANTIZED_BASES` for a model with this config.json (at `where`); None for plain weights.

    A quantized checkpoint keeps its own format; a plain one takes `quantize`, which is `model.quantize` of the recipe.
    Raises `InputError` for a format that no entry of `sockets.QUANT_FORMATS` claims, for one that models can't keep in
    memory, and where formats of several kinds claim the checkpoint.
    """
    formats = formats_of(config, where)
    if not formats:
        return None if quantize == "none" else quantize
    for one in formats:
        one.check_config(config, where)
    unsupported = next((f for f in formats if f.name not in QUANTIZED_BASES), None)
    if unsupported is not None:
        raise InputError(
            f"{where}: weights in {unsupported.title} can be merged into, but a model can't keep them in memory; "
            "train on the bfloat16 checkpoint"
        )
    if len({f.kind for f in formats}) > 1:
        titles = " and ".join(dict.fromkeys(f.title for f in formats))
        raise InputError(
            f"{where}: the weights are in {titles}, which a model can't keep in memory side by side; "
            "train on the bfloat16 checkpoint"
        )
    return formats[0].name


def format_kind(name: str | None) -> str | None:
    """The short name of an entry of `sockets.QUANTIZED_BASES` in run.json and tables (`fp8`, `nf4`); None for None."""
    return name if name is None or name not in QUANT_FORMATS else QUANT_FORMATS.get(name).kind


def understood() -> str:
    """The part of an error message that lists what the registered formats read."""
    return "understood are " + " and ".join(dict.fromkeys(f.understood for f in QUANT_FORMATS.values()))


def formats_of(config: Mapping[str, Any], where: Any) -> list[QuantFormat]:
    """The formats that claim the description in the parsed config.json at `where`; empty for a plain model.

    Raises `InputError` for a description that no format claims.
    """
    field = quantization_field(config)
    if field is None:
        return []
    quant = config[field]
    if not isinstance(quant, dict):
        raise InputError(f"{where}: {field} is {quant!r}, not a table; {understood()}. {ADVICE}")
    found = [f for f in QUANT_FORMATS.values() if f.claims(quant)]
    if not found:
        method = str(quant.get("quant_method")).lower()
        raise InputError(f"{where}: {field}: quant_method is '{method}'; {understood()}. {ADVICE}")
    return found


def quantized_tensors(checkpoint: Checkpoint) -> dict[str, QuantizedTensor]:
    """Find the quantized weights of a checkpoint, by key; empty for a plain checkpoint.

    Raises `InputError` with the name of the tensor where it is not certain how to decode one.
    """
    formats = formats_of(checkpoint.config, checkpoint.folder / "config.json")
    # Without a description every format is asked, so that one can refuse codes that lack their description.
    asked = formats or QUANT_FORMATS.values()
    result: dict[str, QuantizedTensor] = {}
    for find in dict.fromkeys(f.find for f in asked):
        result |= find(checkpoint)
    return result


def edit_config(
    config: Mapping[str, Any], dequantized: Collection[str], quantized: Mapping[str, QuantizedTensor]
) -> dict[str, Any]:
    """Return a copy of config.json for a checkpoint in which the weights `dequantized` (keys) left their format.

    `quantized` are all weights that were quantized before.  Their format edits its own description.
    """
    formats = dict.fromkeys(tensor.format for tensor in quantized.values())
    if not dequantized or not formats:
        return dict(config)
    return next(iter(formats)).edit_config(config, dequantized, quantized.keys())


def dequantize_fused_group(arch: Architecture, quantized: Collection[str], touched: Collection[str]) -> set[str]:
    """The quantized weights that must leave their format together with those among `touched`.

    vLLM makes one layer, which needs one precision, of q_a_proj and kv_a_proj_with_mqa, of gate_proj and up_proj, and
    of all routed experts of a block.  `quantized` are the keys of all quantized weights; other keys of `touched` are
    left out of the result.
    """
    all_quantized = set(quantized)
    layers: dict[tuple[str, str], set[str]] = {}
    for site in arch.stored_sites:
        if site.role in FUSED_LAYERS:
            layer = layers.setdefault((site.path.rpartition(".")[0], FUSED_LAYERS[site.role]), set())
            # Experts may lie on disk one by one or as one stack.
            layer.update(key for key in (*site.disk_keys(), site.path) if key in all_quantized)
    dequantized = all_quantized.intersection(touched)
    return dequantized.union(*(layer for layer in layers.values() if not layer.isdisjoint(dequantized)))


def ignored_modules(quant: Mapping[str, Any]) -> list[str]:
    """The modules that a description of quantized weights leaves out, from all lists that it may have.

    An entry is a module's full name or, with `re:` before it, a pattern.
    """
    lists = (quant.get(name) or [] for name in ("modules_to_not_convert", "ignored_layers", "ignore"))
    return [entry for entries in lists for entry in entries]


def module_of(key: str) -> str:
    """The module of a weight in transformers and vLLM; for a routed expert the module of all experts of the block."""
    expert = _EXPERT.fullmatch(key)
    return expert[1] if expert else key.removesuffix(".weight")


def joined(old: Iterable[str] | None, new: Iterable[str]) -> list[str]:
    """The entries of a list in config.json, which may be missing, and new ones after them, without repetitions."""
    return list(dict.fromkeys([*(old or ()), *new]))
