"""NF4: the frozen matrices of a plain checkpoint in 4 bits, made when they are read (QLoRA, arXiv:2305.14314).

bitsandbytes does the arithmetic: 64 numbers share a scale, 256 scales share another (double quantization), which makes
0.516 bytes a weight.  Its own layer covers `nn.Linear` only; routed experts are one stack of matrices in transformers,
and 97 % of the weights of a DeepSeek-V3, so both are kept the same way here: `Nf4Weight`.
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
#: Numbers that share a scale, and scales that share one.
BLOCK, OUTER = 64, 256


class Nf4Weight(QuantizedWeight):
    """Codes uint8 (E, ⌈out·in/2⌉), two numbers a byte; scales of blocks uint8 (E, ⌈out·in/64⌉), whose own scales are
    float32 (E, ⌈…/256⌉) and mean float32 (E,).  E is 1 for a single matrix."""

    codes: torch.Tensor
    scales: torch.Tensor
    outer: torch.Tensor
    mean: torch.Tensor
    table: torch.Tensor
    outer_table: torch.Tensor

    large = ("codes", "scales")

    def __init__(self, weight: torch.Tensor, through: torch.device | None = None) -> None:
        """Quantize `weight` (out, in) or (E, out, in), a matrix at a time, on the device where it is or on `through`.

        Of a weight on `meta` there are only the sizes.
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
                matrix.to(through or device), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
            )
            state: Any = state_of
            found = (codes.flatten(), state.absmax, state.state2.absmax, state.offset.reshape(()))
            parts.append(tuple(part.to(device) for part in found))
        for name, pieces in zip(("codes", "scales", "outer", "mean"), zip(*parts, strict=True), strict=True):
            self.register_buffer(name, torch.stack(pieces))
        self.register_buffer("table", get_4bit_type("nf4", device="cpu").to(device))
        self.register_buffer("outer_table", create_dynamic_map().to(device))

    def dequantize(self, dtype: torch.dtype, expert: int | None = None) -> torch.Tensor:
        """The numbers (out, in) of one matrix, as bitsandbytes dequantizes them."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        i, count = expert or 0, len(self.mean)
        outer = QuantState(absmax=self.outer[i], code=self.outer_table, blocksize=OUTER, dtype=torch.float32)
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
    """The tensors that `quantize_4bit` makes of `count` numbers, on `meta`."""
    blocks = -(-count // BLOCK)
    sizes = ((-(-count // 2),), (blocks,), (-(-blocks // OUTER),), ())
    kinds = (torch.uint8, torch.uint8, torch.float32, torch.float32)
    return tuple(torch.empty(s, dtype=k, device="meta") for s, k in zip(sizes, kinds, strict=True))


def parameters(arch: Architecture) -> tuple[str, ...]:
    """The parameters that are kept in NF4, in the order of the layers: all matrices that an adapter may sit on.  Not
    embeddings, head, routers and norms, and not an indexer, whose choice of keys a rounding would change."""
    return tuple(site.parameter for site in arch if site.role in ADAPTABLE)


class Nf4Config(QuantizedConfig):
    """The parameters to quantize and the device that does it, for the loader below."""

    def __init__(self, parameters: tuple[str, ...], through: torch.device | None = None) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.parameters, self.through = parameters, through

    def empty_weight(self, parameter: str, shape: tuple[int, ...]) -> Nf4Weight:
        """Codes and scales of a matrix of this shape, on `meta`."""
        return Nf4Weight(torch.empty(shape, device="meta"))


def make_config(arch: Architecture, folder: Path | None, through: torch.device | None) -> Nf4Config:
    """All matrices that an adapter may sit on, quantized on the device `through` (`QUANTIZED_BASES`)."""
    return Nf4Config(parameters(arch), through)


@register_quantizer(METHOD)
class Nf4Loader(HfQuantizer):
    """Quantizes each parameter as soon as transformers has read (for experts: stacked) it."""

    quantization_config: Any

    def _process_model_before_weight_loading(self, model: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        self.dtype = dtype or torch.get_default_dtype()
        self.made: dict[str, Nf4Weight] = {}
        for parameter in self.quantization_config.parameters:
            self.quantization_config.find_parameter(model, parameter)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter that was read is to be quantized."""
        return param_name in self.quantization_config.parameters

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that quantizes a parameter and leaves a placeholder in its place."""
        return _Quantize(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for parameter in self.quantization_config.parameters:
            matrix = self.made[parameter]
            path, _, name = parameter.rpartition(".")
            attach_quantized_weight(model.get_submodule(path), name, matrix, self.dtype)
        return model

    def is_serializable(self) -> Any:
        """False: adapters are saved, never the base."""
        return False

    @property
    def is_trainable(self) -> Any:
        """True: adapters can be trained on such a model."""
        return True


class _Quantize(ConversionOps):
    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        result = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            self.loader.made[name] = Nf4Weight(weight, self.loader.quantization_config.through)
            result[name] = placeholder(tuple(weight.shape), self.loader.dtype, weight.device)
        return result
