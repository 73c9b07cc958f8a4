"""Keep a checkpoint in block FP8 in memory as it is (DeepSeek-V3's layout and its relatives).

    weight[i, j] = code[i, j] * scale[i // bh, j // bw]        bh, bw: rows and columns of a block

transformers reads the files and stacks experts.  `Fp8Loader` gives the model parameters of dtype float8_e4m3fn and
their scales, so transformers converts nothing.  (Its own FP8 layers need Triton and a GPU, and quantize activations
too; on a CPU it converts the whole model to bfloat16.)  Which weights are FP8, and in which blocks, is read from
headers and config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.index import Checkpoint
from mla_tune.checkpoint.quantized.base import QuantizedTensor
from mla_tune.checkpoint.quantized.config import quantized_tensors
from mla_tune.errors import InputError
from mla_tune.model.quantized_base import QuantizedConfig
from mla_tune.model.quantized_linear import QuantizedWeight, attach_quantized_weight, check_experts
from mla_tune.tiling import DEQUANTIZED_TILE

METHOD = "mla_tune_fp8"


@dataclass(frozen=True, slots=True)
class ScaleLayout:
    """How the scales of a parameter in memory are arranged."""

    block: tuple[int, int]
    """Rows and columns that share a scale."""
    parts: int = 1
    """Number of matrices stacked in the rows, each with its own blocks: two for gate and up of an expert, because the
    rows of gate need not end where a block does."""

    def scales(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of a parameter with this shape."""
        *experts, rows, columns = shape
        return *experts, self.parts * -(-(rows // self.parts) // self.block[0]), -(-columns // self.block[1])


class Fp8Weight(QuantizedWeight):
    """A matrix, or a stack of matrices, in block FP8."""

    codes: torch.Tensor
    """Codes: float8_e4m3fn (out, in) or (E, out, in)."""
    scales: torch.Tensor
    """Scales: float32, of the shape `ScaleLayout.scales`."""
    large_buffers = ("codes",)

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, layout: ScaleLayout) -> None:
        super().__init__()
        self.shape, self.layout = tuple(codes.shape), layout
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def dequantize(self, dtype: torch.dtype, expert: int | None = None) -> torch.Tensor:
        """code · scale (out, in) of one matrix, computed in float32 and rounded once to `dtype`, a tile at a time."""
        codes, scales = (self.codes, self.scales) if expert is None else (self.codes[expert], self.scales[expert])
        codes = codes.view(torch.float8_e4m3fn).view(self.shape[-2:])
        rows, columns = codes.shape
        part = rows // self.layout.parts
        row = torch.arange(rows, device=codes.device)
        block = row // part * (len(scales) // self.layout.parts) + row % part // self.layout.block[0]
        wide = scales.repeat_interleave(self.layout.block[1], dim=1)[:, :columns]
        result = torch.empty(rows, columns, dtype=dtype, device=codes.device)
        step = max(1, DEQUANTIZED_TILE // columns)
        for i in range(0, rows, step):
            piece = codes[i : i + step].to(torch.float32)
            result[i : i + step] = piece.mul_(wide[block[i : i + step]])
        return result


def scale_layouts(checkpoint: Checkpoint, arch: Architecture) -> dict[str, ScaleLayout]:
    """Parameter of the model → layout of its scales, for every FP8 weight but those of MTP layers, which no model has.

    Raises `InputError` with the name of the tensor for a checkpoint that can't be kept in FP8.
    """
    weights = quantized_tensors(checkpoint)
    found: dict[str, ScaleLayout] = {}
    for site in arch:
        keys = site.disk_keys() if site.is_experts else [f"{site.path}.weight"]
        if site.is_experts and keys[0] not in weights and site.path in weights:
            keys = [site.path]
        quantized = [key for key in keys if key in weights]
        if not quantized:
            continue
        if len(quantized) < len(keys):
            plain = next(key for key in keys if key not in weights)
            raise InputError(
                f"{checkpoint.folder}: '{quantized[0]}' is FP8 and '{plain}' is not, in one stack of experts; train on "
                "the bfloat16 checkpoint"
            )
        parts = site.disk_parts if len(keys) > 1 else 1
        found[site.parameter] = ScaleLayout(_one_block([weights.pop(key) for key in keys]), parts)
    for key, weight in weights.items():
        if not _is_mtp(key, arch):
            found[key] = ScaleLayout(_one_block([weight]))
    return found


def check_scales(checkpoint: Checkpoint) -> None:
    """Read all scales.  Raises `InputError` unless every scale is positive and finite."""
    for weight in quantized_tensors(checkpoint).values():
        weight.format.read_scales(weight)


def _one_block(weights: list[QuantizedTensor]) -> tuple[int, int]:
    """The block of weights that become one parameter.  Raises `InputError` unless all have the same."""
    blocks = {weight.block for weight in weights}
    block = blocks.pop()
    if blocks or block is None:
        first = weights[0].codes
        raise InputError(
            f"{first.file}: '{first.key}' has one scale for the whole weight, or blocks that differ between experts; "
            "only weights with a scale a block or a row are kept in FP8. Train on the bfloat16 checkpoint"
        )
    return block


def _is_mtp(key: str, arch: Architecture) -> bool:
    """Whether a weight belongs to a multi-token-prediction layer, which are numbered after the model's layers."""
    _, found, rest = key.partition(".layers.")
    number = rest.partition(".")[0]
    return bool(found) and number.isdecimal() and int(number) >= arch.num_layers


class Fp8Config(QuantizedConfig):
    """Says which parameters `Fp8Loader` keeps in FP8, and the layout of their scales; `where` is named in messages."""

    def __init__(self, layouts: Mapping[str, ScaleLayout], where: Path) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.parameters = tuple(layouts)
        self.layouts, self.where = dict(layouts), where

    def find_parameter(self, model: Any, parameter: str) -> tuple[Any, str]:
        """The module of a parameter, and the parameter's name in it.

        Raises `InputError` where the model has no such matrix, and for experts that can't have quantized weights.
        """
        path, _, name = parameter.rpartition(".")
        try:
            module = model.get_submodule(path)
        except AttributeError:
            module = None
        if not hasattr(module, name) or not (type(module) is nn.Linear or path.endswith(".experts")):
            raise InputError(
                f"{self.where}: '{parameter}' is FP8, but transformers' model has no linear layer of that name"
            )
        if name != "weight":
            check_experts(module, parameter)
        return module, name

    def empty_weight(self, parameter: str, shape: tuple[int, ...]) -> Fp8Weight:
        """Build the weight of a parameter of this shape, with its tensors on `meta`."""
        layout = self.layouts[parameter]
        codes = torch.empty(shape, dtype=torch.float8_e4m3fn, device="meta")
        scales = torch.empty(layout.scales(shape), dtype=torch.float32, device="meta")
        return Fp8Weight(codes, scales, layout)


def make_config(arch: Architecture, folder: Path | None, device_to_quantize: torch.device | None) -> Fp8Config:
    """The entry `fp8-…` of `QUANTIZED_BASES`: find the FP8 weights of a checkpoint, and check their scales.

    `device_to_quantize` is unused: nothing is quantized here.  Raises `InputError` for a checkpoint that can't be kept
    in FP8.
    """
    assert folder is not None, "codes are read from a folder"
    checkpoint = Checkpoint.open(folder)
    layouts = scale_layouts(checkpoint, arch)
    check_scales(checkpoint)
    return Fp8Config(layouts, folder)


@register_quantizer(METHOD)
class Fp8Loader(HfQuantizer):
    """Gives the model parameters for codes and scales, which transformers fills, and turns them into `Fp8Weight`s."""

    quantization_config: Any
    # Makes transformers stack the experts' scales as it stacks their weights.
    serialized_names = {"weight": ["weight", "weight_scale_inv"]}  # noqa: RUF012 (transformers' name and type)

    def _process_model_before_weight_loading(self, model: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        self.dtype = dtype
        for parameter, layout in self.quantization_config.layouts.items():
            module, name = self.quantization_config.find_parameter(model, parameter)
            shape = tuple(getattr(module, name).shape)
            for suffix, size, kind in (("", shape, torch.float8_e4m3fn), ("_scale_inv", layout.scales(shape), None)):
                empty = torch.empty(size, dtype=kind or torch.float32, device="meta")
                setattr(module, name + suffix, nn.Parameter(empty, requires_grad=False))

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        """Add the renaming of compressed-tensors' scales to transformers' conversions of this family."""
        from transformers.core_model_loading import WeightRenaming

        names = [
            WeightRenaming(source_patterns=r"\.weight_scale$", target_patterns=".weight_scale_inv"),
            WeightRenaming(source_patterns=r"(_proj)_scale$", target_patterns=r"\1_scale_inv"),
        ]
        return names + super().update_weight_conversions(weight_conversions, model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # In the order of the layers, because PEFT wraps a module's parameters in the order in which they were set.
        for parameter, layout in self.quantization_config.layouts.items():
            module, name = self.quantization_config.find_parameter(model, parameter)
            codes, scales = (module._parameters.pop(name + suffix).data for suffix in ("", "_scale_inv"))
            attach_quantized_weight(
                module, name, Fp8Weight(codes, scales, layout), self.dtype or torch.get_default_dtype()
            )
        return model

    def is_serializable(self) -> Any:
        """False: adapters are saved, never the quantized base."""
        return False

    @property
    def is_trainable(self) -> Any:
        """True: adapters can be trained on such a model."""
        return True
