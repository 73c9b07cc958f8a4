"""Merging into FP8 checkpoints.  The oracle: the FP8 base dequantized in torch, merged by PEFT in float32."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mla_tune.adapter.merge_options import MergeOptions
from mla_tune.checkpoint.index import Checkpoint
from mla_tune.errors import InputError
from mla_tune.merge import apply
from mla_tune.merge.run import merge_absorb
from tests.helpers.fp8 import FORMATS, dequantized, make_fp8
from tests.helpers.marks import fast_cases
from tests.helpers.merging import edit_json, load, make_adapter, make_base

ATTENTION = ["q_a_proj", "kv_b_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def make(tmp_path: Path, fmt: dict[str, Any], adapter: dict[str, Any], shard: str = "60KB") -> tuple[Path, Path, Path]:
    """(FP8 base, adapter, the same base in float32)."""
    plain = make_base(tmp_path / "plain", dtype="bfloat16", shard=shard)
    fp8 = make_fp8(plain, tmp_path / "fp8", **fmt)
    full = tmp_path / "full"
    shutil.copytree(plain, full, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {key: value.float().contiguous() for key, value in dequantized(fp8).items() if "input_scale" not in key}
    save_file(tensors, full / "model.safetensors", metadata={"format": "pt"})
    edit_json(full / "config.json", dtype="float32")
    return fp8, make_adapter(tmp_path / "adapter", full, **adapter), full


def expected(full: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """PEFT's merge in float32, with the experts' stacks taken apart again."""
    from peft import PeftModel

    state = PeftModel.from_pretrained(load(full), adapter).merge_and_unload().state_dict()
    result = {}
    for key, tensor in state.items():
        if match := re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", key):
            for e, matrix in enumerate(tensor):
                halves = (
                    {"gate_proj": matrix[:40], "up_proj": matrix[40:]}
                    if match[2] == "gate_up_proj"
                    else {"down_proj": matrix}
                )
                result |= {f"{match[1]}.{e}.{name}.weight": part for name, part in halves.items()}
        else:
            result[key] = tensor
    return result


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("absorbed"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


@fast_cases("scales in another shard", "tensor")
@pytest.mark.parametrize("name", FORMATS)
def test_to_bf16(name: str, tmp_path: Path) -> None:
    fp8, adapter, full = make(
        tmp_path, FORMATS[name], {"target_modules": ATTENTION, "target_parameters": ["mlp.experts.down_proj"]}
    )
    report = merge_absorb(adapter, fp8, tmp_path / "out")
    base, out, want = tensors_of(fp8), tensors_of(tmp_path / "out"), expected(full, adapter)
    before = dequantized(fp8)
    touched = {k for k in base if re.search(r"q_a_proj|kv_b_proj|o_proj|experts\.\d+\.down_proj", k)}
    beside = {k for k in base if re.search(r"kv_a_proj_with_mqa|experts\.\d+\.(gate|up)_proj", k)}
    fp8_keys = {k for k, t in base.items() if t.dtype == torch.float8_e4m3fn}
    raised = {k for k in fp8_keys if k in touched | beside}
    assert len(raised) > 20
    for key in raised:
        assert out[key].dtype == torch.bfloat16, key
        value = want[key] if key in touched else before[key]
        step = torch.exp2(torch.floor(torch.log2(value.abs().clamp_min(1e-30))) - 7)
        assert ((out[key].float() - value).abs() <= step * 0.501 + 1e-7).all(), key
        assert f"{key}_scale" not in out
        assert f"{key}_scale_inv" not in out
    gone = {k for k in base if k.endswith(("_scale", "_scale_inv")) and k.rpartition("_scale")[0] in raised}
    gone |= {k for k in base if k.endswith("input_scale") and k.replace("input_scale", "weight") in raised}
    assert out.keys() == base.keys() - gone
    for key in out.keys() - raised:
        assert out[key].dtype == base[key].dtype, key
        assert torch.equal(out[key].flatten().view(torch.uint8), base[key].flatten().view(torch.uint8)), key
    assert report.tensors_dequantized == len(raised)
    assert f"{len(raised)} FP8 weights are written as bfloat16" in report.notes[0]
    quant = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    named = quant.get("modules_to_not_convert") or quant["ignore"]
    assert "model.layers.0.self_attn.kv_b_proj" in named
    assert "model.layers.0.self_attn.kv_a_proj_with_mqa" in named
    assert not any("shared_experts" in n for n in named)
    order = [key.removesuffix(".weight") for key in Checkpoint.open(fp8).tensors if key != "lm_head.weight"]
    assert [n for n in named if n in order] == [n for n in order if n in named], "the same in every process"
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert json.loads(index.read_text())["metadata"]["total_size"] == sum(t.nbytes for t in out.values())


@fast_cases("deepseek", "channel")
@pytest.mark.parametrize("name", FORMATS)
def test_keep_writes_fp8_with_fresh_scales(name: str, tmp_path: Path) -> None:
    fp8, adapter, full = make(tmp_path, FORMATS[name], {"target_modules": ATTENTION, "target_parameters": EXPERTS})
    report = merge_absorb(adapter, fp8, tmp_path / "out", options=MergeOptions(quantized="keep"))
    base, out, want = tensors_of(fp8), tensors_of(tmp_path / "out"), expected(full, adapter)
    assert {k: (t.dtype, t.shape) for k, t in out.items()} == {k: (t.dtype, t.shape) for k, t in base.items()}
    config = (tmp_path / "out" / "config.json").read_text()
    assert json.loads(config) == json.loads((fp8 / "config.json").read_text())
    values = dequantized(tmp_path / "out")
    touched = [k for k in base if re.search(r"(q_a_proj|kv_b_proj|o_proj|experts\.\d+\.\w+)\.weight$", k)]
    assert len(touched) > 20
    for key in touched:
        scale = out.get(f"{key}_scale_inv", out.get(f"{key}_scale"))
        assert scale is not None
        error = (values[key] - want[key]).abs()
        # Half a code's step is 1/16 of the number, or 2⁻¹⁰ of the scale below the smallest normal code.
        allowed = torch.maximum(want[key].abs() / 16, scale.float().max() * 2.0**-10) * 1.001
        assert (error <= allowed).all(), key
        if FORMATS[name].get("ue8m0"):
            assert (torch.log2(scale.float()) % 1 == 0).all()
    assert any("quantized anew" in line for line in report.notes)
    rows = {row.role: row for row in report.roles}
    assert all(row.cosine is not None and row.cosine < 0.9999 for row in rows.values())


def test_one_scale_for_a_weight_of_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass that finds the largest number of a weight leaves alone what the merge of its rows has read."""
    # One thread, and scales in other files than their weights: so some weights are merged before their scales.
    fp8, adapter, _ = make(tmp_path, FORMATS["tensor"] | {"scales_in_other_shard": True}, {"target_modules": ATTENTION})
    outs = [tmp_path / "one", tmp_path / "many"]
    for out in outs:
        merge_absorb(adapter, fp8, out, options=MergeOptions(quantized="keep"), logits=False, workers=1)
        monkeypatch.setattr(apply, "_BLOCK", 512)
    one, many = map(tensors_of, outs)
    for key in one:
        assert torch.equal(one[key].flatten().view(torch.uint8), many[key].flatten().view(torch.uint8)), key


