"""A toy format whose weights have two tensors of scales, as NVFP4's do, is merged with `keep`, verified and compared.

Codes are integers from -7 to 7, two in a byte, even columns in the low half.  A block of 4 columns has an E4M3 scale,
the weight has a global one in float32:

    W[i, j] = code[i, j] · scale[i, j // 4] · global

For `q_a_proj.weight` the keys are `q_a_proj.weight_packed`, `q_a_proj.weight_scale`, `q_a_proj.weight_global_scale`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mla_tune.adapter.merge_options import MergeOptions
from mla_tune.checkpoint.dtypes import decode, encode
from mla_tune.checkpoint.index import Checkpoint
from mla_tune.checkpoint.quantized.base import QuantFormat, QuantizedTensor
from mla_tune.checkpoint.tensor_io import read_float
from mla_tune.merge import apply
from mla_tune.merge.run import merge_absorb
from mla_tune.sockets import QUANT_FORMATS
from mla_tune.verification.decoders import DECODERS, Decoder
from mla_tune.verification.read import read_tensor
from mla_tune.verification.verify import verify
from tests.helpers.merging import delta_of, make_adapter, make_base

NAME, BLOCK, LARGEST, E4M3_MAX = "toy-int4", 4, 7, 448.0
#: Endings of the three tensors of a weight.
ENDINGS = CODES, SCALE, GLOBAL = "_packed", "_scale", "_global_scale"
#: Matrices with a number of columns that blocks divide; the adapter is on the second and the third.
MATRICES = ("q_a_proj", "q_b_proj", "kv_b_proj", "kv_a_proj_with_mqa")
CHANGED = ("q_b_proj", "kv_b_proj")


class TwoScales(QuantFormat):
    name, title, kind, understood, bytes_per_weight = NAME, "INT4", "int4", "quant_method 'toy'", 0.75

    def claims(self, quant: Mapping[str, Any]) -> bool:
        return quant.get("quant_method") == "toy"

    def find(self, checkpoint: Checkpoint) -> dict[str, QuantizedTensor]:
        tensors = checkpoint.tensors
        keys = [key.removesuffix(CODES) for key in tensors if key.endswith(CODES)]
        return {
            key: QuantizedTensor(
                format=self,
                codes=tensors[key + CODES],
                scales=(tensors[key + SCALE], tensors[key + GLOBAL]),
                block=(1, BLOCK),
                weight_key=key,
                weight_shape=(tensors[key + CODES].shape[0], 2 * tensors[key + CODES].shape[1]),
            )
            for key in keys
        }

    def read_scales(self, tensor: QuantizedTensor, float_type: type = np.float32) -> np.ndarray:
        block, of_all = (read_float(ref, float_type) for ref in tensor.scales)
        return block * of_all

    def decode(self, codes, scales, tensor, *, row=0, expert=None, float_type=np.float32) -> np.ndarray:
        halves = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1).astype(np.int8)
        numbers = np.where(halves > LARGEST, halves - 16, halves).astype(float_type)
        return numbers * np.repeat(scales[row : row + len(codes)].astype(float_type), BLOCK, axis=1)

    def encode(self, numbers, tensor, *, rng=None, absmax=None) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        assert absmax is not None
        of_all = np.array([absmax / (LARGEST * E4M3_MAX)], np.float32)
        blocks = numbers.reshape(len(numbers), -1, BLOCK)
        wanted = (np.abs(blocks).max(axis=2) / LARGEST / of_all).astype(np.float32)
        nearest = encode(wanted, "F8_E4M3")
        too_small = (decode(nearest, "F8_E4M3") < wanted) & (nearest < 0x7E)
        scales = np.maximum(nearest + too_small, 1).astype(np.uint8)
        units = decode(scales, "F8_E4M3") * of_all
        codes = np.rint(blocks / units[:, :, None]).clip(-LARGEST, LARGEST).astype(np.int8).view(np.uint8)
        codes = codes.reshape(numbers.shape) & 15
        return codes[:, ::2] | codes[:, 1::2] << 4, (scales, of_all)

    def decode_fresh(self, codes, scales, tensor, float_type=np.float32) -> np.ndarray:
        units = decode(scales[0], "F8_E4M3", float_type) * scales[1].astype(float_type)
        return self.decode(codes, units, tensor, float_type=float_type)

    def needs_absmax(self, tensor: QuantizedTensor) -> bool:
        return True  # for the global scale

    def edit_config(
        self, config: Mapping[str, Any], dequantized: Collection[str], quantized: Collection[str]
    ) -> dict[str, Any]:
        ignore = sorted(key.removesuffix(".weight") for key in dequantized)
        return dict(config) | {"quantization_config": {"quant_method": "toy", "ignore": ignore}}


class TwoScalesDecoder(Decoder):
    bits, largest = 4, float(LARGEST)

    def __init__(self, tensor: QuantizedTensor) -> None:
        super().__init__(tensor)
        block, of_all = map(read_tensor, tensor.scales)
        self.scales = block * of_all

    def codes(self, raw: torch.Tensor, rows: int) -> torch.Tensor:
        return unpacked(raw.view(rows, -1))

    def unit(self, begin: int, end: int) -> torch.Tensor:
        return self.scales[begin:end].repeat_interleave(BLOCK, dim=1)

    def nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        return scaled.round().clamp(-LARGEST, LARGEST).to(torch.int8)

    def step(self, scaled: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(scaled)

    def zeros(self) -> torch.Tensor:
        return torch.zeros_like(self.scales)

    def track_largest(self, x: torch.Tensor, seen: torch.Tensor, begin: int, end: int) -> None:
        largest = x.abs().to(seen.dtype).view(len(x), -1, BLOCK).amax(2)
        seen[begin:end] = torch.maximum(seen[begin:end], largest)

    def bad_scales(self, codes: torch.Tensor, sums: torch.Tensor, *, strict: bool) -> str:
        return "has scales that are too large" if strict and bool((codes < LARGEST - 1).any()) else ""


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """(rows, columns / 2) bytes → (rows, columns) integers of -7 to 7."""
    halves = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).to(torch.int8)
    return torch.where(halves > LARGEST, halves - 16, halves)


def numbers_of(tensors: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    """What the three tensors of a weight stand for, in float64."""
    scales = tensors[key + SCALE].double() * tensors[key + GLOBAL].double()
    return unpacked(tensors[key + CODES]).double() * scales.repeat_interleave(BLOCK, dim=1)


def make_quantized(plain: Path, out: Path) -> None:
    """Write `plain` with its attention matrices quantized to `out`, in two files: the scales are in the second."""
    out.mkdir()
    files: dict[str, dict[str, torch.Tensor]] = {"model-1.safetensors": {}, "model-2.safetensors": {}}
    first, second = files.values()
    for key, value in load_file(plain / "model.safetensors").items():
        if key.endswith(tuple(f"{name}.weight" for name in MATRICES)):
            blocks = value.float().view(len(value), -1, BLOCK)
            of_all = blocks.abs().amax() / (LARGEST * E4M3_MAX)
            scales = (blocks.abs().amax(2) / LARGEST / of_all).to(torch.float8_e4m3fn)
            codes = (blocks / (scales.float() * of_all).unsqueeze(2)).round().clamp(-LARGEST, LARGEST)
            codes = codes.to(torch.int8).view(torch.uint8).flatten(1) & 15
            first[key + CODES] = codes[:, ::2] | codes[:, 1::2] << 4
            second[key + SCALE], second[key + GLOBAL] = scales, of_all.reshape(1)
        else:
            first[key] = value
    for name, tensors in files.items():
        save_file(tensors, out / name, {"format": "pt"})
    weight_map = {key: name for name, tensors in files.items() for key in tensors}
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": {"quant_method": "toy"}}
    (out / "config.json").write_text(json.dumps(config))


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint's own files."""
    return load_file(folder / "model-1.safetensors") | load_file(folder / "model-2.safetensors")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The format and its decoder for one test, and blocks so small that every weight is encoded in several calls."""
    monkeypatch.setattr(apply, "_BLOCK", 512)
    with ExitStack() as stack:
        stack.enter_context(QUANT_FORMATS.registered(NAME, TwoScales()))
        stack.enter_context(DECODERS.registered(NAME, TwoScalesDecoder))
        yield


@pytest.fixture
def merge(tmp_path: Path) -> tuple[Path, Path, Path]:
    """(base, adapter, output of `merge-absorb --quantized keep`, which proved it)."""
    plain = make_base(tmp_path / "plain", dtype="bfloat16")
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    make_quantized(plain, base)
    make_adapter(adapter, plain, target_modules=list(CHANGED))
    result = merge_absorb(adapter, base, out, options=MergeOptions(quantized="keep"), logits=False)
    assert result.proof is not None
    assert result.proof["failed"] == 0
    return base, adapter, out


def test_keep_writes_every_tensor_of_scales(merge: tuple[Path, Path, Path]) -> None:
    base, adapter, out = merge
    before, after = load_folder(base), load_folder(out)
    assert before.keys() == after.keys()
    changed = {k.removesuffix(CODES) for k in after if k.endswith(tuple(f"{m}.weight{CODES}" for m in CHANGED))}
    assert len(changed) == 6
    for key in changed:
        right = numbers_of(before, key) + delta_of(adapter, key)
        step = (after[key + SCALE].double() * after[key + GLOBAL].double()).repeat_interleave(BLOCK, dim=1)
        assert bool(((numbers_of(after, key) - right).abs() <= 0.5001 * step).all()), key
        for ending in ENDINGS:
            assert after[key + ending].dtype == before[key + ending].dtype
            assert not torch.equal(after[key + ending].view(torch.uint8), before[key + ending].view(torch.uint8))
    for key in before.keys() - {key + ending for key in changed for ending in ENDINGS}:
        assert torch.equal(after[key].view(torch.uint8), before[key].view(torch.uint8)), key
    assert verify(out, logits=False).holds


@pytest.mark.parametrize("ending", [SCALE, GLOBAL])
@pytest.mark.parametrize("matrix", ["q_b_proj", "q_a_proj"], ids=["changed", "unchanged"])
def test_a_wrong_scale_is_found(merge: tuple[Path, Path, Path], matrix: str, ending: str) -> None:
    file = merge[2] / "model-2.safetensors"
    tensors = load_file(file)
    key = f"model.layers.1.self_attn.{matrix}.weight"
    flat = tensors[key + ending].view(torch.uint8).flatten()
    flat[-1] ^= 8  # a bit of the exponent, of a block's scale or of the global one
    save_file(tensors, file, {"format": "pt"})
    found = verify(merge[2], logits=False)
    assert not found.holds
    # The numbers that a changed weight's scales make are wrong; the bytes of an unchanged weight's scales are.
    wrong = key + (CODES if matrix in CHANGED else ending)
    assert wrong in {failure.key for failure in found.proof.failures}


def test_dequantize_drops_every_tensor_of_scales(tmp_path: Path) -> None:
    plain = make_base(tmp_path / "plain", dtype="bfloat16")
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    make_quantized(plain, base)
    make_adapter(adapter, plain, target_modules=["q_b_proj"])
    result = merge_absorb(adapter, base, out, logits=False)
    assert result.proof is not None
    assert result.proof["failed"] == 0
    before, after = load_folder(base), load_folder(out)
    for key in [k.removesuffix(CODES) for k in before if k.endswith(f"q_b_proj.weight{CODES}")]:
        right = numbers_of(before, key) + delta_of(adapter, key)
        # Half a unit in the last place of bfloat16, and the error of sums in float32.
        assert torch.allclose(after[key].double(), right, rtol=2.0**-8, atol=1e-6), key
        assert not after.keys() & {key + ending for ending in ENDINGS}
