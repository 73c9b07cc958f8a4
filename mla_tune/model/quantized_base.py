"""The table of formats that a base model can keep in memory, and which of them a base has.

    QUANTIZED_BASES    name of a format → the function that makes the `QuantizedConfig` of a base
    QuantizedConfig    says which parameters of the model stay quantized, and builds their weights

A format of a checkpoint has its name in `sockets.QUANT_FORMATS`.  `nf4` is not one of these: a plain checkpoint is
quantized to NF4 while it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.quantized.config import formats_of
from mla_tune.errors import InputError
from mla_tune.model.quantized_linear import QuantizedWeight, attach_quantized_weight, check_experts
from mla_tune.registry import Registry


class QuantizedConfig(QuantizationConfigMixin):
    """The quantization config for transformers' loader: `quant_method` names the `HfQuantizer` that loads the codes."""

    parameters: tuple[str, ...]
    """The parameters that stay quantized, in the order of the layers."""

    def find_parameter(self, model: Any, parameter: str) -> tuple[Any, str]:
        """The module of a parameter, and the parameter's name in it.

        Raises `InputError` for experts that can't be computed with quantized weights.
        """
        path, _, name = parameter.rpartition(".")
        module = model.get_submodule(path)
        if name != "weight":
            check_experts(module, parameter)
        return module, name

    def empty_weight(self, parameter: str, shape: tuple[int, ...]) -> QuantizedWeight:
        """Build the weight of a parameter of this shape, (out, in) or (E, out, in), with its tensors on `meta`."""
        raise NotImplementedError


#: (architecture, folder of the base, device that quantizes) → config.  The folder is None for a plain base with a hub
#: id.  The device is None where numbers are quantized on the device on which they lie.  Raises `InputError` for a base
#: that can't stay quantized.
MakeConfig = Callable[[Architecture, "Path | None", "torch.device | None"], QuantizedConfig]
#: The formats that models can keep in memory.
QUANTIZED_BASES: Registry[MakeConfig] = Registry(
    "format for a base that stays quantized in memory",
    {
        "fp8-block": "mla_tune.model.fp8:make_config",
        "fp8-tensor": "mla_tune.model.fp8:make_config",
        "nf4": "mla_tune.model.nf4:make_config",
    },
)


def format_in_memory(config: Mapping[str, Any], quantize: str, where: Any) -> str:
    """The name in `QUANTIZED_BASES` of the format in which a base with this config.json (at `where`) stays in memory.

    A plain base takes `quantize`, which is `model.quantize` of the recipe.  Raises `InputError` for a format on disk
    that is not known or that models can't keep in memory, and where several formats claim the checkpoint that are not
    loaded alike.
    """
    formats = formats_of(config, where)
    if not formats:
        return quantize
    unsupported = next((f for f in formats if f.name not in QUANTIZED_BASES), None)
    if unsupported is not None:
        raise InputError(
            f"{where}: weights in {unsupported.title} can be merged into, but a model can't keep them in memory; "
            "train on the bfloat16 checkpoint"
        )
    if len({QUANTIZED_BASES.get(f.name) for f in formats}) > 1:
        titles = " and ".join(dict.fromkeys(f.title for f in formats))
        raise InputError(
            f"{where}: the weights are in {titles}, which a model can't keep in memory side by side; "
            "train on the bfloat16 checkpoint"
        )
    return formats[0].name


def attach_empty_weights(model: Any, config: QuantizedConfig, dtype: torch.dtype) -> None:
    """Attach quantized weights without numbers, on `meta`, to a model whose numbers another process reads."""
    for parameter in config.parameters:
        module, name = config.find_parameter(model, parameter)
        weight = config.empty_weight(parameter, tuple(getattr(module, name).shape))
        attach_quantized_weight(module, name, weight, dtype)
