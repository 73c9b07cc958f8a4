"""FP8 weights: find codes and scales, decode rows to numbers, encode numbers.  Everything is numpy.

    weight[i, j] = code[i, j] * scale[i // bh, j // bw]        bh, bw: rows and columns of a block

DeepSeek calls the scales `weight_scale_inv`, yet they multiply codes (DeepSeek-V3, inference/kernel.py,
weight_dequant).  The last block of a row or column may be smaller: 576 rows in blocks of 128 have 5 rows of scales.
Block sizes are taken from config.json, not from shapes, which do not always tell: 576 rows and 5 scales fit blocks of
116 as well.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from mla_tune.checkpoint.dtypes import E4M3_MAX, decode, encode
from mla_tune.checkpoint.index import Checkpoint, TensorRef, nearest
from mla_tune.checkpoint.quantized.base import QuantFormat, QuantizedTensor
from mla_tune.checkpoint.quantized.config import ADVICE, quantization_field, understood
from mla_tune.checkpoint.quantized.fp8_config import (
    CODES,
    UNDERSTOOD,
    Scheme,
    edit_config,
    read_schemes,
    scheme_of,
)
from mla_tune.checkpoint.tensor_io import read_raw
from mla_tune.errors import CheckError, InputError

#: The dtypes that a tensor of scales may have.
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
#: dtype → the smallest scale that is written in it: its reciprocal is finite, and it has full relative precision.
_SMALLEST = {"F32": 2.0**-126, "BF16": 2.0**-126, "F16": 2.0**-20, "F8_E8M0": 2.0**-126}
#: Last part of a key that only other formats have → what such a tensor holds.
_OTHER_FORMATS = {
    "weight_packed": "packed integers",
    "qweight": "packed integers",
    "weight_zero_point": "a zero point",
    "qzeros": "zero points",
    "weight_g_idx": "columns in another order",
    "g_idx": "columns in another order",
}
#: Last part of the keys of an FP8 layer's activation scales, which decoding its weight does not need.
_ACTIVATION_SCALES = ("input_scale", "activation_scale")


def fp8_weights(checkpoint: Checkpoint) -> dict[str, QuantizedTensor]:
    """Find the FP8 weights of a checkpoint, by key, from headers and config.json; empty for a plain checkpoint.

    Raises `InputError` with the name of the tensor where it is not certain how to decode one.
    """
    where = checkpoint.folder / "config.json"
    schemes = read_schemes(checkpoint.config, where)
    _refuse_other_formats(checkpoint)
    codes = [ref for ref in checkpoint.tensors.values() if ref.dtype == CODES]
    if codes and not schemes:
        raise InputError(
            f"{codes[0].file}: '{codes[0].key}' is FP8, but {where} has no quantization_config that says how its "
            f"scales are to be read; {understood()}. {ADVICE}"
        )
    if schemes and not codes:
        raise InputError(
            f"{where}: {quantization_field(checkpoint.config)} says that the weights are quantized, but no tensor is "
            f"{CODES}: weights and configuration are of different models, or the entry was left over"
        )
    result = {ref.key: _quantized(checkpoint, ref, scheme_of(_module(ref.key), schemes, where)) for ref in codes}
    used = {q.scale.key for q in result.values()}
    for key, ref in checkpoint.tensors.items():
        if key.endswith(("_scale_inv", ".weight_scale")) and key not in used:
            raise InputError(
                f"{ref.file}: '{key}' is a scale without FP8 codes beside it: the weight was converted without its "
                f"scale, or is missing. {ADVICE}"
            )
    return result


def read_scales(q: QuantizedTensor, float_type: type = np.float32) -> np.ndarray:
    """Read all scales of a weight, in their own shape.  Raises `InputError` unless all are positive and finite."""
    scales = np.asarray(decode(read_raw(q.scale), q.scale.dtype, float_type))
    bad = scales[~((scales > 0) & np.isfinite(scales))]
    if bad.size:
        raise InputError(f"{q.scale.file}: '{q.scale.key}' holds {bad[0]}, where scales are positive numbers. {ADVICE}")
    return scales


def dequantize(
    codes: np.ndarray,
    scales: np.ndarray,
    q: QuantizedTensor,
    row0: int = 0,
    float_type: type = np.float32,
    expert: int | None = None,
) -> np.ndarray:
    """Decode rows [row0, row0 + n) of a weight: codes (n, in) uint8 → floats (n, in), each rounded once.

    `scales` is the whole array from `read_scales`; `expert` is the number of the expert among stacked ones.
    """
    result = decode(codes, CODES, float_type)
    scales = scales.astype(float_type, copy=False)
    if q.block is None:
        result *= scales.reshape(())
        return result
    rows, columns = q.block
    if scales.ndim == 3:
        assert expert is not None, q.codes.key
        scales = scales[expert]
    _by_block(np.multiply, result, scales[np.arange(row0, row0 + len(codes)) // rows], columns)
    return result


def requantize(
    x: np.ndarray, q: QuantizedTensor, rng: np.random.Generator | None = None, absmax: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Encode rows of a weight: floats (n, in) → (codes (n, in) uint8, fresh scales in the dtype of the base's scales).

    The rows must begin where a block begins, and end where one or the matrix ends.  A block's scale is its absmax /
    448, so that its largest number becomes the largest code; where scales are powers of two, it is rounded up to one.
    A block of zeros has the scale 1.  The scales have the shape (⌈n/rows⌉, ⌈in/columns⌉).

    With one scale for the whole weight the caller gives the weight's `absmax`, and the scale has the shape of the
    base's.  Codes are rounded to the nearest, or stochastically with `rng`.  Raises `CheckError` where a number is not
    finite.
    """
    if q.block is None:
        assert absmax is not None, f"{q.codes.key}: one scale for the weight needs its absmax"
        largest = np.full(q.scale.shape, absmax, x.dtype)
    else:
        by_row = _block_maxima(np.abs(x), q.block[1])
        largest = np.maximum.reduceat(by_row, np.arange(0, len(x), q.block[0]), axis=0)
    if not np.isfinite(largest).all() or (q.block is None and not np.isfinite(x).all()):
        raise CheckError(f"'{q.codes.key}': a merged weight is NaN or infinite, which has no FP8 code")
    raw, scales = _fresh_scales(largest, q)
    scaled = x.copy()
    if q.block is None:
        scaled /= scales.reshape(()).astype(x.dtype)
    else:
        row_scales = np.repeat(scales.astype(x.dtype), q.block[0], axis=0)[: len(x)]
        _by_block(np.divide, scaled, row_scales, q.block[1])
    return encode(scaled, CODES, rng), raw


