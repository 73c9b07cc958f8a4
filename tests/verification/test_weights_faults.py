"""The proof names the tensors of wrong outputs.

"§5" marks tests of mistakes that published tools make.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from mla_tune.adapter.merge_options import MergeOptions
from mla_tune.errors import FileError
from mla_tune.merge.run import merge_absorb
from mla_tune.verification.read import same_bytes
from tests.helpers.fp8 import dequantized, quantize, spread
from tests.helpers.merging import edit_json, edit_tensors, load, make_adapter
from tests.helpers.proof import (
    ATTENTION,
    DOWN,
    EXPERTS,
    INDEX,
    KV_B,
    NORM,
    by_hand,
    changes,
    delta_first,
    dequantized_merge,
    edit,
    edit_config,
    holds,
    once,
    scaled,
    tensors_of,
    verified,
    wrong,
)


@pytest.mark.parametrize("ulps", [1 / 6, 1 / 4, 1 / 2, 2, 20])
@pytest.mark.parametrize("key", [KV_B, DOWN])
def test_an_adapter_that_is_missing_in_one_tensor(
    key: str, ulps: float, even: Path, adapter: Path, tmp_path: Path
) -> None:
    """Also where the change is so far below an ulp that every single number could be another tool's rounding."""
    unit = changes(even, adapter)[key].delta.std() / 2**-10
    this = scaled(adapter, tmp_path / "adapter", float(ulps / unit))
    deltas = changes(even, this)
    assert float(deltas[key].delta.std()) == pytest.approx(ulps * 2**-10, rel=0.5)
    holds(by_hand(even, tmp_path / "right", deltas, delta_first), even, this)
    found = wrong(by_hand(even, tmp_path / "out", deltas, delta_first, skip=(key,)), even, this)
    assert list(found) == [key]
    if ulps < 1 / 3:
        assert "holds 0.0% of the adapter's change" in found[key]


@pytest.mark.parametrize("size", [1e-2, 0.1, 1])
def test_rslora_scaled_by_alpha_over_r(size: float, base: Path, tmp_path: Path) -> None:
    """§5: rsLoRA scaled as alpha/r."""
    made = make_adapter(tmp_path / "made", base, target_modules=ATTENTION, target_parameters=EXPERTS, use_rslora=True)
    rslora = scaled(made, tmp_path / "adapter", size)
    right = by_hand(base, tmp_path / "right", changes(base, rslora))
    holds(right, base, rslora)
    naive = by_hand(base, tmp_path / "naive", changes(base, rslora, rslora_ignored=True))
    assert wrong(naive, base, rslora).keys() == changes(base, rslora).keys()


@pytest.mark.parametrize("size", [1e-2, 0.1, 1])
def test_experts_read_expert_major(size: float, base: Path, adapter: Path, tmp_path: Path) -> None:
    """The norms are right, but the values are in the wrong order."""
    this = scaled(adapter, tmp_path / "adapter", size)
    out = by_hand(base, tmp_path / "out", changes(base, this, expert_major=True))
    assert wrong(out, base, this).keys() == {key for key in changes(base, this) if ".experts." in key}


@pytest.mark.parametrize("size", [1e-2, 1])
def test_dora_without_its_magnitude(size: float, base: Path, tmp_path: Path) -> None:
    dora = scaled(make_adapter(tmp_path / "d", base, target_modules=ATTENTION, use_dora=True), tmp_path / "a", size)
    out = by_hand(base, tmp_path / "out", changes(base, dora), lambda W, c: W.float() + c.delta)
    assert wrong(out, base, dora).keys() == changes(base, dora).keys()


