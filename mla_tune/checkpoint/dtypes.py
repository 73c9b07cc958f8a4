"""Convert stored codes to floats and back, for dtypes that numpy lacks too (bfloat16, FP8).

Numbers are rounded once, from float32 or float64: to the nearest, ties to the even code (IEEE 754-2019, 4.3.1); or
stochastically, to one of the two neighbors, with probabilities that make the expectation exact.  FP8 follows the OCP
8-bit Floating Point Specification 1.0: E4M3 has no infinity (numbers beyond 448 saturate here, 0x7F is NaN).  E8M0 of
the OCP Microscaling Specification 1.0 is a power of two without a sign, 2^(code - 127).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mla_tune.checkpoint.index import DTYPE_BITS

#: Floating-point dtypes of the safetensors format that unquantized weights may have.
FLOATS = ("F64", "F32", "F16", "BF16")
#: dtype of the safetensors format → numpy dtype of its stored codes: an integer one where numpy lacks the dtype.
STORAGE: dict[str, np.dtype[Any]] = {
    **{name: np.dtype(f"u{bits // 8}") for name, bits in DTYPE_BITS.items() if bits % 8 == 0},
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "C64": np.dtype("<c8"),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "BOOL": np.dtype("?"),
}  # fmt: skip
#: Largest finite E4M3 number.
E4M3_MAX = 448.0


def _fp8_table(mantissa: int, bias: int) -> np.ndarray:
    """The values of the 256 codes of sign, exponent and `mantissa` bits, as if none had a special meaning."""
    code = np.arange(256)
    exponent, fraction = (code & 0x7F) >> mantissa, code & ((1 << mantissa) - 1)
    normal = np.ldexp(1.0 + fraction / (1 << mantissa), exponent - bias)
    tiny = np.ldexp(fraction / (1 << mantissa), 1 - bias)
    return np.where(code & 0x80, -1.0, 1.0) * np.where(exponent, normal, tiny)


def _tables() -> dict[str, np.ndarray]:
    e4m3, e5m2 = _fp8_table(3, 7), _fp8_table(2, 15)
    e4m3[[0x7F, 0xFF]] = np.nan
    e5m2[[0x7C, 0xFC]] = np.inf, -np.inf
    e5m2[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan
    e8m0 = np.ldexp(1.0, np.arange(256) - 127)
    e8m0[255] = np.nan
    return {"F8_E4M3": e4m3, "F8_E5M2": e5m2, "F8_E8M0": e8m0}


_TABLES = {(name, kind): table.astype(kind) for name, table in _tables().items() for kind in (np.float32, np.float64)}
#: The dtypes that `decode` reads.
DECODED = (*FLOATS, "F8_E4M3", "F8_E5M2", "F8_E8M0")


def decode(raw: np.ndarray, dtype: str, float_type: type = np.float32, out: np.ndarray | None = None) -> np.ndarray:
    """Stored codes → floats of `float_type`; exact, except for F64 as float32.

    The result is written into `out` where it is given; for BF16 this works for float32 only.  Raises `KeyError` for a
    dtype that is not in `DECODED`.
    """
    if dtype == "BF16":
        if float_type is np.float32:
            out = np.empty(raw.shape, np.float32) if out is None else out
            np.left_shift(raw, 16, out=out.view(np.uint32), dtype=np.uint32)
            return out
        with np.errstate(invalid="ignore"):  # NaN stays NaN
            return decode(raw, dtype).astype(float_type)
    result = raw.astype(float_type) if dtype in FLOATS else _TABLES[dtype, float_type][raw]
    if out is None:
        return result
    out[...] = result
    return out


def encode(x: np.ndarray, dtype: str, rng: np.random.Generator | None = None) -> np.ndarray:
    """Floats (float32 or float64) → stored codes of BF16, F16, F32, F64, F8_E4M3 or F8_E8M0 (powers of two only).

    Rounds to the nearest, or stochastically with `rng`.  BF16 and F16 overflow to infinity, E4M3 saturates.
    """
    if dtype == "F8_E8M0":
        mantissa, exponent = np.frexp(x)
        assert bool((mantissa == 0.5).all()), "E8M0 holds powers of two only"
        return (exponent + 126).astype(np.uint8)
    nearest = _nearest(x, dtype)
    return nearest if rng is None else _stochastic(x, nearest, dtype, rng)


def _nearest(x: np.ndarray, dtype: str) -> np.ndarray:
    """The nearest code of each number; ties go to the even code."""
    if dtype in ("F16", "F32", "F64"):
        with np.errstate(over="ignore"):
            return x.astype(STORAGE[dtype])
    if x.dtype == np.float64:
        x = _round_to_odd(x)
    if x.ndim == 0:
        return _nearest(x[None], dtype)[0]
    if dtype != "BF16":
        return _nearest_e4m3(x)
    codes = round_bf16(x.copy())
    codes[np.isnan(x)] = 0x7FC0
    return codes


def _round_to_odd(x: np.ndarray) -> np.ndarray:
    """float64 → float32, so that rounding the result again, to a dtype with at least two bits less, is right.

    A number that float32 can't hold becomes the one of its two neighbors whose last bit is odd (Boldo & Melquiond, IEEE
    TC 57(4), 2008).
    """
    with np.errstate(over="ignore", invalid="ignore"):
        y = x.astype(np.float32)
        error = x - y
    bits = y.view(np.uint32)
    even = (error != 0) & (bits & 1 == 0) & np.isfinite(y)
    away = (error > 0) == (x > 0)
    bits[even & away] += 1
    bits[even & ~away] -= 1
    return y


def round_bf16(x: np.ndarray, spare: np.ndarray | None = None, out: np.ndarray | None = None) -> np.ndarray:
    """float32 → codes of BF16, to the nearest.

    `x` is overwritten: after the call `x.view(uint32) & 0xFFFF0000` are the bits of the rounded numbers as float32.
    `spare` is a uint32 array of the shape of `x` to work in, `out` a uint16 array for the result.  A NaN may become
    another number here; `encode` keeps it a NaN.
    """
    bits = x.view(np.uint32)
    tie = np.right_shift(bits, 16, out=spare)
    np.bitwise_and(tie, 1, out=tie)
    np.add(tie, 0x7FFF, out=tie)
    np.add(bits, tie, out=bits)
    codes = bits.view(np.uint16)[..., 1::2]
    if out is None:
        return np.ascontiguousarray(codes)
    out[...] = codes
    return out


def _nearest_e4m3(x: np.ndarray) -> np.ndarray:
    """float32 → nearest codes of E4M3; numbers beyond 448 saturate."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    magnitude = bits & 0x7FFFFFFF
    # Normal numbers: round the mantissa to 3 bits and shift the exponent's bias from 127 to 7.
    normal = magnitude >> 20
    normal &= 1
    normal += magnitude
    normal += 0x7FFFF
    normal >>= 20
    normal -= 120 << 3  # wraps around for numbers below the smallest normal one, for which `tiny` is used instead
    # Subnormal numbers are multiples of 2⁻⁹.  Float32 numbers near 2¹⁴ are that far apart, so adding 2¹⁴ rounds to a
    # multiple of 2⁻⁹, ties to even.
    tiny = (np.minimum(magnitude.view(np.float32), 1.0) + np.float32(2**14)).view(np.uint32) & 0xF
    code = np.where(magnitude < 0x3C800000, tiny, normal)  # 2⁻⁶
    np.minimum(code, 0x7E, out=code)
    code[magnitude > 0x7F800000] = 0x7F
    code |= (bits >> 24) & 0x80
    return code.astype(np.uint8)


def _stochastic(x: np.ndarray, nearest: np.ndarray, dtype: str, rng: np.random.Generator) -> np.ndarray:
    """Move from the nearest code to the neighbor on the other side of x with probability |x - nearest| / gap."""
    kind = np.float64
    code = np.ascontiguousarray(nearest).view(np.dtype(f"u{STORAGE[dtype].itemsize}")).copy()
    value, exact = decode(nearest, dtype, kind), x.astype(kind)
    error = exact - value
    sign = code.dtype.type(1 << (code.dtype.itemsize * 8 - 1))
    away = (error > 0) == (value > 0)  # whether the neighbor has the larger magnitude
    other = np.where(away, code + code.dtype.type(1), code - code.dtype.type(1))
    other = np.where(code & ~sign == 0, np.where(error < 0, sign | 1, 1).astype(code.dtype), other).astype(code.dtype)
    neighbor = decode(other.view(STORAGE[dtype]), dtype, kind)
    with np.errstate(invalid="ignore", divide="ignore"):
        chance = np.where((error != 0) & np.isfinite(neighbor), error / (neighbor - value), 0.0)
    moves = rng.random(x.shape) < chance
    code[moves] = other[moves]
    return code.view(STORAGE[dtype])