def _fresh_scales(largest: np.ndarray, q: QuantizedTensor) -> tuple[np.ndarray, np.ndarray]:
    """Scales of blocks that have these largest magnitudes: (as stored, as float64 numbers)."""
    scales = np.where(largest > 0, np.maximum(largest.astype(np.float64) / E4M3_MAX, _SMALLEST[q.scale.dtype]), 1.0)
    if q.power_of_two:
        mantissa, exponent = np.frexp(scales)
        scales = np.ldexp(1.0, exponent - (mantissa == 0.5))
    raw = encode(np.atleast_1d(scales), q.scale.dtype).reshape(largest.shape)
    return raw, decode(raw, q.scale.dtype, np.float64)


def _by_block(operation: np.ufunc, x: np.ndarray, scales: np.ndarray, columns: int) -> None:
    """Apply `operation` to x (n, in) and scales (n, ⌈in/columns⌉), a scale for each `columns` columns, in place."""
    full = x.shape[1] // columns
    head = x[:, : full * columns].reshape(len(x), full, columns)  # a view: numpy splits an axis without copying
    operation(head, scales[:, :full, None], out=head)
    tail = x[:, full * columns :]
    operation(tail, scales[:, full:], out=tail)


def _block_maxima(x: np.ndarray, columns: int) -> np.ndarray:
    """The largest number of each group of `columns` columns: (n, in) → (n, ⌈in/columns⌉)."""
    full = x.shape[1] // columns
    head = x[:, : full * columns].reshape(len(x), full, columns).max(axis=2, initial=0)
    tail = x[:, full * columns :]
    return np.hstack([head, tail.max(axis=1, keepdims=True)]) if tail.size else head


def _module(key: str) -> str:
    return key.removesuffix(".weight")


def _refuse_other_formats(checkpoint: Checkpoint) -> None:
    """Raise `InputError` for a tensor that belongs to another format."""
    for key, ref in checkpoint.tensors.items():
        content = _OTHER_FORMATS.get(key.rpartition(".")[2])
        if content:
            raise InputError(f"{ref.file}: '{key}' holds {content}; {understood()}. {ADVICE}")
        if ref.dtype[:2] in ("F8", "F6", "F4") and ref.dtype not in (CODES, "F8_E8M0"):
            raise InputError(f"{ref.file}: '{key}' is {ref.dtype}; of these formats only {CODES} is read. {ADVICE}")


