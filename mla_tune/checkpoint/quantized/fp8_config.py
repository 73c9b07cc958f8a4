"""Read and edit what config.json says about FP8 weights: block sizes, and which modules are not quantized.

Two descriptions are understood: `quant_method: fp8` (DeepSeek, transformers' FineGrainedFP8, vLLM) and
`quant_method: compressed-tensors` with 8-bit floats (llm-compressor).  Nothing is inferred from shapes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mla_tune.checkpoint.quantized.config import ADVICE, joined, module_of, quantization_field, understood
from mla_tune.errors import InputError

#: The dtype of the codes.
CODES = "F8_E4M3"
#: What is read here, for error messages.
UNDERSTOOD = (
    "quant_method 'fp8' (E4M3, one scale a block or a tensor) and 'compressed-tensors' (8-bit floats, symmetric, one "
    "scale a tensor, channel or block)"
)
#: Formats of compressed-tensors that store plain E4M3 codes as `weight` and their scales as `weight_scale`.
_PLAIN_FORMATS = ("float-quantized", "naive-quantized")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weights of some modules are stored."""

    strategy: Literal["tensor", "channel", "block"]
    """What has a scale: a whole tensor, a row (output channel), or a block of rows and columns."""
    block: tuple[int, int] | None
    """Rows and columns of a block; None for the other strategies."""
    scale_endings: tuple[str, ...]
    """The key of a scale is the weight's key followed by one of these."""
    power_of_two: bool = False
    """Whether scales are powers of two (UE8M0)."""
    targets: tuple[str, ...] = ()
    """Names of modules, patterns (`re:`) or class names; empty for all modules."""


def read_schemes(config: Mapping[str, Any], where: Path) -> tuple[Scheme, ...]:
    """The schemes that the parsed config.json at `where` declares; empty for a model that is not in FP8.

    Raises `InputError` for settings under which it is not certain how to decode weights.
    """
    field = quantization_field(config)
    if field is None:
        return ()
    quant = config[field]
    if not isinstance(quant, dict):
        raise InputError(f"{where}: {field} is {quant!r}, not a table; {understood()}. {ADVICE}")
    match str(quant.get("quant_method")).lower():
        case "fp8":
            return (_fp8(quant, f"{where}: {field}"),)
        case "compressed-tensors":
            return _compressed_tensors(quant, f"{where}: {field}")
        case _:
            return ()  # another format


def scheme_of(module: str, schemes: Iterable[Scheme], where: Path) -> Scheme:
    """The scheme of one module.

    A scheme that targets the module by name or pattern goes before one for all modules of the class Linear, which all
    matrices here have.  Raises `InputError` where no scheme applies, or several that differ.
    """
    by_name, by_class = [], []
    for scheme in schemes:
        if not scheme.targets or "Linear" in scheme.targets:
            by_class.append(scheme)
        if any(t == module or (t.startswith("re:") and re.match(t[3:], module)) for t in scheme.targets):
            by_name.append(scheme)
    found = by_name or by_class
    if len({(s.strategy, s.block) for s in found}) != 1:
        what = "no group" if not found else f"{len(found)} groups that differ"
        raise InputError(f"{where}: config_groups has {what} for {module}, whose weight is FP8. {ADVICE}")
    return found[0]


def _fp8(quant: Mapping[str, Any], where: str) -> Scheme:
    """The scheme of a description with `quant_method: fp8`."""
    _need(quant, where, "fmt", "e4m3", optional=True)
    _need(quant, where, "expert_dtype", "fp8", optional=True)
    power_of_two = quant.get("scale_fmt") == "ue8m0"
    size = quant.get("weight_block_size")
    if size is None:
        return Scheme("tensor", None, ("_scale_inv", "_scale"), power_of_two)
    return Scheme("block", _block(size, f"{where}: weight_block_size"), ("_scale_inv",), power_of_two)


def _compressed_tensors(quant: Mapping[str, Any], where: str) -> tuple[Scheme, ...]:
    """The schemes of a description with `quant_method: compressed-tensors`, one for each group that has weights."""
    # A delta of the plain weight can't be added to rotated or sparse weights.
    sparsity = quant.get("sparsity_config") or {}
    if quant.get("transform_config") or sparsity.get("format", "dense") != "dense":
        raise InputError(f"{where}: the weights are transformed or sparse, and can't be merged into. {ADVICE}")
    groups = quant.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        raise InputError(f"{where}: config_groups is {groups!r}, not a table of groups; {understood()}. {ADVICE}")
    schemes = []
    for name, group in groups.items():
        at = f"{where}: config_groups.{name}"
        if not group.get("weights"):
            continue
        kind = group.get("format") or quant.get("format")
        if kind not in _PLAIN_FORMATS:
            raise InputError(f"{at}: format is {kind!r}; understood are {', '.join(_PLAIN_FORMATS)}. {ADVICE}")
        schemes.append(_compressed_group(group["weights"], tuple(group.get("targets") or ()), f"{at}.weights"))
    if not schemes:
        raise InputError(f"{where}: config_groups quantizes no weights; {understood()}. {ADVICE}")
    return tuple(schemes)


