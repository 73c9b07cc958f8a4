"""FP8 weights: decoding and encoding compared with loops, torch and transformers; refusals; edits of config.json."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import (
    FP8Experts,
    FP8Linear,
    _dequantize_fp8_weight,
    replace_with_fp8_linear,
)
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from mla_tune.arch.build import architecture
from mla_tune.checkpoint.dtypes import decode
from mla_tune.checkpoint.index import Checkpoint, TensorRef
from mla_tune.checkpoint.quantized.base import QuantizedTensor
from mla_tune.checkpoint.quantized.config import dequantize_fused_group, quantized_tensors
from mla_tune.checkpoint.quantized.fp8 import FP8_BLOCK, dequantize, read_scales, requantize
from mla_tune.checkpoint.quantized.fp8_config import edit_config
from mla_tune.checkpoint.tensor_io import read_raw
from mla_tune.errors import CheckError, InputError
from tests.helpers.fp8 import MATRIX, dequantized, make_fp8, quantize
from tests.helpers.merging import edit_json, edit_tensors, make_base

Edit = Callable[[dict[str, torch.Tensor]], Any]
LAYER = "model.layers.1"
KV_A = f"{LAYER}.self_attn.kv_a_proj_with_mqa.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("fp8") / "base", dtype="bfloat16")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("fp8") / "sharded", dtype="bfloat16", shard="60KB")


def reference(shape: tuple[int, ...], dtype: str = "F32", key: str = "x.weight") -> TensorRef:
    return TensorRef(key, Path("model.safetensors"), dtype, shape, 0, 0)


def quantized(
    shape: tuple[int, ...],
    block: tuple[int, int] | None,
    scale_shape: tuple[int, ...] = (),
    dtype: str = "F32",
    power_of_two: bool = False,
) -> QuantizedTensor:
    scale = reference(scale_shape, dtype, "x.weight_scale_inv")
    return QuantizedTensor(FP8_BLOCK, reference(shape, "F8_E4M3"), (scale,), block, power_of_two)


def codes_of(checkpoint: Checkpoint) -> set[str]:
    """Keys of all FP8 weights."""
    return {key for key, ref in checkpoint.tensors.items() if ref.dtype == "F8_E4M3"}


def by_loops(codes: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Decode in a loop: torch's value of each code times the scale of its block, as Python floats."""
    numbers = torch.from_numpy(codes).view(torch.float8_e4m3fn).double().tolist()
    rows, columns = codes.shape
    return np.array(
        [[numbers[i][j] * float(scales[i // block[0], j // block[1]]) for j in range(columns)] for i in range(rows)]
    )


def random_codes(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    codes = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    codes[codes & 0x7F == 0x7F] = 0  # NaN
    return codes


def random_scales(shape: tuple[int, ...], seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(1e-4, 3e-2, shape).astype(np.float32)


# --- codes to numbers -----------------------------------------------------------------------------------------------

BLOCKS = [
    ((8, 8), (4, 4)),
    ((9, 14), (4, 4)),  # ragged both ways, as 576 rows are in blocks of 128
    ((9, 14), (4, 3)),
    ((3, 2), (4, 4)),  # smaller than a block
    ((9, 14), (1, 14)),  # a scale a row
]


@pytest.mark.parametrize("shape, block", BLOCKS)
def test_numbers_equal_those_by_loops(shape: tuple[int, int], block: tuple[int, int]) -> None:
    codes = random_codes(shape)
    scales = random_scales((-(-shape[0] // block[0]), -(-shape[1] // block[1])))
    q, expected = quantized(shape, block, scales.shape), by_loops(codes, scales, block)
    # The product of numbers with 4 and 24 significant bits is exact in float64, and rounded once in float32.
    assert np.array_equal(dequantize(codes, scales, q, float_type=np.float64), expected)
    assert np.array_equal(dequantize(codes, scales, q), expected.astype(np.float32))
    for begin in range(shape[0]):
        for end in range(begin + 1, shape[0] + 1):
            part = dequantize(codes[begin:end], scales, q, begin, np.float64)
            assert np.array_equal(part, expected[begin:end]), (begin, end)


def test_576_rows_in_blocks_of_128_have_five_rows_of_scales() -> None:
    """DeepSeek-V3's shape, whose last block has 64 rows.  Blocks of ⌈576/5⌉ = 116 rows would fit the shapes too."""
    codes, scales = random_codes((576, 130)), random_scales((5, 2))
    ours = dequantize(codes, scales, quantized((576, 130), (128, 128), (5, 2)))
    stored = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    theirs = _dequantize_fp8_weight(stored, torch.from_numpy(scales), [128, 128], torch.float32)
    assert np.array_equal(ours, theirs.numpy())
    assert not np.array_equal(ours, by_loops(codes, scales, (116, 128)).astype(np.float32))


def test_one_scale_for_the_whole_weight() -> None:
    codes, scale = random_codes((5, 6)), np.float32(0.013)
    for stored in (np.array(scale), np.array([scale])):
        ours = dequantize(codes, stored, quantized((5, 6), None, stored.shape), 2, np.float64)
        assert np.array_equal(ours, by_loops(codes, np.full((1, 1), scale), (5, 6)))


VARIANTS: dict[str, dict[str, Any]] = {
    "deepseek": {},
    "deepseek, wide blocks": {"block": (5, 16)},
    "deepseek, one scale a tensor": {"block": None},
    "deepseek, E8M0 scales": {"ue8m0": True, "scale_dtype": "F8_E8M0"},
    "deepseek, powers of two as numbers": {"ue8m0": True},
    "deepseek, some left out": {"skip": ("experts", "layers.2.self_attn")},
    "compressed-tensors, a tensor": {"style": "compressed-tensors", "block": None, "scale_dtype": "BF16"},
    "compressed-tensors, a channel": {"style": "compressed-tensors", "channel": True, "scale_dtype": "F16"},
    "compressed-tensors, a block": {"style": "compressed-tensors", "scale_dtype": "BF16"},
    "compressed-tensors, some left out": {"style": "compressed-tensors", "skip": ("experts",)},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("other_shard", [False, True])
def test_checkpoints_are_read_like_in_torch(variant: str, other_shard: bool, sharded: Path, tmp_path: Path) -> None:
    settings = VARIANTS[variant]
    folder = make_fp8(sharded, tmp_path / "fp8", scales_in_other_shard=other_shard, **settings)
    checkpoint, expected = Checkpoint.open(folder), dequantized(folder)
    found = quantized_tensors(checkpoint)
    wanted = [k for k in expected if MATRIX.fullmatch(k) and not any(s in k for s in settings.get("skip", ()))]
    assert sorted(found) == sorted(wanted)
    assert any(q.scale.file != q.codes.file for q in found.values()) == other_shard
    assert {q.power_of_two for q in found.values()} == {settings.get("ue8m0", False)}
    for key, q in found.items():
        numbers = dequantize(read_raw(q.codes), read_scales(q), q)
        assert np.array_equal(numbers, expected[key].numpy()), key


def test_scales_of_a_single_file_may_lie_in_a_second_one(base: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_fp8(base, tmp_path / "fp8", scales_in_other_shard=True))
    assert all(q.scale.file != q.codes.file for q in quantized_tensors(checkpoint).values())


def test_e8m0_scales_are_powers_of_two_whatever_the_config_says(base: Path, tmp_path: Path) -> None:
    folder = make_fp8(base, tmp_path / "fp8", ue8m0=True, scale_dtype="F8_E8M0")
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    del quantization["scale_fmt"]
    edit_json(folder / "config.json", quantization_config=quantization)
    assert all(q.power_of_two for q in quantized_tensors(Checkpoint.open(folder)).values())


def test_one_scale_may_be_stored_as_a_vector_of_one_and_without_inv(base: Path, tmp_path: Path) -> None:
    """The description that AutoFP8 and vLLM write, and transformers does not."""

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in [k for k in tensors if k.endswith("_scale_inv")]:
            tensors[key.removesuffix("_inv")] = tensors.pop(key).reshape(1)

    folder = make_fp8(base, tmp_path / "fp8", None)
    expected = dequantized(folder)
    edit_tensors(folder / "model.safetensors", rename)
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8", "activation_scheme": "static"})
    q = quantized_tensors(Checkpoint.open(folder))[KV_A]
    assert np.array_equal(dequantize(read_raw(q.codes), read_scales(q), q), expected[KV_A].numpy())


def test_plain_checkpoints_have_none(base: Path) -> None:
    assert quantized_tensors(Checkpoint.open(base)) == {}


@pytest.mark.parametrize("block", [(4, 4), None])
def test_stacked_experts_have_scales_each(block: tuple[int, int] | None, tmp_path: Path) -> None:
    weight = torch.randn(3, 9, 14, generator=torch.Generator().manual_seed(0))
    key = f"{LAYER}.mlp.experts.gate_up_proj"
    folder = make_fp8(plain(tmp_path / "base", {key: weight}), tmp_path / "fp8", block)
    q = quantized_tensors(Checkpoint.open(folder))[key]
    assert q.block == (block or (9, 14))
    codes, scales = read_raw(q.codes), read_scales(q)
    for expert in range(3):
        numbers = dequantize(codes[expert, 2:], scales, q, 2, expert=expert)
        assert np.array_equal(numbers, dequantized(folder)[key][expert, 2:].numpy())


def plain(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "deepseek_v3"}')
    return folder


def test_transformers_reads_the_same_numbers(base: Path, tmp_path: Path) -> None:
    """transformers takes block sizes from shapes on a CPU, so here blocks must divide all shapes."""
    folder = make_fp8(base, tmp_path / "fp8", skip=("kv_a_proj", "kv_b_proj", "o_proj"))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    checkpoint = Checkpoint.open(folder)
    compared = 0
    for key, q in quantized_tensors(checkpoint).items():
        if ".experts." not in key:
            assert np.array_equal(dequantize(read_raw(q.codes), read_scales(q), q), theirs[key].numpy()), key
            compared += 1
    assert compared == 3 * 2 + 3 + 2 * 3  # q_a, q_b; the dense MLP; the shared experts


# --- numbers to codes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape, block", BLOCKS)
def test_codes_and_scales_equal_torchs(shape: Any, block: Any, power_of_two: bool, kind: Any) -> None:
    x = np.random.default_rng(2).normal(0, 0.02, shape).astype(np.float32)
    codes, scales = quantize(torch.from_numpy(x), block, power_of_two)
    q = quantized(shape, block, tuple(scales.shape), power_of_two=power_of_two)
    ours = requantize(x.astype(kind), q)
    assert ours[0].dtype == np.uint8
    assert ours[1].dtype == np.float32
    assert np.array_equal(ours[1], scales.numpy())
    same = ours[0] == codes.view(torch.uint8).numpy()
    # In float64 the quotient is not rounded before it is encoded, so that a tie may have another result.
    assert same.all() if kind is np.float32 else same.mean() > 0.97


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F8_E8M0"])
@pytest.mark.parametrize("size", [1e-4, 1.0, 3e3])
def test_no_number_is_further_off_than_half_a_step(dtype: str, size: float) -> None:
    shape, block = (9, 14), (4, 4)
    x = np.random.default_rng(3).normal(0, size, shape).astype(np.float32)
    q = quantized(shape, block, (3, 4), dtype, power_of_two=dtype == "F8_E8M0")
    codes, raw = requantize(x, q)
    scales = decode(raw, dtype, np.float64)
    numbers = by_loops(codes, scales, block)
    for (i, j), number in np.ndenumerate(x):
        scale = scales[i // block[0], j // block[1]]
        exponent = max(np.floor(np.log2(abs(float(number)) / scale)), -6)
        step = scale * 2.0 ** (min(exponent, 8) - 3)
        assert abs(numbers[i, j] - number) <= step / 2 * (1 + 1e-6), (i, j)


def test_powers_of_two_are_rounded_up_and_exact_ones_kept() -> None:
    x = np.array([[448.0, 0, 449.0, 0, 447.0, 0]], np.float32) / 1024
    codes, raw = requantize(x, quantized((1, 6), (1, 2), (1, 3), "F8_E8M0", True))
    assert decode(raw, "F8_E8M0").tolist() == [[2.0**-10, 2.0**-9, 2.0**-10]]
    # 449/1024 is 224.5 in units of its scale, and the codes there are 16 apart.
    assert by_loops(codes, decode(raw, "F8_E8M0"), (1, 2)).tolist() == [[448 / 1024, 0, 448 / 1024, 0, 448 / 1024, 0]]


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F8_E8M0"])
def test_blocks_of_nothing_stay_finite(dtype: str) -> None:
    x = np.zeros((4, 8), np.float32)
    x[:, 4:] = 1e-44  # absmax / 448 is no float32
    q = quantized((4, 8), (4, 4), (1, 2), dtype, power_of_two=dtype == "F8_E8M0")
    codes, raw = requantize(x, q)
    scales = decode(raw, dtype)
    assert scales[0, 0] == 1
    assert 0 < scales[0, 1] < 1e-5
    assert not codes.any()


def test_rows_in_parts_give_the_codes_of_the_whole() -> None:
    x = np.random.default_rng(4).normal(0, 1, (9, 14)).astype(np.float32)
    q = quantized((9, 14), (4, 4), (3, 4))
    codes, scales = requantize(x, q)
    parts = [requantize(x[a:b], q) for a, b in ((0, 4), (4, 8), (8, 9))]
    assert np.array_equal(np.vstack([c for c, _ in parts]), codes)
    assert np.array_equal(np.vstack([s for _, s in parts]), scales)
    assert x[0, 0] == np.random.default_rng(4).normal(0, 1, (9, 14)).astype(np.float32)[0, 0]  # not overwritten


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_scale_comes_from_the_callers_absmax(shape: tuple[int, ...]) -> None:
    x = np.array([[1.0, -2.0, 9.0]], np.float32)
    codes, scale = requantize(x, quantized((3, 3), None, shape, "BF16"), absmax=7.0)
    assert scale.shape == shape
    number = decode(scale, "BF16").reshape(())
    assert number == 7 / 448
    assert by_loops(codes, np.full((1, 1), number), (1, 3)).tolist() == [[1.0, -2.0, 7.0]]  # 9 saturates


def test_stochastic_rounding_is_seeded_and_right_on_average() -> None:
    x = np.full((200, 400), 0.3, np.float32)
    x[:, 0] = 448  # the scale is 1
    q = quantized(x.shape, x.shape, (1, 1))
    rng = np.random.default_rng
    codes, scales = requantize(x, q, rng(5))
    numbers = dequantize(codes, scales, q)[:, 1:]
    assert set(np.unique(numbers)) == {np.float32(0.28125), np.float32(0.3125)}
    # 79,800 draws of a step of 1/32: standard error 5.5e-5
    assert abs(numbers.mean(dtype=np.float64) - 0.3) < 3e-4
    assert np.array_equal(codes, requantize(x, q, rng(5))[0])
    assert not np.array_equal(codes, requantize(x, q, rng(6))[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("block", [(4, 4), None])
def test_numbers_that_have_no_code_are_an_error(bad: float, block: Any) -> None:
    x = np.ones((8, 8), np.float32)
    x[5, 6] = bad
    with pytest.raises(CheckError, match=r"'x\.weight'.*NaN or infinite"):
        requantize(x, quantized((8, 8), block, (2, 2) if block else ()), absmax=1.0)


# --- what is refused ------------------------------------------------------------------------------------------------


def drop(key: str) -> Edit:
    return lambda tensors: tensors.pop(key)


def put(key: str, value: torch.Tensor) -> Edit:
    return lambda tensors: tensors.update({key: value})


TENSORS = [
    ("without its scale", drop(f"{KV_A}_scale_inv"), f"'{KV_A}' is FP8 without a scale: '{KV_A}_s.*v' is missing"),
    ("scale of a wrong shape", put(f"{KV_A}_scale_inv", torch.ones(8, 12)), r"is \(8, 12\); with blocks .*9, 12"),
    ("scale of integers", put(f"{KV_A}_scale_inv", torch.ones(9, 12, dtype=torch.int32)), "is I32; scales can be F32"),
    ("scale left over", put(KV_A, torch.ones(34, 48)), f"'{KV_A}_scale_inv' is a scale without FP8 codes"),
    ("E5M2", put(KV_A, torch.ones(34, 48).to(torch.float8_e5m2)), f"'{KV_A}' is F8_E5M2"),
    ("vector of codes", put("model.norm.weight", torch.ones(48).to(torch.float8_e4m3fn)), "norm.weight' is FP8 with"),
    ("packed", put("model.x.weight_packed", torch.ones(2, 2, dtype=torch.int32)), "_packed' holds packed integers"),
    ("zero point", put("model.x.weight_zero_point", torch.zeros(1)), "x.weight_zero_point' holds a zero point"),
    ("order of columns", put("model.x.weight_g_idx", torch.zeros(1)), "holds columns in another order"),
]  # fmt: skip


@pytest.mark.parametrize("edit, message", [t[1:] for t in TENSORS], ids=[t[0] for t in TENSORS])
def test_tensors_that_are_not_certain_are_refused(edit: Edit, message: str, base: Path, tmp_path: Path) -> None:
    folder = make_fp8(base, tmp_path / "fp8")
    edit_tensors(folder / "model.safetensors", edit)
    with pytest.raises(InputError, match=message):
        quantized_tensors(Checkpoint.open(folder))


FP8 = {"quant_method": "fp8", "weight_block_size": [4, 4]}
CONFIGS: list[tuple[dict[str, Any] | None, str]] = [
    (None, "is FP8, but .*config.json has no quantization_config"),
    ({"quant_method": "gptq", "bits": 4}, "quant_method is 'gptq'; understood are"),
    ({"quant_method": "awq"}, "quant_method is 'awq'"),
    ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes'"),
    ({"quant_method": "mxfp4"}, "quant_method is 'mxfp4'"),
    ({"bits": 8}, "quant_method is 'none'"),
    (FP8 | {"fmt": "e5m2"}, "fmt is 'e5m2', where 'e4m3' is needed"),
    (FP8 | {"expert_dtype": "fp4"}, "expert_dtype is 'fp4'"),
    (FP8 | {"weight_block_size": [128]}, r"weight_block_size is \[128\]; the rows and columns"),
    (FP8 | {"weight_block_size": [0, 4]}, r"weight_block_size is \[0, 4\]"),
    # Scales of blocks without their size.
    ({"quant_method": "fp8"}, r"is \(\d+, \d+\); with one scale a tensor, .*Block sizes are not guessed"),
    (FP8 | {"weight_block_size": [5, 4]}, r"with blocks of \(5, 4\)"),
]


@pytest.mark.parametrize("quantization, message", CONFIGS)
def test_configs_that_do_not_fit_are_refused(quantization: Any, message: str, base: Path, tmp_path: Path) -> None:
    folder = make_fp8(base, tmp_path / "fp8")
    edit_json(folder / "config.json", quantization_config=quantization)
    with pytest.raises(InputError, match=message):
        quantized_tensors(Checkpoint.open(folder))


def test_a_config_that_says_quantized_where_nothing_is_fp8(base: Path, tmp_path: Path) -> None:
    folder = make_fp8(base, tmp_path / "fp8", skip=("",))
    with pytest.raises(InputError, match="no tensor is F8_E4M3"):
        quantized_tensors(Checkpoint.open(folder))


COMPRESSED: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=4), "num_bits is 4, where 8"),
    (lambda q: q["config_groups"]["group_0"]["weights"].update(type="int"), "type is 'int', where 'float'"),
    (lambda q: q["config_groups"]["group_0"]["weights"].update(symmetric=False), "symmetric is False"),
    (lambda q: q["config_groups"]["group_0"]["weights"].update(dynamic=True), "dynamic is True"),
    (lambda q: q["config_groups"]["group_0"]["weights"].update(actorder="group"), "actorder is 'group'"),
    (lambda q: q["config_groups"]["group_0"]["weights"].update(strategy="group"), "strategy is 'group'"),
    (lambda q: q["config_groups"]["group_0"]["weights"].update(strategy=None, group_size=32), "strategy is 'group'"),
    (lambda q: q["config_groups"]["group_0"]["weights"].update(block_structure=None), "block_structure is None"),
    (lambda q: q["config_groups"]["group_0"].update(weights=None), "quantizes no weights"),
    (lambda q: q["config_groups"]["group_0"].update(targets=["re:.*o_proj"]), "has no group for model.layers"),
    (lambda q: q["config_groups"]["group_0"].update(format="mxfp8-quantized"), "format is 'mxfp8-quantized'"),
    (lambda q: q.update(format="pack-quantized"), "format is 'pack-quantized'"),
    (lambda q: q.update(config_groups=["W8A8"]), "not a table of groups"),
    (lambda q: q.update(transform_config={"config_groups": {"R1": {}}}), "transformed or sparse"),
    (lambda q: q.update(sparsity_config={"format": "sparse-24-bitmask"}), "transformed or sparse"),
]


@pytest.mark.parametrize("edit, message", COMPRESSED)
def test_compressed_tensors_that_are_not_certain(edit: Any, message: str, base: Path, tmp_path: Path) -> None:
    folder = make_fp8(base, tmp_path / "fp8", style="compressed-tensors")
    quantized_tensors(Checkpoint.open(folder))
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit(quantization)
    edit_json(folder / "config.json", quantization_config=quantization)
    with pytest.raises(InputError, match=message):
        quantized_tensors(Checkpoint.open(folder))


def test_groups_are_told_apart_by_name(base: Path, tmp_path: Path) -> None:
    """A target that names modules goes before one with the class Linear; two for the same module must agree."""
    folder = make_fp8(base, tmp_path / "fp8", style="compressed-tensors")
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    groups = quantization["config_groups"]
    other = {"targets": ["Linear"], "weights": groups["group_0"]["weights"] | {"block_structure": [2, 2]}}
    groups["group_0"]["targets"] = [r"re:.*\.(self_attn|mlp)\."]
    edit_json(folder / "config.json", quantization_config=quantization | {"config_groups": groups | {"other": other}})
    assert {q.block for q in quantized_tensors(Checkpoint.open(folder)).values()} == {(4, 4)}
    other["targets"] = ["re:.*o_proj"]
    edit_json(folder / "config.json", quantization_config=quantization | {"config_groups": groups | {"other": other}})
    with pytest.raises(InputError, match=r"has 2 groups that differ for .*o_proj"):
        quantized_tensors(Checkpoint.open(folder))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_are_no_positive_numbers_are_refused_when_read(bad: float, base: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{KV_A}_scale_inv"][3, 5] = bad

    folder = make_fp8(base, tmp_path / "fp8")
    edit_tensors(folder / "model.safetensors", spoil)
    found = quantized_tensors(Checkpoint.open(folder))
    read_scales(found[f"{LAYER}.self_attn.q_a_proj.weight"])
    with pytest.raises(InputError, match=f"'{KV_A}_scale_inv' holds {bad}, where scales are positive"):
        read_scales(found[KV_A])


def test_scales_of_static_activations_belong_to_their_weight(base: Path, tmp_path: Path) -> None:
    found = quantized_tensors(Checkpoint.open(make_fp8(base, tmp_path / "fp8", None, input_scales=True)))
    assert all(q.extra_keys == (key.removesuffix("weight") + "input_scale",) for key, q in found.items())


# --- weights that leave the format together, and config.json then ----------------------------------------------------

ATTENTION = f"{LAYER}.self_attn"
EXPERTS = [f"{LAYER}.mlp.experts.{e}.{p}_proj.weight" for e in range(4) for p in ("gate", "up", "down")]
TOGETHER = [
    ([f"{ATTENTION}.q_a_proj"], [f"{ATTENTION}.q_a_proj", f"{ATTENTION}.kv_a_proj_with_mqa"]),
    ([f"{ATTENTION}.kv_a_proj_with_mqa"], [f"{ATTENTION}.q_a_proj", f"{ATTENTION}.kv_a_proj_with_mqa"]),
    ([f"{ATTENTION}.o_proj", f"{ATTENTION}.kv_b_proj"], [f"{ATTENTION}.o_proj", f"{ATTENTION}.kv_b_proj"]),
    (["model.layers.0.mlp.up_proj"], ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"]),
    (["model.layers.0.mlp.down_proj"], ["model.layers.0.mlp.down_proj"]),
    (
        [f"{LAYER}.mlp.shared_experts.gate_proj"],
        [f"{LAYER}.mlp.shared_experts.gate_proj", f"{LAYER}.mlp.shared_experts.up_proj"],
    ),
    ([f"{LAYER}.mlp.experts.2.down_proj"], [k.removesuffix(".weight") for k in EXPERTS]),
    (["lm_head", f"{LAYER}.input_layernorm"], []),
]


@pytest.mark.parametrize("touched, expected", TOGETHER)
def test_parts_of_one_layer_are_raised_together(touched: Any, expected: Any, base: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_fp8(base, tmp_path / "fp8"))
    arch = architecture(checkpoint.config)
    raised = dequantize_fused_group(arch, codes_of(checkpoint), {f"{module}.weight" for module in touched})
    assert raised == {f"{module}.weight" for module in expected}


def test_what_is_not_fp8_is_not_raised(base: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_fp8(base, tmp_path / "fp8", skip=("kv_a_proj", "layers.1.mlp.experts.0")))
    arch = architecture(checkpoint.config)
    assert dequantize_fused_group(arch, codes_of(checkpoint), {KV_A}) == set()
    q_a = f"{ATTENTION}.q_a_proj.weight"
    assert dequantize_fused_group(arch, codes_of(checkpoint), {q_a}) == {q_a}
    assert dequantize_fused_group(arch, codes_of(checkpoint), {EXPERTS[-1]}) == set(EXPERTS[3:])


def test_modules_of_one_layer_are_not_taken_for_one(tmp_path: Path) -> None:
    """LongCat-Flash has two attention modules and two MLPs in a layer."""
    base = make_base(tmp_path / "base", "longcat_flash", "bfloat16")
    checkpoint = Checkpoint.open(make_fp8(base, tmp_path / "fp8"))
    touched = {f"{LAYER}.mlps.1.gate_proj.weight", f"{LAYER}.self_attn.0.q_a_proj.weight"}
    raised = dequantize_fused_group(architecture(checkpoint.config), codes_of(checkpoint), touched)
    fused = {f"{LAYER}.mlps.1.up_proj.weight", f"{LAYER}.self_attn.0.kv_a_proj_with_mqa.weight"}
    assert raised == touched | fused


def test_stacked_experts_are_raised_together(base: Path, tmp_path: Path) -> None:
    stacks = [f"{LAYER}.mlp.experts.gate_up_proj", f"{LAYER}.mlp.experts.down_proj"]
    tensors = {key: torch.ones(4, 8, 8) for key in stacks}
    checkpoint = Checkpoint.open(make_fp8(plain(tmp_path / "base", tensors), tmp_path / "fp8"))
    arch = architecture(Checkpoint.open(base).config)
    assert dequantize_fused_group(arch, codes_of(checkpoint), {stacks[0]}) == set(stacks)
    edited = edit_config(checkpoint.config | {"kept": 1}, stacks[:1], stacks)
    assert edited["quantization_config"]["modules_to_not_convert"] == [f"{LAYER}.mlp.experts", "lm_head"]


def vllm_leaves(module: str, entries: Iterable[str]) -> bool:
    """vLLM's rule for quant_method fp8 (`is_layer_skipped`): full names, for a fused layer of each part; for experts,
    whether the module's name is inside an entry."""
    parent, _, name = module.rpartition(".")
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa")}
    if name in parts:
        left = {f"{parent}.{part}" in entries for part in parts[name]}
        assert len(left) == 1, f"vLLM refuses {module}: its parts differ"
        return left.pop()
    if "experts" in module:
        return any(module in entry for entry in entries if "experts" in entry)
    return module in entries


#: Module of vLLM's model → the weights that it consists of.
_REST = ("q_b_proj", "kv_b_proj", "o_proj")
VLLM = {
    **{f"model.layers.{i}.self_attn.fused_qkv_a_proj": r"self_attn\.(q_a_proj|kv_a_proj_with_mqa)" for i in range(3)},
    **{f"model.layers.{i}.self_attn.{n}": rf"self_attn\.{n}" for i in range(3) for n in _REST},
    "model.layers.0.mlp.gate_up_proj": r"mlp\.(gate|up)_proj",
    "model.layers.0.mlp.down_proj": r"mlp\.down_proj",
    **{f"model.layers.{i}.mlp.experts": r"mlp\.experts\..*" for i in (1, 2)},
    **{f"model.layers.{i}.mlp.shared_experts.gate_up_proj": r"mlp\.shared_experts\.(gate|up)_proj" for i in (1, 2)},
    **{f"model.layers.{i}.mlp.shared_experts.down_proj": r"mlp\.shared_experts\.down_proj" for i in (1, 2)},
}  # fmt: skip


def of_vllm_module(module: str, weights: Iterable[str]) -> list[str]:
    layer = ".".join(module.split(".")[:3])
    return [key for key in weights if re.fullmatch(rf"{re.escape(layer)}\.{VLLM[module]}\.weight", key)]


def fp8_modules_of_transformers(config: dict[str, Any]) -> set[str]:
    """The modules that transformers makes FP8 layers when it reads this config.json."""
    quantization = FineGrainedFP8Config(**config["quantization_config"])
    quantizer = FineGrainedFP8HfQuantizer(quantization, pre_quantized=True)
    plain_config = AutoConfig.for_model(**{k: v for k, v in config.items() if k != "quantization_config"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(plain_config)
    quantizer._normalize_modules_to_not_convert(model)
    left = quantizer.get_modules_to_not_convert(model, quantization.modules_to_not_convert, model._keep_in_fp32_modules)
    model = replace_with_fp8_linear(model, left, quantization, pre_quantized=True)
    return {name for name, module in model.named_modules() if isinstance(module, (FP8Linear, FP8Experts))}


RAISED = [
    [f"{ATTENTION}.q_a_proj.weight"],
    [f"{ATTENTION}.kv_b_proj.weight", "model.layers.0.mlp.down_proj.weight"],
    ["model.layers.0.mlp.gate_proj.weight"],
    [f"{LAYER}.mlp.shared_experts.up_proj.weight", f"{LAYER}.mlp.shared_experts.down_proj.weight"],
    [EXPERTS[0]],
    [f"model.layers.{i}.self_attn.{n}.weight" for i in range(3) for n in ("q_a_proj", *_REST)],
]  # fmt: skip
#: A module that is not FP8 in the base, where its config.json lists any.
PLAIN = "model.layers.2.self_attn.o_proj"
LISTS: list[dict[str, Any]] = [
    {},
    {"modules_to_not_convert": None},
    {"modules_to_not_convert": ["lm_head", PLAIN]},
    {"ignored_layers": ["lm_head", PLAIN]},
    {"ignored_layers": [PLAIN], "modules_to_not_convert": [PLAIN, "lm_head"]},
]


@pytest.mark.parametrize("touched", RAISED)
@pytest.mark.parametrize("lists", LISTS)
def test_transformers_and_vllm_keep_what_was_raised(touched: Any, lists: Any, base: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_fp8(base, tmp_path / "fp8", skip=(PLAIN,) if any(lists.values()) else ()))
    config = checkpoint.config
    config["quantization_config"].pop("modules_to_not_convert", None)
    config["quantization_config"] |= lists
    before = json.dumps(config)
    weights = quantized_tensors(checkpoint)
    raised = dequantize_fused_group(architecture(config), codes_of(checkpoint), set(touched))
    edited = edit_config(config, raised, weights)
    assert json.dumps(config) == before
    left = {re.sub(r"(\.experts)\..*", r"\1", key).removesuffix(".weight") for key in set(weights) - raised}
    assert fp8_modules_of_transformers(edited) == left
    quantization = edited["quantization_config"]
    entries = quantization.get("ignored_layers") or quantization.get("modules_to_not_convert")
    for module in VLLM:
        parts = of_vllm_module(module, weights)
        if not parts:
            assert module == PLAIN
            assert vllm_leaves(module, entries)
        assert [vllm_leaves(module, entries)] * len(parts) == [key in raised for key in parts], module
    for name in ("ignored_layers", "modules_to_not_convert"):
        assert (quantization.get(name) or [])[: len(lists.get(name) or [])] == (lists.get(name) or [])
        assert len(set(quantization.get(name) or [])) == len(quantization.get(name) or [])
    rest = {k: v for k, v in quantization.items() if k not in ("ignored_layers", "modules_to_not_convert")}
    assert rest.items() <= config["quantization_config"].items()
    assert {k: v for k, v in edited.items() if k != "quantization_config"}.items() <= config.items()


@pytest.mark.parametrize("touched", RAISED)
def test_compressed_tensors_ignore_what_was_raised(touched: Any, base: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_fp8(base, tmp_path / "fp8", style="compressed-tensors"))
    weights = quantized_tensors(checkpoint)
    raised = dequantize_fused_group(architecture(checkpoint.config), codes_of(checkpoint), set(touched))
    entries = edit_config(checkpoint.config, raised, weights)["quantization_config"]["ignore"]
    assert entries[0] == "lm_head"
    # vLLM looks for names on disk, for each part of a fused layer and for each expert.
    for key in weights:
        name = key.removesuffix(".weight")
        ignored = any(re.match(e[3:], name) if e.startswith("re:") else e == name for e in entries)
        assert ignored == (key in raised), key


@pytest.mark.parametrize("style", ["deepseek", "compressed-tensors"])
def test_the_description_goes_with_the_last_fp8_weight(style: str, base: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_fp8(base, tmp_path / "fp8", style=style))
    weights = quantized_tensors(checkpoint)
    config = checkpoint.config | {"torch_dtype": "bfloat16"}
    plain_config = {k: v for k, v in config.items() if k != "quantization_config"}
    assert edit_config(config, set(weights), weights) == plain_config
    assert edit_config(config, set(), weights) == config
    assert edit_config(plain_config, set(), {}) == plain_config
    all_but_one = list(weights)[1:]
    assert "quantization_config" in edit_config(config, all_but_one, weights)


def test_a_calibrated_kv_cache_keeps_its_description(base: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_fp8(base, tmp_path / "fp8", style="compressed-tensors"))
    weights = quantized_tensors(checkpoint)
    config = checkpoint.config
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    quantization = edit_config(config, set(weights), weights)["quantization_config"]
    assert quantization["kv_cache_scheme"] == {"num_bits": 8, "type": "float"}
    assert f"{ATTENTION}.o_proj" in quantization["ignore"]