def _quantized(checkpoint: Checkpoint, codes: TensorRef, scheme: Scheme) -> QuantizedTensor:
    """The weight that has these codes, with its scale checked against the scheme that config.json declares."""
    names = [codes.key + ending for ending in scheme.scale_endings]
    scale = next((checkpoint.tensors[name] for name in names if name in checkpoint.tensors), None)
    if scale is None:
        raise InputError(
            f"{codes.file}: '{codes.key}' is FP8 without a scale: {' or '.join(map(repr, names))} is missing"
            f"{nearest(names[0], checkpoint.tensors) or '.'} {ADVICE}"
        )
    if scale.dtype not in SCALE_DTYPES:
        raise InputError(
            f"{scale.file}: '{scale.key}' is {scale.dtype}; scales can be {', '.join(SCALE_DTYPES)}. {ADVICE}"
        )
    if len(codes.shape) not in (2, 3) or 0 in codes.shape:
        raise InputError(f"{codes.file}: '{codes.key}' is FP8 {codes.shape}; only matrices are understood. {ADVICE}")
    block, shapes = _layout(codes.shape, scheme)
    if scale.shape not in shapes:
        declared = f"blocks of {scheme.block}" if scheme.block else f"one scale a {scheme.strategy}"
        raise InputError(
            f"{scale.file}: '{scale.key}' is {scale.shape}; with {declared}, as {checkpoint.folder / 'config.json'} "
            f"declares, the scale of '{codes.key}' {codes.shape} would be {' or '.join(map(str, shapes))}. Block sizes "
            f"are not guessed from shapes. {ADVICE}"
        )
    stem = _module(codes.key) + ("." if codes.key.endswith(".weight") else "_")
    extra_keys = tuple(stem + name for name in _ACTIVATION_SCALES if stem + name in checkpoint.tensors)
    return QuantizedTensor(
        format=FP8_TENSOR if block is None else FP8_BLOCK,
        codes=codes,
        scales=(scale,),
        block=block,
        power_of_two=scheme.power_of_two or scale.dtype == "F8_E8M0",
        extra_keys=extra_keys,
    )


def _layout(shape: tuple[int, ...], scheme: Scheme) -> tuple[tuple[int, int] | None, list[tuple[int, ...]]]:
    """(block of a weight of this shape, the shapes that its tensor of scales may have)."""
    *experts, rows, columns = shape
    match scheme.strategy:
        case "tensor" if not experts:
            return None, [(), (1,)]
        case "tensor":
            block = (rows, columns)
        case "channel":
            block = (1, columns)
        case _:
            assert scheme.block is not None
            block = scheme.block
    return block, [(*experts, -(-rows // block[0]), -(-columns // block[1]))]


class _Fp8(QuantFormat):
    """E4M3 codes under the weight's own key, with scales beside them (see the module's docstring)."""

    title = "FP8"
    kind = "fp8"
    dtype_name = "float8_e4m3"
    understood = UNDERSTOOD
    #: A byte for the code, and four for the scale of a block of 128 × 128.
    bytes_per_weight = 1 + 4 / 128**2
    find = staticmethod(fp8_weights)  # type: ignore[assignment]

    def __init__(self, name: str) -> None:
        self.name = name

    def claims(self, quant: Mapping[str, Any]) -> bool:
        return str(quant.get("quant_method")).lower() in ("fp8", "compressed-tensors")

    def check_config(self, config: Mapping[str, Any], where: Any) -> None:
        read_schemes(config, where)

    def read_scales(self, tensor: QuantizedTensor, float_type: type = np.float32) -> np.ndarray:
        return read_scales(tensor, float_type)

    def decode(
        self,
        codes: np.ndarray,
        scales: np.ndarray,
        tensor: QuantizedTensor,
        *,
        row: int = 0,
        expert: int | None = None,
        float_type: type = np.float32,
    ) -> np.ndarray:
        return dequantize(codes, scales, tensor, row, float_type, expert)

    def encode(
        self,
        numbers: np.ndarray,
        tensor: QuantizedTensor,
        *,
        rng: np.random.Generator | None = None,
        absmax: float | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        codes, scales = requantize(numbers, tensor, rng, absmax)
        return codes, (scales,)

    def decode_fresh(
        self, codes: np.ndarray, scales: tuple[np.ndarray, ...], tensor: QuantizedTensor, float_type: type = np.float32
    ) -> np.ndarray:
        return dequantize(codes, decode(scales[0], tensor.scale.dtype, float_type), tensor, 0, float_type)

    def edit_config(
        self, config: Mapping[str, Any], dequantized: Collection[str], quantized: Collection[str]
    ) -> dict[str, Any]:
        return edit_config(config, dequantized, quantized)


#: One scale for each block of rows and columns, or for each row.
FP8_BLOCK = _Fp8("fp8-block")
#: One scale for the whole weight.
FP8_TENSOR = _Fp8("fp8-tensor")