def _compressed_group(weights: Mapping[str, Any], targets: tuple[str, ...], where: str) -> Scheme:
    """The scheme of one group; `weights` is the group's table of that name."""
    _need(weights, where, "num_bits", 8)
    _need(weights, where, "type", "float")
    _need(weights, where, "symmetric", True, optional=True)
    _need(weights, where, "dynamic", False, optional=True)
    _need(weights, where, "actorder", False, optional=True)
    # As compressed-tensors does where the strategy is left out: no group_size means tensor, -1 means channel.
    strategy = weights.get("strategy") or {None: "tensor", -1: "channel"}.get(weights.get("group_size"), "group")
    if strategy == "block":
        block = _block(weights.get("block_structure"), f"{where}.block_structure")
        return Scheme("block", block, ("_scale",), targets=targets)
    if strategy not in ("tensor", "channel"):
        raise InputError(f"{where}: strategy is '{strategy}'; understood are tensor, channel, block. {ADVICE}")
    return Scheme(strategy, None, ("_scale",), targets=targets)


def _need(table: Mapping[str, Any], where: str, name: str, wanted: Any, *, optional: bool = False) -> None:
    """Raise `InputError` unless a setting has the one value that is read here; `optional`: it may be missing."""
    found = table.get(name)
    found = found.lower() if isinstance(found, str) else found
    if found != wanted and not (optional and found is None):
        raise InputError(f"{where}: {name} is {found!r}, where {wanted!r} is needed; {understood()}. {ADVICE}")


def _block(size: Any, where: str) -> tuple[int, int]:
    """(rows, columns) of a block, from a list or, as old versions wrote it, from a text such as "128x128"."""
    if isinstance(size, str):
        size = [int(n) if n.isdecimal() else n for n in size.split("x")]
    match size:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    raise InputError(f"{where} is {size!r}; the rows and columns of a block are needed, such as [128, 128]. {ADVICE}")


def edit_config(config: Mapping[str, Any], dequantized: Collection[str], quantized: Collection[str]) -> dict[str, Any]:
    """Return a copy of config.json for a checkpoint in which the weights `dequantized` (keys) are not FP8 any more.

    `quantized` are the keys of all weights that were FP8.  Where none is left, the description is removed.  Otherwise
    the modules are listed so that transformers and vLLM both take them for unquantized:

    - `modules_to_not_convert` (or `ignored_layers`, which vLLM reads first and transformers second): vLLM compares full
      names, for a fused layer those of all its parts; transformers takes a name as a pattern from the start up to a dot
      or as an ending.  Routed experts are one module `….mlp.experts` in transformers; vLLM looks for that name inside
      the entries.
    - `ignore` of compressed-tensors: full names, or patterns with `re:`.  vLLM asks for the experts one by one, so a
      pattern stands for all of a block.
    """
    result = deepcopy(dict(config))
    field = quantization_field(config)
    if field is None or not dequantized:
        return result
    quant = result[field]
    # The same table may describe a calibrated KV cache, which stays.
    if set(dequantized) >= set(quantized) and not quant.get("kv_cache_scheme"):
        del result[field]
        return result
    modules = dict.fromkeys(module_of(key) for key in dequantized)
    if quant["quant_method"].lower() == "compressed-tensors":
        entries = [f"re:{re.escape(m)}" if m.endswith(".experts") else m for m in modules]
        quant["ignore"] = joined(quant.get("ignore"), entries)
        return result
    entries = list(modules)
    if "lm_head.weight" not in quantized:
        # transformers takes the output head for unquantized by itself only as long as there is no list.
        entries.append("lm_head")
    if quant.get("ignored_layers"):
        quant["ignored_layers"] = joined(quant["ignored_layers"], entries)
    if quant.get("modules_to_not_convert") is not None or not quant.get("ignored_layers"):
        quant["modules_to_not_convert"] = joined(quant.get("modules_to_not_convert"), entries)
    return result
