"""Bases whose matrices stay quantized in memory while adapters are trained on them: what each format must provide.

    QuantizedConfig    which parameters of a model stay quantized, and the class of weight that replaces each
    MakeConfig         the function of a format that makes a `QuantizedConfig` for one base

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
    """What transformers' loader is given: `quant_method` names the `HfQuantizer` that reads or makes the codes."""

    #: The parameters that stay quantized, in the order of the layers.
    parameters: tuple[str, ...]

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
        """A weight of this shape, (out, in) or (E, out, in), with its tensors on `meta`."""
        raise NotImplementedError


#: (architecture, folder of the base, device on which numbers are quantized or None for the one they lie on) → config.
#: The folder is None for a plain base that is no folder.  Raises `InputError` for a base that can't stay quantized.
MakeConfig = Callable[[Architecture, "Path | None", "torch.device | None"], QuantizedConfig]


def put_empty(model: Any, config: QuantizedConfig, dtype: torch.dtype) -> None:
    """Give a model weights without numbers, on `meta`: another process reads them."""
    for parameter in config.parameters:
        module, name = config.find_parameter(model, parameter)
        weight = config.empty_weight(parameter, tuple(getattr(module, name).shape))
        attach_quantized_weight(module, name, weight, dtype)
