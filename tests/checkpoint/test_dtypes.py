"""Encoding and decoding in numpy, compared with torch's conversions for all codes and for numbers between them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mla_tune.checkpoint.dtypes import E4M3_MAX, STORAGE, decode, encode

TORCH = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
SMALL = [name for name in TORCH if STORAGE[name].itemsize <= 2]


def all_codes(dtype: str) -> np.ndarray:
    width = STORAGE[dtype].itemsize
    return np.arange(256**width, dtype=f"u{width}").view(STORAGE[dtype])


def as_torch(codes: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(codes).view(f"i{codes.dtype.itemsize}")).view(TORCH[dtype])


def torch_codes(x: torch.Tensor, dtype: str) -> np.ndarray:
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[STORAGE[dtype].itemsize]
    return x.to(TORCH[dtype]).view(width).numpy().view(STORAGE[dtype])


@pytest.mark.parametrize("dtype", SMALL)
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_every_code_is_read_as_torch_reads_it(dtype: str, kind: type) -> None:
    codes = all_codes(dtype)
    expected = as_torch(codes, dtype).to(torch.float64).numpy().astype(kind)
    np.testing.assert_array_equal(decode(codes, dtype, kind), expected)


def numbers(dtype: str) -> np.ndarray:
    """Every number of the dtype, all midpoints between neighbors, and the float32 numbers next to both."""
    grid = np.unique(decode(all_codes(dtype), dtype, np.float64))
    grid = grid[np.isfinite(grid)]
    middle = (grid[1:] + grid[:-1]) / 2
    points = np.concatenate([grid, middle]).astype(np.float32)
    return np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))])


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_nearest_as_torch_rounds(dtype: str) -> None:
    special = np.array([np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1e-45, -0.0], np.float32)
    x = np.concatenate([numbers(dtype), special])
    ours = encode(x, dtype)
    theirs = torch_codes(torch.from_numpy(x), dtype)
    same = (ours.view(np.uint16) == theirs.view(np.uint16)) | (np.isnan(decode(ours, dtype)) & np.isnan(x))
    assert same.all(), x[~same][:5]


def test_e4m3_rounds_as_torch_does_and_saturates() -> None:
    x = numbers("F8_E4M3")
    x = x[np.abs(x) <= E4M3_MAX]
    np.testing.assert_array_equal(encode(x, "F8_E4M3"), torch_codes(torch.from_numpy(x), "F8_E4M3"))
    beyond = np.array([449, 500, 1e9, np.inf, -1e9, -np.inf], np.float32)
    assert decode(encode(beyond, "F8_E4M3"), "F8_E4M3").tolist() == [448, 448, 448, 448, -448, -448]
    assert np.isnan(decode(encode(np.array([np.nan], np.float32), "F8_E4M3"), "F8_E4M3")).all()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E4M3"])
def test_float64_is_rounded_once(dtype: str) -> None:
    """Numbers so near a midpoint that rounding to float32 first would give the midpoint, and then the wrong
    neighbor."""
    grid = np.unique(decode(all_codes(dtype), dtype, np.float64))
    grid = grid[np.isfinite(grid)]
    low, high = grid[:-1], grid[1:]
    middle = (low + high) / 2
    middle, low, high = (v[middle != 0] for v in (middle, low, high))
    for side, expected in ((1, high), (-1, low)):
        x = middle + side * np.abs(middle) * 1e-13
        np.testing.assert_array_equal(decode(encode(x, dtype), dtype, np.float64), expected)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E4M3", "F32"])
def test_stochastic_rounding_is_one_of_the_two_neighbors_and_exact_on_average(dtype: str) -> None:
    rng = np.random.default_rng(0)
    for value in (1.003, -1.0471, 3e-4, -2.7e-3, 0.0, 100.3):
        x = np.full(200_000, value, np.float64)
        got = decode(encode(x, dtype, rng), dtype, np.float64)
        found = np.unique(got)
        assert len(found) <= 2
        assert found.min() <= value <= found.max()
        gap = found.max() - found.min()
        assert abs(got.mean() - value) <= 5 * max(gap, 1e-300) / 2 / np.sqrt(len(x))
    exact = decode(all_codes("F8_E4M3"), "F8_E4M3")
    exact = exact[np.isfinite(exact)]
    np.testing.assert_array_equal(decode(encode(exact, dtype, rng), dtype), exact)


def test_e8m0_holds_powers_of_two() -> None:
    x = np.array([1.0, 2.0**-127, 2.0**127, 0.25], np.float32)
    codes = encode(x, "F8_E8M0")
    assert codes.tolist() == [127, 0, 254, 125]
    np.testing.assert_array_equal(decode(codes, "F8_E8M0"), x)
    with pytest.raises(AssertionError):
        encode(np.array([3.0]), "F8_E8M0")