def test_merge_and_unload_drops_mtp_layers(base: Path, tmp_path: Path) -> None:
    """§5: drops MTP."""
    whole = tmp_path / "base"
    shutil.copytree(base, whole)
    mtp = {"model.layers.3.self_attn.kv_b_proj.weight": torch.randn(75, 28).bfloat16()}
    save_file(mtp, whole / "model-mtp.safetensors", metadata={"format": "pt"})
    index = json.loads((whole / INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(mtp, "model-mtp.safetensors")
    index["metadata"]["total_size"] += 75 * 28 * 2
    (whole / INDEX).write_text(json.dumps(index))
    edit_json(whole / "config.json", num_nextn_predict_layers=1)
    adapter = make_adapter(tmp_path / "adapter", whole, target_modules=["kv_b_proj"])
    PeftModel.from_pretrained(load(whole), adapter).merge_and_unload().save_pretrained(tmp_path / "peft")
    assert wrong(tmp_path / "peft", whole, adapter) == {next(iter(mtp)): "is in the base and missing in the output"}
    merge_absorb(adapter, whole, tmp_path / "out", verify=False)
    holds(tmp_path / "out", whole)


def test_block_sizes_guessed_from_shapes(fp8: Path, adapter: Path, tmp_path: Path) -> None:
    """§5: guessing the block as ceil(576/5) cost another engine 5 points of GSM8K."""
    holds(dequantized_merge(fp8, tmp_path / "right", adapter, dequantized(fp8)), fp8, adapter)
    tensors, values = tensors_of(fp8), dequantized(fp8)
    guessed = set()
    for key in values:
        if tensors[key].dtype == torch.float8_e4m3fn:
            scale, shape = tensors[f"{key}_scale_inv"], tensors[key].shape
            rows, columns = (-(-n // m) for n, m in zip(shape, scale.shape, strict=True))
            values[key] = tensors[key].float() * spread(scale, shape, (rows, columns))
            if (rows, columns) != (8, 16):
                guessed.add(key)
    found = wrong(dequantized_merge(fp8, tmp_path / "naive", adapter, values), fp8, adapter)
    assert "model.layers.1.self_attn.kv_a_proj_with_mqa.weight" in found
    assert found.keys() <= guessed


def test_deltas_on_raw_codes(fp8: Path, adapter: Path, tmp_path: Path) -> None:
    """§5: adding a delta to raw codes gives a merge that "succeeds" and does next to nothing."""
    small = scaled(adapter, tmp_path / "adapter", 0.3)
    deltas = changes(fp8, small)
    naive = by_hand(fp8, tmp_path / "naive", deltas, lambda W, c: (W.float() + c.delta).clamp(-448, 448))
    found = wrong(naive, fp8, small)
    assert found.keys() == deltas.keys()
    assert (by_hand(fp8, tmp_path / "right", {}) / "config.json").is_file()

    def requantized(tensors: dict[str, torch.Tensor]) -> None:
        for key in tensors.keys() & deltas.keys():
            W = dequantized(fp8)[key] + deltas[key].delta
            tensors[key], tensors[f"{key}_scale_inv"] = quantize(W, (8, 16))

    for file in (tmp_path / "right").glob("*.safetensors"):
        edit_tensors(file, requantized)
    assert holds(tmp_path / "right", fp8, small).proof.recomputed == 2 * len(deltas)


def test_fp8_scales_that_are_too_large(fp8: Path, adapter: Path, tmp_path: Path) -> None:
    """The numbers are right within the distance of two codes, but that is 64 times too large."""
    merge_absorb(adapter, fp8, tmp_path / "out", options=MergeOptions(quantized="keep", absorb="none"), verify=False)
    wide, scale = 64.0, f"{KV_B}_scale_inv"
    W = dequantized(fp8)[KV_B] + changes(fp8, adapter)[KV_B].delta
    codes = W / spread(tensors_of(tmp_path / "out")[scale], W.shape, (8, 16)) / wide
    edit(tmp_path / "out", KV_B, lambda _: codes.to(torch.float8_e4m3fn))
    edit(tmp_path / "out", scale, lambda s: s * wide)
    assert "scales are too large, by up to 64 times" in wrong(tmp_path / "out", fp8)[KV_B]
    (tmp_path / "out" / "mla_tune_manifest.json").unlink()
    assert "scales are too large" in wrong(tmp_path / "out", fp8, adapter)[KV_B]


def test_fused_layers_of_two_precisions(fp8: Path, tmp_path: Path) -> None:
    """§5: vLLM fuses q_a_proj with kv_a_proj_with_mqa: every part of a fused layer must have one precision."""
    one = make_adapter(tmp_path / "adapter", fp8.with_name("base"), target_modules=["q_a_proj"])
    merge_absorb(one, fp8, tmp_path / "out", options=MergeOptions(absorb="none"), verify=False)
    (tmp_path / "out" / "mla_tune_manifest.json").unlink()
    holds(tmp_path / "out", fp8, one)
    beside = "model.layers.1.self_attn.kv_a_proj_with_mqa"
    base = tensors_of(fp8)
    edit(tmp_path / "out", f"{beside}.weight", lambda _: base[f"{beside}.weight"])
    with_scale = tmp_path / "out" / json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"][f"{beside}.weight"]
    name = f"{beside}.weight_scale_inv"
    edit_tensors(with_scale, lambda t: t.update({name: base[name]}))
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    index["weight_map"][name] = with_scale.name
    (tmp_path / "out" / INDEX).write_text(json.dumps(index))
    found = wrong(tmp_path / "out", fp8, one)
    assert "which engines fuse with it" in found["model.layers.1.self_attn.q_a_proj.weight"]
    assert "quantization_config in config.json excludes it" in found[f"{beside}.weight"]


def test_a_quantization_config_left_behind_or_taken_away(fp8: Path, adapter: Path, tmp_path: Path) -> None:
    merge_absorb(adapter, fp8, tmp_path / "out", options=MergeOptions(absorb="none"), verify=False)
    out = tmp_path / "out"
    ours = (out / "config.json").read_text()
    shutil.copy(fp8 / "config.json", out)
    found = wrong(out, fp8)
    assert "is no longer quantized, but quantization_config" in found[KV_B]
    assert "config.json" in found, "the manifest knows another one"
    (out / "config.json").write_text(ours)
    edit_config(out, lambda config: config["quantization_config"].update(weight_block_size=[8, 17]))
    assert any("block of 8 × 17; the base has it" in what for what in wrong(out, fp8).values())
    edit_config(out, lambda config: config.pop("quantization_config"))
    assert "has no quantization_config" in wrong(out, fp8)["config.json"]
    right = dequantized_merge(fp8, tmp_path / "all", adapter, dequantized(fp8))
    shutil.copy(fp8 / "config.json", right)
    assert "no tensor is F8_E4M3" in wrong(right, fp8, adapter)["config.json"]


def test_files_of_two_adapters(base: Path, adapter: Path, tmp_path: Path) -> None:
    """§5: resume files that know only shard names: two adapters mixed."""
    other = scaled(adapter, tmp_path / "other", 1, seed=3)
    out = by_hand(base, tmp_path / "out", changes(base, adapter))
    name = json.loads((base / INDEX).read_text())["weight_map"][KV_B]
    shutil.copy(by_hand(base, tmp_path / "mixed", changes(base, other)) / name, out)
    assert wrong(out, base, adapter).keys() == changes(base, adapter).keys() & load_file(out / name).keys()


def test_a_folder_that_exists_is_not_an_output(base: Path, adapter: Path, tmp_path: Path) -> None:
    """§5: outputs trusted because the folder exists."""
    shutil.copytree(base, tmp_path / "out")
    found = wrong(tmp_path / "out", base, adapter)
    assert found.keys() == changes(base, adapter).keys()
    first = sorted((tmp_path / "out").glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:-1])
    with pytest.raises(FileError, match="damaged or incomplete"):
        verified(tmp_path / "out", base, adapter)


def test_total_size_as_a_count_of_tensors(base: Path, adapter: Path, tmp_path: Path) -> None:
    """§5: total_size written as a tensor count."""
    out = by_hand(base, tmp_path / "out", changes(base, adapter))
    index = json.loads((out / INDEX).read_text())
    edit_json(out / INDEX, metadata={"total_size": len(index["weight_map"])})
    assert "has total_size 67, but the tensors have" in wrong(out, base, adapter)[INDEX]


def test_absorbed_tensors_split_before_dequantizing(fp8: Path, adapter: Path, tmp_path: Path) -> None:
    """§5: 25 rows a head are not 8-aligned: split only after dequantizing."""
    merge_absorb(adapter, fp8, tmp_path / "out", options=MergeOptions(quantized="keep"), verify=False)
    holds(tmp_path / "out", fp8)
    t = tensors_of(tmp_path / "out")
    codes = t[KV_B].float().view(3, 25, 28)[:, :10]
    naive = codes.reshape(30, 28) * spread(t[f"{KV_B}_scale_inv"], (30, 28), (8, 16))
    path = KV_B.removesuffix("kv_b_proj.weight")
    edit(tmp_path / "out", f"{path}W_UK", lambda _: naive.view(3, 10, 28).transpose(1, 2).bfloat16())
    found = wrong(tmp_path / "out", fp8)
    assert found.keys() == {f"{path}W_UK", "absorbed.safetensors"}
    assert found[f"{path}W_UK"] == "is not the split of kv_b_proj"


def flip(bit: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Flip one bit of the number in the middle."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        raw = tensor.clone().view(-1)
        codes = raw.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[raw.element_size()])
        codes[len(codes) // 2] ^= 1 << bit
        return raw.view(tensor.shape)

    return change


@pytest.mark.parametrize("absorb", ["split", "fold"])
def test_one_flipped_bit(absorb: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    merge_absorb(adapter, base, tmp_path / "right", options=MergeOptions(absorb=absorb), verify=False)
    path = KV_B.removesuffix("kv_b_proj.weight")
    absorbed = [f"{path}{name}" for name in (("W_UK", "W_UV") if absorb == "split" else ("W_QK", "W_VO"))]
    for key in (KV_B, DOWN, NORM, "lm_head.weight", *absorbed):
        out = tmp_path / key
        shutil.copytree(tmp_path / "right", out)
        edit(out, key, flip(0))
        (out / "mla_tune_manifest.json").rename(tmp_path / "manifest")
        manifest = json.loads((tmp_path / "manifest").read_text()) | {"files": {}}  # hashes would tell at once
        (out / "mla_tune_manifest.json").write_text(json.dumps(manifest))
        found = wrong(out, base)
        assert key in found
        assert found.keys() <= {key, *(absorbed if key == KV_B else [])}, "what hangs on kv_b_proj differs from it too"


def test_one_flipped_bit_of_float32_and_of_codes(base: Path, fp8: Path, adapter: Path, tmp_path: Path) -> None:
    """The last bits of a float32 sum depend on its order, so the fourth bit is flipped; for codes, the last."""
    options = {"float32": (base, MergeOptions(dtype="float32"), 3), "fp8": (fp8, MergeOptions(quantized="keep"), 0)}
    for name, (this, option, bit) in options.items():
        merge_absorb(adapter, this, tmp_path / name, options=option, verify=False)
        for key in (KV_B, DOWN):
            edit(tmp_path / name, key, flip(bit))
            assert "1 of" in wrong(tmp_path / name, this)[key]


@pytest.mark.parametrize("n", range(1, 20))
def test_every_byte_is_compared(n: int) -> None:
    a = torch.arange(n, dtype=torch.uint8)
    assert same_bytes(a, a.clone())
    assert not same_bytes(a, a[:-1])
    for i in range(n):
        b = a.clone()
        b[i] ^= 1
        assert not same_bytes(a, b)


def test_numbers_that_are_off_by_more_than_a_rounding(base: Path, even: Path, adapter: Path, tmp_path: Path) -> None:
    """Off by two ulp where rounding was stochastic, and by four in another tool's output."""
    merge_absorb(adapter, base, tmp_path / "out", options=MergeOptions(round="stochastic", absorb="none"), verify=False)
    edit(tmp_path / "out", DOWN, flip(1))
    assert "1 of 1,920 numbers is wrong" in wrong(tmp_path / "out", base)[DOWN]
    small = scaled(adapter, tmp_path / "adapter", 0.01)
    edit(by_hand(even, tmp_path / "hand", changes(even, small), delta_first), DOWN, flip(2))
    assert "1 of 1,920 numbers is wrong" in wrong(tmp_path / "hand", even, small)[DOWN]


def test_stochastic_rounding_hides_no_missing_adapter(even: Path, adapter: Path, tmp_path: Path) -> None:
    base, small = even, scaled(adapter, tmp_path / "adapter", 0.002)
    merge_absorb(small, base, tmp_path / "out", options=MergeOptions(round="stochastic", absorb="none"), verify=False)
    holds(tmp_path / "out", base)
    edit(tmp_path / "out", KV_B, lambda _: tensors_of(base)[KV_B])
    assert "holds 0.0% of the adapter's change" in wrong(tmp_path / "out", base)[KV_B]


def test_heads_swapped(base: Path, adapter: Path, tmp_path: Path) -> None:
    path = KV_B.removesuffix("kv_b_proj.weight")
    for absorb, name in (("split", "W_UK"), ("split", "W_UV"), ("fold", "W_QK"), ("fold", "W_VO")):
        out = tmp_path / name
        merge_absorb(adapter, base, out, options=MergeOptions(absorb=absorb), verify=False)
        edit(out, f"{path}{name}", lambda t: t[[1, 0, 2]])
        assert f"{path}{name}" in wrong(out, base)
        edit(out, f"{path}{name}", lambda t: None)
        assert wrong(out, base)[f"{path}{name}"] == "is missing in the absorbed file"


def test_weights_of_another_dtype(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge_absorb(adapter, base, tmp_path / "out", options=MergeOptions(absorb="none"), verify=False)
    for key in (KV_B, "lm_head.weight"):
        edit(tmp_path / "out", key, lambda t: t.to(torch.float32))
        assert "has the dtype F32; BF16 is right" in wrong(tmp_path / "out", base)[key]
    # A tool that converts while it merges is not wrong; one that loses bits on the way is.
    out = by_hand(base, tmp_path / "via float16", changes(base, adapter), lambda W, c: once(W.half(), c))
    holds(out, base, adapter)
    edit(out, KV_B, lambda t: t.to(torch.float8_e4m3fn).to(t.dtype))
    assert wrong(out, base, adapter).keys() == {KV_B}


def test_a_file_that_is_the_bases_own(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge_absorb(adapter, base, tmp_path / "out", options=MergeOptions(absorb="none"), verify=False)
    name = json.loads((base / INDEX).read_text())["weight_map"][KV_B]
    (tmp_path / "out" / name).unlink()
    os.link(base / name, tmp_path / "out" / name)
    found = wrong(tmp_path / "out", base)
    assert found[KV_B] == "the file is the base's own: the adapter is not merged into it"
    assert found.keys() - {name} == changes(base, adapter).keys() & load_file(base / name).keys()


def test_keys_too_many_and_of_another_shape(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = by_hand(base, tmp_path / "out", changes(base, adapter))
    edit(out, NORM, lambda t: t[:-1])
    found = wrong(out, base, adapter)
    assert found[NORM] == "has the shape (47,); (48,) is right"
    file = out / json.loads((out / INDEX).read_text())["weight_map"][KV_B]
    edit_tensors(file, lambda t: t.update({"model.layers.1.self_attn.extra": torch.ones(2)}))
    index = json.loads((out / INDEX).read_text())
    index["weight_map"]["model.layers.1.self_attn.extra"] = file.name
    (out / INDEX).write_text(json.dumps(index))
    assert wrong(out, base, adapter)["model.layers.1.self_attn.extra"] == "is in the output and not in the base"
    edit_json(out / "config.json", kv_lora_rank=29)
    assert wrong(out, base, adapter)["config.json"] == "describes a model other than the base"


def test_numbers_that_are_not_finite(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge_absorb(adapter, base, tmp_path / "out", options=MergeOptions(absorb="none"), verify=False)
    for value in (float("nan"), float("inf")):
        edit(tmp_path / "out", KV_B, lambda t, v=value: t.index_fill(0, torch.tensor([3]), v))
        assert "28 of 2,100 numbers are wrong: at [3, 0]" in wrong(tmp_path / "out", base)[KV_B]
        damaged = tmp_path / str(value)
        shutil.copytree(base, damaged)
        edit(damaged, KV_B, lambda t, v=value: t.index_fill(0, torch.tensor([3]), v))
        assert "28 of 2,100 numbers are wrong" in wrong(tmp_path / "out", damaged)[KV_B], "equal, and still not numbers"


def test_all_failures_are_counted(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(base, other)
    for file in other.glob("*.safetensors"):
        edit_tensors(file, lambda tensors: [tensor.add_(1) for tensor in tensors.values()] and None)
    found = verified(other, base, adapter).proof
    assert found.failed == len(tensors_of(base))
    assert found.recomputed + found.unchanged == len(tensors_of(base))
