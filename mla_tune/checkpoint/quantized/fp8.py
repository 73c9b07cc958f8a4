"""FP8 weights: which tensors are codes, where their scales lie, and codes ↔ numbers, in numpy.

    weight[i, j] = code[i, j] * scale[i // bh, j // bw]        bh, bw: rows and columns of a block

The name `weight_scale_inv` of DeepSeek's checkpoints notwithstanding, its scales multiply codes (DeepSeek-V3,
inference/kernel.py, weight_dequant).  The last block of a row or column may be smaller: 576 rows in blocks of 128 have
5 rows of scales.  Block sizes are those that config.json declares; a size that fits the shapes is not always the right
one (576 rows and 5 scales fit blocks of 116 just as well).
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

SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
#: Smallest scale that is written: 1 / it and its relative precision are still good in each dtype.
_SMALLEST = {"F32": 2.0**-126, "BF16": 2.0**-126, "F16": 2.0**-20, "F8_E8M0": 2.0**-126}
#: Endings of tensors that belong to other ways of quantizing.
_FOREIGN = {
    "weight_packed": "packed integers",
    "qweight": "packed integers",
    "weight_zero_point": "a zero point",
    "qzeros": "zero points",
    "weight_g_idx": "columns in another order",
    "g_idx": "columns in another order",
}
#: Tensors that only an FP8 layer reads: scales of its activations.
_ACTIVATION_SCALES = ("input_scale", "activation_scale")


def fp8_weights(checkpoint: Checkpoint) -> dict[str, QuantizedTensor]:
    """The FP8 weights of a checkpoint by key, in its order, from headers and config.json; empty for a plain one.

    Raises `InputError`, which names the tensor, for whatever can't be turned into numbers for certain.
    """
    where = checkpoint.folder / "config.json"
    schemes = read_schemes(checkpoint.config, where)
    _refuse_foreign(checkpoint)
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
    """All scales of a weight, in the shape of the tensor.  Raises `InputError` unless all are positive and finite."""
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
    """Rows [row0, row0 + n) of a weight: codes (n, in) uint8 → floats (n, in), one rounding each.

    `scales` are all that `read_scales` gave.  `expert` says which of stacked experts the rows belong to.
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
    """Whole blocks of rows of a weight, floats (n, in) → (codes uint8 (n, in), fresh scales in the base's dtype).

    A scale is absmax/448 of its block, or the next power of two up, so that the largest number is the largest code; a
    block of zeros has the scale 1.  The rows begin at the border of a block and end at one or with the matrix; the
    scales are (⌈n/rows⌉, ⌈in/columns⌉).  With one scale for the whole weight the caller gives the weight's `absmax`,
    and the scale has the shape of the base's.  Rounds to the nearest, or stochastically with `rng`.
    Raises `CheckError` where a number is not finite.
    """
    if q.block is None:
        assert absmax is not None, f"{q.codes.key}: one scale for the weight needs its absmax"
        largest = np.full(q.scale.shape, absmax, x.dtype)
    else:
        columns = _reduced(np.abs(x), q.block[1])
        largest = np.maximum.reduceat(columns, np.arange(0, len(x), q.block[0]), axis=0)
    if not np.isfinite(largest).all() or (q.block is None and not np.isfinite(x).all()):
        raise CheckError(f"'{q.codes.key}': a merged weight is NaN or infinite, which has no FP8 code")
    raw, scales = _fresh_scales(largest, q)
    scaled = x.copy()
    if q.block is None:
        scaled /= scales.reshape(()).astype(x.dtype)
    else:
        by_row = np.repeat(scales.astype(x.dtype), q.block[0], axis=0)[: len(x)]
        _by_block(np.divide, scaled, by_row, q.block[1])
    return encode(scaled, CODES, rng), raw


def _fresh_scales(largest: np.ndarray, q: QuantizedTensor) -> tuple[np.ndarray, np.ndarray]:
    """Scales for blocks with these largest magnitudes: (as stored, as float64 numbers)."""
    scales = np.where(largest > 0, np.maximum(largest.astype(np.float64) / E4M3_MAX, _SMALLEST[q.scale.dtype]), 1.0)
    if q.power_of_two:
        mantissa, exponent = np.frexp(scales)
        scales = np.ldexp(1.0, exponent - (mantissa == 0.5))
    raw = encode(np.atleast_1d(scales), q.scale.dtype).reshape(largest.shape)
    return raw, decode(raw, q.scale.dtype, np.float64)


def _by_block(operation: np.ufunc, x: np.ndarray, scales: np.ndarray, columns: int) -> None:
    """x (n, in) ← operation(x, scales (n, ⌈in/columns⌉)) with each scale standing for `columns` columns."""
    whole = x.shape[1] // columns
    head = x[:, : whole * columns].reshape(len(x), whole, columns)  # splitting an axis: a view
    operation(head, scales[:, :whole, None], out=head)
    tail = x[:, whole * columns :]
    operation(tail, scales[:, whole:], out=tail)


def _reduced(x: np.ndarray, columns: int) -> np.ndarray:
    """Largest of each run of `columns` columns: (n, in) → (n, ⌈in/columns⌉)."""
    whole = x.shape[1] // columns
    head = x[:, : whole * columns].reshape(len(x), whole, columns).max(axis=2, initial=0)
    tail = x[:, whole * columns :]
    return np.hstack([head, tail.max(axis=1, keepdims=True)]) if tail.size else head


def _module(key: str) -> str:
    return key.removesuffix(".weight")


def _refuse_foreign(checkpoint: Checkpoint) -> None:
    for key, ref in checkpoint.tensors.items():
        foreign = _FOREIGN.get(key.rpartition(".")[2])
        if foreign:
            raise InputError(f"{ref.file}: '{key}' holds {foreign}; {understood()}. {ADVICE}")
        if ref.dtype[:2] in ("F8", "F6", "F4") and ref.dtype not in (CODES, "F8_E8M0"):
            raise InputError(f"{ref.file}: '{key}' is {ref.dtype}; of these formats only {CODES} is read. {ADVICE}")


def _quantized(checkpoint: Checkpoint, codes: TensorRef, scheme: Scheme) -> QuantizedTensor:
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
    """The block of a weight of this shape, and the shapes that its scale may have."""
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
    """E4M3 codes under the weight's own key, and scales beside them: see the module's docstring."""

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
