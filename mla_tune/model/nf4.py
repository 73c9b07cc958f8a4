"""Quantize the frozen matrices of a plain checkpoint to NF4 while it is read (QLoRA, arXiv:2305.14314).

bitsandbytes does the arithmetic: 64 numbers share a scale, and 256 scales share another (double quantization), which
makes 0.516 bytes a weight.  Its own layer covers `nn.Linear` only.  Routed experts, 97 % of the weights of a
DeepSeek-V3, are one stack of matrices in transformers.  `Nf4Weight` holds either.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from mla_tune.arch.roles import ADAPTABLE
from mla_tune.arch.site import Architecture
from mla_tune.model.quantized_base import QuantizedConfig
from mla_tune.model.quantized_linear import QuantizedWeight, attach_quantized_weight, placeholder

METHOD = "mla_tune_nf4"
#: Numbers that share a scale, and scales that share an outer scale.
BLOCK, OUTER_BLOCK = 64, 256


class Nf4Weight(QuantizedWeight):
    """A matrix, or a stack of E matrices, in NF4 with double quantization; E is 1 for a single matrix."""

    codes: torch.Tensor
    """Codes, two in a byte: uint8 (E, ⌈out·in/2⌉)."""
    scales: torch.Tensor
    """Codes of the blocks' scales: uint8 (E, ⌈out·in/64⌉)."""
    outer: torch.Tensor
    """Scales of the scales: float32 (E, ⌈number of scales/256⌉)."""
    mean: torch.Tensor
    """Mean of the scales, which is subtracted before they are quantized: float32 (E,)."""
    table: torch.Tensor
    """The 16 numbers that the codes stand for."""
    outer_table: torch.Tensor
    """The 256 numbers that the codes of scales stand for."""

    large_buffers = ("codes", "scales")

    def __init__(self, weight: torch.Tensor, device_to_quantize: torch.device | None = None) -> None:
        """Quantize `weight` (out, in) or (E, out, in), a matrix at a time.

        It is quantized on its own device, or on `device_to_quantize` and moved back.  A weight on `meta` gives buffers
        of the right sizes on `meta`.
        """
        super().__init__()
        from bitsandbytes.functional import create_dynamic_map, get_4bit_type, quantize_4bit

        self.shape = tuple(weight.shape)
        parts: list[tuple[torch.Tensor, ...]] = []
        device = weight.device
        for matrix in weight.detach().reshape(-1, *self.shape[-2:]):
            if device.type == "meta":
                parts.append(_sizes(matrix.numel()))
                continue
            codes, state_of = quantize_4bit(
                matrix.to(device_to_quantize or device), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
            )
            state: Any = state_of
            found = (codes.flatten(), state.absmax, state.state2.absmax, state.offset.reshape(()))
            parts.append(tuple(part.to(device) for part in found))
        for name, pieces in zip(("codes", "scales", "outer", "mean"), zip(*parts, strict=True), strict=True):
            self.register_buffer(name, torch.stack(pieces))
        self.register_buffer("table", get_4bit_type("nf4", device="cpu").to(device))
        self.register_buffer("outer_table", create_dynamic_map().to(device))

    def dequantize(self, dtype: torch.dtype, expert: int | None = None) -> torch.Tensor:
        """The numbers (out, in) of one matrix, dequantized by bitsandbytes."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        i, count = expert or 0, len(self.mean)
        outer = QuantState(absmax=self.outer[i], code=self.outer_table, blocksize=OUTER_BLOCK, dtype=torch.float32)
        state = QuantState(
            absmax=self.scales.view(count, -1)[i],
            shape=torch.Size(self.shape[-2:]),
            code=self.table,
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=self.mean[i],
            state2=outer,
        )
        return dequantize_4bit(self.codes.view(count, -1)[i].unsqueeze(1), state)


def _sizes(count: int) -> tuple[torch.Tensor, ...]:
    """Codes, scales, outer scales and mean of `count` numbers, on `meta`."""
    blocks = -(-count // BLOCK)
    sizes = ((-(-count // 2),), (blocks,), (-(-blocks // OUTER_BLOCK),), ())
    kinds = (torch.uint8, torch.uint8, torch.float32, torch.float32)
    return tuple(torch.empty(s, dtype=k, device="meta") for s, k in zip(sizes, kinds, strict=True))


def nf4_parameters(arch: Architecture) -> tuple[str, ...]:
    """The parameters that are quantized to NF4, in the order of the layers: all matrices that an adapter can be on.

    Embeddings, output head, routers and norms keep their dtype, and so does an indexer, whose choice of keys would
    change with rounding.
    """
    return tuple(site.parameter for site in arch if site.role in ADAPTABLE)


class Nf4Config(QuantizedConfig):
    """Says which parameters `Nf4Loader` quantizes, and on which device (None: where they lie)."""

    def __init__(self, parameters: tuple[str, ...], device_to_quantize: torch.device | None = None) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.parameters, self.device_to_quantize = parameters, device_to_quantize

    def empty_weight(self, parameter: str, shape: tuple[int, ...]) -> Nf4Weight:
        """Build the weight of a parameter of this shape, with its tensors on `meta`."""
        return Nf4Weight(torch.empty(shape, device="meta"))


def make_config(arch: Architecture, folder: Path | None, device_to_quantize: torch.device | None) -> Nf4Config:
    """The entry `nf4` of `QUANTIZED_BASES`: quantize all matrices that an adapter can be on."""
    return Nf4Config(nf4_parameters(arch), device_to_quantize)


@register_quantizer(METHOD)
class Nf4Loader(HfQuantizer):
    """Quantizes each parameter as soon as transformers has read it, or for experts stacked it."""

    quantization_config: Any

    def _process_model_before_weight_loading(self, model: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        self.dtype = dtype or torch.get_default_dtype()
        #: Parameter → its quantized weight.
        self.quantized: dict[str, Nf4Weight] = {}
        for parameter in self.quantization_config.parameters:
            self.quantization_config.find_parameter(model, parameter)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter that was read is to be quantized."""
        return param_name in self.quantization_config.parameters

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that quantizes a parameter and returns a placeholder for it."""
        return _Quantize(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for parameter in self.quantization_config.parameters:
            path, _, name = parameter.rpartition(".")
            attach_quantized_weight(model.get_submodule(path), name, self.quantized[parameter], self.dtype)
        return model

    def is_serializable(self) -> Any:
        """False: adapters are saved, never the quantized base."""
        return False

    @property
    def is_trainable(self) -> Any:
        """True: adapters can be trained on such a model."""
        return True


class _Quantize(ConversionOps):
    """Quantizes what transformers' loader has read, for `Nf4Loader`."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        result = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            self.loader.quantized[name] = Nf4Weight(weight, self.loader.quantization_config.device_to_quantize)
            result[name] = placeholder(tuple(weight.shape), self.loader.dtype, weight.device)
        return result
