"""The comparison of logits against plain transformers and plain PEFT.

The tests compute the logits themselves, with whole models in float32 from `from_pretrained`, and the figures from them
in numpy (`helpers.logits`).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from safetensors.torch import save_file

from mla_tune.checkpoint.index import Checkpoint
from tests.helpers import merging as merge_helpers
from tests.helpers.fp8 import dequantized, make_fp8
from tests.helpers.logits import (
    ATTENTION,
    EXPERTS,
    WEIGHTS,
    adapted,
    check,
    exact,
    logits,
    merge,
    run,
    targets,
    without_absorbed,
    wrong,
)
from tests.helpers.marks import fast_cases
from tests.helpers.merging import MLA, MOE, edit_tensors, load, make_adapter, make_base

FAMILIES = ["deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "longcat_flash"]


@pytest.fixture(autouse=True)
def _families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(merge_helpers.FAMILIES, "glm4_moe_lite", MLA | MOE)


@fast_cases("deepseek_v3", "longcat_flash-split")
@pytest.mark.parametrize("absorb", ["split", "fold"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_merge(tmp_path: Path, family: str, absorb: str) -> None:
    make_base(tmp_path / "base", family)
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", **targets(family))
    merged = merge(tmp_path, adapter, absorb)
    report = run(tmp_path, adapter, merged)
    assert report.ran
    assert (report.reason, report.idle, report.dtype, report.tokens) == ("", False, "float32", 16)
    before = logits(load(tmp_path / "base"))
    check(report.effect, before, adapted(tmp_path / "base", adapter))
    wrong(report.effect)
    exact(report.merged)
    exact(report.absorbed)
    json.dumps(report.to_json())


@pytest.mark.parametrize("family", FAMILIES)
def test_figures_are_those_of_whole_models(tmp_path: Path, family: str) -> None:
    """A merge of twice the delta: what is reported is the true difference, not just a large one."""
    make_base(tmp_path / "base", family)
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", **targets(family))
    report = run(tmp_path, adapter, merge(tmp_path, [(adapter, 2.0)]))
    check(report.merged, adapted(tmp_path / "base", adapter), logits(load(tmp_path / "out")))
    wrong(report.merged)
    assert report.absorbed is None


def test_a_merge_by_peft_in_other_shards(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", **targets("deepseek_v3"))
    model = PeftModel.from_pretrained(load(tmp_path / "base"), adapter).merge_and_unload()
    model.save_pretrained(tmp_path / "out", max_shard_size="40KB")
    merged = Checkpoint.open(tmp_path / "out")
    assert len(merged.shards) > 3
    exact(run(tmp_path, adapter, merged).merged)


def test_bfloat16(tmp_path: Path) -> None:
    """Weights of bf16 are computed with in float32: what differs is the rounding of the merged weights alone."""
    make_base(tmp_path / "base", dtype="bfloat16")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", **targets("deepseek_v3"))
    merged = merge(tmp_path, adapter, "split")
    report = run(tmp_path, adapter, merged)
    check(report.merged, adapted(tmp_path / "base", adapter), logits(load(tmp_path / "out", "float32")))
    exact(report.absorbed)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_a_proj", "q_b_proj", "kv_b_proj", "o_proj"], "use_dora": True},
        {"target_modules": ATTENTION, "target_parameters": EXPERTS, "use_rslora": True},
        {
            "target_modules": ATTENTION,
            "target_parameters": EXPERTS,
            "rank_pattern": {"kv_b_proj": 2, "experts.down_proj": 4},
            "alpha_pattern": {"o_proj": 3, "experts.gate_up_proj": 5},
        },
        {"target_parameters": ["mlp.gate_proj.weight", "mlp.down_proj.weight", "shared_experts.up_proj.weight"]},
        {"target_parameters": EXPERTS[1:]},
        {"target_modules": ["kv_b_proj"], "modules_to_save": ["lm_head", "embed_tokens", "q_a_layernorm", "gate"]},
    ],
    ids=["dora", "rslora", "patterns", "matrices as parameters", "down_proj alone", "modules_to_save"],
)
def test_kinds_of_adapters(tmp_path: Path, settings: dict[str, Any]) -> None:
    make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", **settings)
    if "modules_to_save" in settings:
        edit_tensors(
            adapter / "adapter_model.safetensors",
            lambda tensors: [t.mul_(1.1).add_(0.01) for k, t in tensors.items() if ".lora_" not in k],
        )
    merged = merge(tmp_path, adapter)
    report = run(tmp_path, adapter, merged)
    assert report.reason == ""
    check(report.effect, logits(load(tmp_path / "base")), adapted(tmp_path / "base", adapter))
    exact(report.merged)


def test_one_adapter_with_a_weight(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", **targets("deepseek_v3"))
    merged = merge(tmp_path, [(adapter, 0.3)])
    exact(run(tmp_path, [(adapter, 0.3)], merged).merged)
    wrong(run(tmp_path, [(adapter, 1.0)], merged).merged)


@pytest.mark.parametrize("parameters", [[], EXPERTS], ids=["modules", "experts too"])
def test_several_adapters_with_weights(tmp_path: Path, parameters: list[str]) -> None:
    make_base(tmp_path / "base")
    one = make_adapter(tmp_path / "one", tmp_path / "base", target_modules=ATTENTION, target_parameters=parameters)
    two = make_adapter(
        tmp_path / "two", tmp_path / "base", target_modules=["o_proj", "kv_b_proj"], target_parameters=parameters, r=5
    )
    both = [(one, 0.7), (two, -0.4)]
    merged = merge(tmp_path, both)
    report = run(tmp_path, both, merged)
    assert report.reason == ""
    exact(report.merged)
    wrong(run(tmp_path, [(one, 0.7), (two, 0.4)], merged).merged)


@fast_cases("dequantize-deepseek", "keep-compressed-tensors")
@pytest.mark.parametrize("style", ["deepseek", "compressed-tensors"])
@pytest.mark.parametrize("quantized", ["dequantize", "keep"])
def test_fp8(tmp_path: Path, style: str, quantized: str) -> None:
    """Numbers from the codes, by the blocks that are declared; float32 in the test, from its own helper."""
    plain = make_base(tmp_path / "plain", dtype="bfloat16")
    make_fp8(plain, tmp_path / "base", (7, 9), style)
    adapter = make_adapter(tmp_path / "adapter", plain, **targets("deepseek_v3"))
    merged = merge(tmp_path, adapter, "split", quantized=quantized)
    report = run(tmp_path, adapter, merged)
    before = _with_numbers(plain, tmp_path / "base", tmp_path / "numbers")
    check(report.effect, logits(load(before, "float32")), adapted(before, adapter))
    after = _with_numbers(plain, tmp_path / "out", tmp_path / "after")
    check(report.merged, adapted(before, adapter), logits(load(after, "float32")))
    wrong(report.effect)
    if quantized == "dequantize":
        exact(report.absorbed)
    else:  # W_UK and W_UV are the numbers of FP8 codes rounded to bf16
        assert report.absorbed is not None
        assert 0 < report.absorbed.kl < 1e-3


def _with_numbers(like: Path, quantized: Path, out: Path) -> Path:
    """A float32 checkpoint with the numbers that an FP8 one stands for."""
    shutil.copytree(like, out)
    numbers = dequantized(without_absorbed(quantized))
    save_file({k: t.float().contiguous() for k, t in numbers.items()}, out / WEIGHTS, metadata={"format": "pt"})
    return out


def test_tied_embeddings(tmp_path: Path) -> None:
    """minicpm3 has no lm_head on disk; untied, the output has one of its own."""
    make_base(tmp_path / "base", "minicpm3")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", target_modules=["o_proj", "lm_head"])
    report = run(tmp_path, adapter, merge(tmp_path, adapter, untie_embeddings=True))
    check(report.effect, logits(load(tmp_path / "base")), adapted(tmp_path / "base", adapter))
    exact(report.merged)


@pytest.mark.parametrize("settings", [{"lora_bias": True}, {"bias": "lora_only"}, {"bias": "all"}], ids=str)
def test_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    """Biases of attention, o_proj's among them, which folded attention adds itself."""
    monkeypatch.setitem(merge_helpers.FAMILIES, "deepseek_v3", MLA | MOE | {"attention_bias": True})
    make_base(tmp_path / "base")
    edit_tensors(
        tmp_path / "base" / WEIGHTS, lambda t: [x.uniform_(-0.5, 0.5) for k, x in t.items() if k.endswith("proj.bias")]
    )
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", target_modules=["o_proj"], **settings)
    edit_tensors(
        adapter / "adapter_model.safetensors", lambda t: [x.add_(0.3) for k, x in t.items() if k.endswith("bias")]
    )
    report = run(tmp_path, adapter, merge(tmp_path, adapter, "fold"))
    check(report.effect, logits(load(tmp_path / "base")), adapted(tmp_path / "base", adapter))
    exact(report.merged)
    exact(report.absorbed)