def test_everything_raised_is_no_longer_quantized(tmp_path: Path) -> None:
    skip = ("mlp",)
    fp8, adapter, full = make(
        tmp_path, {"block": (4, 4), "skip": skip}, {"target_modules": ["q_a_proj", "q_b_proj", "kv_b_proj", "o_proj"]}
    )
    merge_absorb(adapter, fp8, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    with torch.no_grad():
        tokens = torch.arange(9)[None]
        merged, reference = load(tmp_path / "out", "float32"), load(full, "float32")
        assert merged(tokens).logits.shape == reference(tokens).logits.shape


def test_dtype_dequantizes_all(tmp_path: Path) -> None:
    fp8, adapter, full = make(tmp_path, {"block": (4, 4)}, {"target_modules": ATTENTION})
    merge_absorb(adapter, fp8, tmp_path / "out", options=MergeOptions(dtype="float32"))
    out, want = tensors_of(tmp_path / "out"), expected(full, adapter)
    for key, value in out.items():
        assert value.dtype == (torch.bfloat16 if key.endswith("e_score_correction_bias") else torch.float32)
        assert (value - want[key]).abs().max() <= 1e-6 * want[key].abs().max().clamp_min(1e-30), key
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("quantized", ["dequantize", "keep"])
def test_absorbed_tensors_of_an_fp8_model_are_split_after_dequantizing(quantized: str, tmp_path: Path) -> None:
    base, adapter, _ = make(tmp_path, {"block": (4, 4)}, {"target_modules": ["o_proj"]})
    merge_absorb(adapter, base, tmp_path / "out", options=MergeOptions(quantized=quantized))
    absorbed = load_file(tmp_path / "out" / "absorbed.safetensors")
    kv_b = dequantized(base)["model.layers.1.self_attn.kv_b_proj.weight"].bfloat16().view(3, 25, 28)
    path = "model.layers.1.self_attn"
    assert torch.equal(absorbed[f"{path}.W_UK"], kv_b[:, :10].transpose(1, 2))
    assert torch.equal(absorbed[f"{path}.W_UV"], kv_b[:, 10:])


def test_stochastic_rounding_to_fp8_keeps_what_nearest_erases(tmp_path: Path) -> None:
    fp8, adapter, _ = make(tmp_path, {"block": (16, 16)}, {"target_modules": ["o_proj", "q_b_proj"]})

    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        for key, tensor in tensors.items():
            if "lora_B" in key:
                tensor.mul_(0.01)

    from tests.helpers.merging import edit_tensors

    edit_tensors(adapter / "adapter_model.safetensors", shrink)
    rounds = {
        how: merge_absorb(adapter, fp8, tmp_path / how, options=MergeOptions(quantized="keep", round=how, seed=4))
        for how in ("nearest", "stochastic")
    }
    retained = {how: {row.role: row.retained for row in report.roles} for how, report in rounds.items()}
    # Where the largest number of a block stays, so does the scale: codes stay, and with them the old weight.
    assert retained["nearest"]["W_O"] is not None
    assert retained["nearest"]["W_O"] < 0.6
    assert retained["stochastic"]["W_O"] == pytest.approx(1, abs=0.5)


def test_a_wrong_block_size_is_refused(tmp_path: Path) -> None:
    fp8, adapter, _ = make(tmp_path, {"block": (4, 4)}, {"target_modules": ATTENTION})
    quant = json.loads((fp8 / "config.json").read_text())["quantization_config"]
    edit_json(fp8 / "config.json", quantization_config=quant | {"weight_block_size": [8, 4]})
    with pytest.raises(InputError, match="weight_scale_inv"):
        merge_absorb(adapter, fp8, tmp_path / "out")
    edit_json(fp8 / "config.json", quantization_config={k: v for k, v in quant.items() if k != "weight_block_size"})
    with pytest.raises(InputError, match="Block sizes are not guessed"):
        merge_absorb(adapter, fp8, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "fp8", "full", "plain"]
