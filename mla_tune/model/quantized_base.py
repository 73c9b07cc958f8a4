"""What a format must provide so that a base model can stay in it, in memory, while adapters are trained on it.

    QuantizedConfig    says which parameters of the model stay quantized, and builds their weights
    MakeConfig         the function of a format that makes the `QuantizedConfig` of a base

`sockets.QUANTIZED_BASES` lists the formats; `checkpoint.quantized.config.format_in_memory` picks the one of a base.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from mla_tune.arch.site import Architecture
from mla_tune.model.quantized_linear import QuantizedWeight, attach_quantized_weight, check_experts


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


def attach_empty_weights(model: Any, config: QuantizedConfig, dtype: torch.dtype) -> None:
    """Attach quantized weights without numbers, on `meta`, to a model whose numbers another process reads."""
    for parameter in config.parameters:
        module, name = config.find_parameter(model, parameter)
        weight = config.empty_weight(parameter, tuple(getattr(module, name).shape))
        attach_quantized_weight(module, name, weight, dtype)
