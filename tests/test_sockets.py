"""The sockets are sockets: a quantization format that exists in this file alone is merged, verified and compared.

(A toy objective is in tests/training/test_toy_objective.py.)  The format: int8 codes and one float32 scale a row, under
names of their own: `X.weight_q8`, `X.weight_q8_scale`.
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
from mla_tune.arch.build import architecture
from mla_tune.checkpoint.index import Checkpoint
from mla_tune.checkpoint.quantized.base import QuantFormat, QuantizedTensor
from mla_tune.checkpoint.tensor_io import read_raw
from mla_tune.errors import InputError
from mla_tune.merge.run import merge_absorb
from mla_tune.serving.compatibility import check_compatibility
from mla_tune.serving.engines import find_engine
from mla_tune.sockets import QUANT_FORMATS
from mla_tune.verification.decoders import DECODERS, Decoder
from mla_tune.verification.read import read_tensor
from mla_tune.verification.verify import verify
from tests.helpers.merging import delta_of, make_adapter, make_base

CODES, SCALE = "_q8", "_q8_scale"


class ToyFormat(QuantFormat):
    name, title, kind, understood, bytes_per_weight = "toy-int8", "INT8", "int8", "quant_method 'toy'", 1.0

    def claims(self, quant: Mapping[str, Any]) -> bool:
        return quant.get("quant_method") == "toy"

    def find(self, checkpoint: Checkpoint) -> dict[str, QuantizedTensor]:
        tensors = checkpoint.tensors
        return {
            key.removesuffix(CODES): QuantizedTensor(
                format=self,
                codes=ref,
                scales=(tensors[key + "_scale"],),
                block=(1, ref.shape[-1]),
                weight_key=key.removesuffix(CODES),
            )
            for key, ref in tensors.items()
            if key.endswith(CODES)
        }

    def read_scales(self, tensor: QuantizedTensor, float_type: type = np.float32) -> np.ndarray:
        return read_raw(tensor.scale).astype(float_type)

    def decode(self, codes, scales, tensor, *, row=0, expert=None, float_type=np.float32) -> np.ndarray:
        return codes.astype(float_type) * scales[row : row + len(codes)].astype(float_type)

    def encode(self, numbers, tensor, *, rng=None, absmax=None) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        scales = (np.abs(numbers).max(axis=1, keepdims=True) / 127).astype(np.float32)
        return np.rint(numbers / scales).astype(np.int8), (scales,)

    def decode_fresh(self, codes, scales, tensor, float_type=np.float32) -> np.ndarray:
        return self.decode(codes, scales[0], tensor, float_type=float_type)

    def edit_config(
        self, config: Mapping[str, Any], dequantized: Collection[str], quantized: Collection[str]
    ) -> dict[str, Any]:
        left = set(quantized) - set(dequantized)
        plain = {k: v for k, v in config.items() if k != "quantization_config"}
        ignore = sorted(key.removesuffix(".weight") for key in dequantized)
        return plain | ({"quantization_config": {"quant_method": "toy", "ignore": ignore}} if left else {})


class ToyDecoder(Decoder):
    bits, largest = 8, 127.0

    def __init__(self, tensor: QuantizedTensor) -> None:
        super().__init__(tensor)
        self.scales = read_tensor(tensor.scale)

    def codes(self, raw: torch.Tensor, rows: int) -> torch.Tensor:
        return raw.view(torch.int8).view(rows, -1)

    def unit(self, begin: int, end: int) -> torch.Tensor:
        return self.scales[begin:end].expand(end - begin, self.shape[-1])

    def nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        return scaled.round().clamp(-127, 127).to(torch.int8)

    def step(self, scaled: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(scaled)

    def zeros(self) -> torch.Tensor:
        return torch.zeros_like(self.scales)

    def track_largest(self, x: torch.Tensor, largest: torch.Tensor, begin: int, end: int) -> None:
        rows = largest[begin:end]
        largest[begin:end] = torch.maximum(rows, x.abs().to(rows.dtype).amax(1, keepdim=True))

    def bad_scales(self, codes: torch.Tensor, sums: torch.Tensor, *, strict: bool) -> str:
        return "" if bool((codes >= 126).all()) or not strict else "has scales that are too large"


@pytest.fixture
def toy() -> Iterator[ToyFormat]:
    """The format and its decoder, registered for one test."""
    with ExitStack() as stack:
        format_ = ToyFormat()
        stack.enter_context(QUANT_FORMATS.registered("toy-int8", format_))
        stack.enter_context(DECODERS.registered("toy-int8", ToyDecoder))
        yield format_


MATRICES = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


def make_toy(plain: Path, out: Path, matrices: tuple[str, ...] = MATRICES) -> dict[str, torch.Tensor]:
    """Write `plain` with these attention matrices in int8 to `out`; returns the numbers that the codes stand for."""
    out.mkdir()
    tensors, numbers = {}, {}
    for key, value in load_file(plain / "model.safetensors").items():
        numbers[key] = value.float()
        if key.endswith(tuple(f"{name}.weight" for name in matrices)):
            scale = value.float().abs().amax(1, keepdim=True) / 127
            codes = (value.float() / scale).round().to(torch.int8)
            tensors[key + CODES], tensors[key + SCALE] = codes, scale
            numbers[key] = codes.float() * scale
        else:
            tensors[key] = value
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": {"quant_method": "toy"}}
    (out / "config.json").write_text(json.dumps(config))
    return numbers


@pytest.mark.parametrize("quantized", ["dequantize", "keep"])
def test_a_registered_format_is_merged_and_verified(toy: ToyFormat, quantized: str, tmp_path: Path) -> None:
    plain = make_base(tmp_path / "plain", dtype="bfloat16")
    numbers = make_toy(plain, tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", plain, target_modules=["q_b_proj", "kv_b_proj", "o_proj"])
    options = MergeOptions(quantized=quantized)
    result = merge_absorb(adapter, tmp_path / "base", tmp_path / "out", options=options)
    assert result.proof is not None
    assert result.proof["failed"] == 0
    assert result.logits is not None
    assert result.logits["ran"], result.logits["reason"]
    assert result.logits["merged"]["max_error"] < (0.2 if quantized == "dequantize" else 0.5)

    out = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    changed = [k for k in numbers if k.endswith(("q_b_proj.weight", "kv_b_proj.weight", "o_proj.weight"))]
    assert changed
    for key in changed:
        right = numbers[key].double() + delta_of(adapter, key)
        if quantized == "dequantize":
            assert key + CODES not in out
            assert key + SCALE not in out
            assert torch.equal(out[key], right.float().bfloat16())
        else:
            assert key not in out
            found = out[key + CODES].double() * out[key + SCALE].double()
            assert float((found - right).abs().max()) <= 0.51 * float(out[key + SCALE].max())
    for key, value in base.items():  # what no adapter reaches is the base's, byte for byte
        if not key.startswith(tuple(changed)) and key in out:
            assert torch.equal(out[key].view(torch.uint8), value.view(torch.uint8)), key
    quant = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert quant["quant_method"] == "toy"
    assert verify(tmp_path / "out", logits=False).holds


@pytest.mark.parametrize("quantized", ["dequantize", "keep"])
def test_a_wrong_code_is_found(toy: ToyFormat, quantized: str, tmp_path: Path) -> None:
    plain = make_base(tmp_path / "plain", dtype="bfloat16")
    make_toy(plain, tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", plain, target_modules=["o_proj"])
    merge_absorb(adapter, tmp_path / "base", tmp_path / "out", options=MergeOptions(quantized=quantized), logits=False)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if k.endswith("o_proj.weight" + (CODES if quantized == "keep" else "")))
    tensors[key].view(torch.uint8)[3, 4] ^= 64
    save_file(tensors, file, {"format": "pt"})
    found = verify(tmp_path / "out", logits=False)
    assert not found.holds
    assert key in {failure.key for failure in found.proof.failures}


def test_serve_check_asks_the_format_which_weights_are_quantized(toy: ToyFormat, tmp_path: Path) -> None:
    plain = make_base(tmp_path / "plain", dtype="bfloat16")
    make_toy(plain, tmp_path / "whole")
    make_toy(plain, tmp_path / "mixed", tuple(name for name in MATRICES if name != "q_a_proj"))
    verdicts = {}
    for name in ("whole", "mixed"):
        checkpoint = Checkpoint.open(tmp_path / name)
        report = check_compatibility(find_engine("vllm"), checkpoint, architecture(checkpoint.config))
        verdicts[name] = {check.item.subject: (check.verdict, check.item.count) for check in report.model}
    assert verdicts["whole"]["fused layers"] == ("applied", 0)
    # q_a_proj and kv_a_proj_with_mqa of three layers, of which the second is quantized.
    assert verdicts["mixed"]["fused layers"] == ("refused", 3)
    found = verdicts["mixed"]["plain weights"][1] - verdicts["whole"]["plain weights"][1]
    assert found == 3, "q_a_proj of three layers is plain and not named in config.json"


def test_serve_check_says_nothing_for_certain_of_a_format_that_nobody_reads(tmp_path: Path) -> None:
    make_toy(make_base(tmp_path / "plain", dtype="bfloat16"), tmp_path / "base")
    checkpoint = Checkpoint.open(tmp_path / "base")
    report = check_compatibility(find_engine("vllm"), checkpoint, architecture(checkpoint.config))
    verdicts = {check.item.subject: check.verdict for check in report.model}
    assert verdicts["quantization"] == verdicts["fused layers"] == "unknown"


def test_without_the_format_it_is_refused_by_name(tmp_path: Path) -> None:
    plain = make_base(tmp_path / "plain", dtype="bfloat16")
    make_toy(plain, tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", plain, target_modules=["o_proj"])
    with pytest.raises(InputError, match=r"quant_method is 'toy'; understood are quant_method 'fp8'"):
        merge_absorb(adapter, tmp_path / "base", tmp_path / "out", logits=False)
