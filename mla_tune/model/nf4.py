"""NF4: the frozen matrices of a plain checkpoint in 4 bits, made when they are read (QLoRA, arXiv:2305.14314).

bitsandbytes does the arithmetic: 64 numbers share a scale, 256 scales share another (double quantisation), which makes
0.516 bytes a weight.  Its own layer covers `nn.Linear` only; routed experts are one stack of matrices in transformers,
and 97 % of the weights of a DeepSeek-V3, so both are kept the same way here: `Nf4Matrix`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mla_tune.arch.roles import ADAPTABLE
from mla_tune.arch.site import Architecture
from mla_tune.model.frozen import Matrix, check_experts, freeze, stand_in

METHOD = "mla_tune_nf4"
#: Numbers that share a scale, and scales that share one.
BLOCK, OUTER = 64, 256


class Nf4Matrix(Matrix):
    """Codes uint8 (E, ⌈out·in/2⌉), two numbers a byte; scales of blocks uint8 (E, ⌈out·in/64⌉), whose own scales are
    float32 (E, ⌈…/256⌉) and mean float32 (E,).  E is 1 for a single matrix."""

    codes: torch.Tensor
    scales: torch.Tensor
    outer: torch.Tensor
    mean: torch.Tensor
    table: torch.Tensor
    outer_table: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        """Quantise `weight` (out, in) or (E, out, in), a matrix at a time, on the device where it is."""
        super().__init__()
        from bitsandbytes.functional import quantize_4bit

        self.shape = tuple(weight.shape)
        parts: list[tuple[torch.Tensor, ...]] = []
        state: Any = None
        for matrix in weight.detach().reshape(-1, *self.shape[-2:]):
            codes, state = quantize_4bit(matrix, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
            parts.append((codes.flatten(), state.absmax, state.state2.absmax, state.offset.reshape(())))
        for name, pieces in zip(("codes", "scales", "outer", "mean"), zip(*parts, strict=True), strict=True):
            self.register_buffer(name, torch.stack(pieces))
        self.register_buffer("table", state.code)
        self.register_buffer("outer_table", state.state2.code)

    def numbers(self, dtype: torch.dtype, expert: int | None = None) -> torch.Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        i = expert or 0
        outer = QuantState(absmax=self.outer[i], code=self.outer_table, blocksize=OUTER, dtype=torch.float32)
        state = QuantState(
            absmax=self.scales[i],
            shape=torch.Size(self.shape[-2:]),
            code=self.table,
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=self.mean[i],
            state2=outer,
        )
        return dequantize_4bit(self.codes[i].unsqueeze(1), state)


def parameters(arch: Architecture) -> frozenset[str]:
    """The parameters that are kept in NF4: all matrices that an adapter may sit on.  Not embeddings, head, routers and
    norms, and not an indexer, whose choice of keys a rounding would change."""
    return frozenset(site.parameter for site in arch if site.role in ADAPTABLE)


class Nf4Config(QuantizationConfigMixin):
    """What the loader below needs to know."""

    def __init__(self, parameters: frozenset[str]) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.parameters = parameters


@register_quantizer(METHOD)
class Nf4Loader(HfQuantizer):
    """Quantises each parameter as soon as transformers has read (for experts: stacked) it."""

    quantization_config: Any

    def _process_model_before_weight_loading(self, model: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        self.dtype = dtype or torch.get_default_dtype()
        self.made: dict[str, Nf4Matrix] = {}
        for parameter in self.quantization_config.parameters:
            path, _, name = parameter.rpartition(".")
            if name != "weight":
                check_experts(model.get_submodule(path), parameter)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.quantization_config.parameters

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantise(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for parameter, matrix in self.made.items():
            path, _, name = parameter.rpartition(".")
            freeze(model.get_submodule(path), name, matrix, self.dtype)
        return model

    def is_serializable(self) -> Any:
        return False

    @property
    def is_trainable(self) -> Any:
        return True


class _Quantise(ConversionOps):
    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        result = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            self.loader.made[name] = Nf4Matrix(weight)
            result[name] = stand_in(tuple(weight.shape), self.loader.dtype, weight.device)
        return result
