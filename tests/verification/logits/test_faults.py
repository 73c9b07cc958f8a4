"""The comparison of logits of wrong merges and checkpoints, of adapters that PEFT can't compute, and without memory."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from torch._subclasses import FakeTensor
from transformers import AutoModelForCausalLM

import mla_tune.verification.logits.memory as memory_module
from mla_tune.checkpoint.index import Checkpoint
from mla_tune.errors import CheckError
from tests.helpers import merging as merge_helpers
from tests.helpers.logits import (
    ATTENTION,
    EXPERTS,
    WEIGHTS,
    adapted,
    exact,
    logits,
    merge,
    run,
    targets,
    without_absorbed,
    wrong,
)
from tests.helpers.merging import MLA, MOE, edit_json, edit_tensors, load, make_adapter, make_base


def _doubled(folder: Path) -> None:
    edit_json(folder / "adapter" / "adapter_config.json", lora_alpha=14)
    merge(folder, folder / "adapter")
    edit_json(folder / "adapter" / "adapter_config.json", lora_alpha=7)


def _dropped(folder: Path) -> None:
    shutil.copytree(folder / "base", folder / "out")


def _scrambled(folder: Path) -> None:
    """Two experts of one layer changed places, in one matrix."""
    merge(folder, folder / "adapter")

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        a, b = (f"model.layers.1.mlp.experts.{e}.down_proj.weight" for e in (0, 1))
        tensors[a], tensors[b] = tensors[b], tensors[a]

    edit_tensors(folder / "out" / WEIGHTS, swap)


def _gate_is_up(folder: Path) -> None:
    merge(folder, folder / "adapter")

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        for e in range(4):
            a, b = (f"model.layers.1.mlp.experts.{e}.{name}_proj.weight" for name in ("gate", "up"))
            tensors[a], tensors[b] = tensors[b], tensors[a]

    edit_tensors(folder / "out" / WEIGHTS, swap)


def _router_bias(folder: Path) -> None:
    merge(folder, folder / "adapter")
    key = "model.layers.1.mlp.gate.e_score_correction_bias"
    edit_tensors(folder / "out" / WEIGHTS, lambda tensors: tensors[key].neg_().add_(torch.tensor([3.0, 0, 0, -3.0])))


@pytest.mark.parametrize("fault", [_doubled, _dropped, _scrambled, _gate_is_up, _router_bias], ids=lambda f: f.__name__)
def test_a_wrong_merge_shows(tmp_path: Path, fault: Callable[[Path], None]) -> None:
    make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter", tmp_path / "base", **targets("deepseek_v3"))
    fault(tmp_path)
    report = run(tmp_path, tmp_path / "adapter", Checkpoint.open(tmp_path / "out"))
    wrong(report.merged)


@pytest.mark.parametrize("absorb", ["split", "fold"])
@pytest.mark.parametrize("part", [0, 1])
def test_swapped_heads_show(tmp_path: Path, absorb: str, part: int) -> None:
    make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", target_modules=ATTENTION)
    merged = merge(tmp_path, adapter, absorb)
    name = {"split": ("W_UK", "W_UV"), "fold": ("W_QK", "W_VO")}[absorb][part]
    key = f"model.layers.1.self_attn.{name}"
    edit_tensors(
        tmp_path / "out" / "absorbed.safetensors", lambda tensors: tensors.update({key: tensors[key][[1, 0, 2]]})
    )
    report = run(tmp_path, adapter, merged)
    wrong(report.absorbed)
    exact(report.merged)


def test_an_adapter_that_does_nothing(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", target_modules=ATTENTION)
    edit_tensors(
        adapter / "adapter_model.safetensors", lambda tensors: [t.zero_() for k, t in tensors.items() if "lora_B" in k]
    )
    report = run(tmp_path, adapter, merge(tmp_path, adapter))
    assert report.idle
    assert report.effect is not None
    assert report.effect.max_error == 0


def test_what_peft_can_not_compute_is_reported(tmp_path: Path) -> None:
    """PEFT may not support two adapters on different parameters: then the report says so."""
    make_base(tmp_path / "base")
    one = make_adapter(tmp_path / "one", tmp_path / "base", target_parameters=EXPERTS)
    two = make_adapter(tmp_path / "two", tmp_path / "base", target_parameters=EXPERTS[1:])
    both = [(one, 0.7), (two, 0.3)]
    report = run(tmp_path, both, merge(tmp_path, both, "split"))
    assert report.ran
    exact(report.absorbed)
    if report.merged is None:
        assert "PEFT" in report.reason
    else:
        exact(report.merged)


def test_adapters_of_single_experts(tmp_path: Path) -> None:
    """PEFT loads adapters of older versions differently from how they were trained."""
    make_base(tmp_path / "base")
    adapter = tmp_path / "adapter"
    stem = "base_model.model.model.layers.1.mlp.experts.2.gate_proj"
    config = LoraConfig(r=3, lora_alpha=7, task_type="CAUSAL_LM", target_modules=["o_proj"])
    get_peft_model(load(tmp_path / "base"), config).save_pretrained(adapter)
    edit_json(adapter / "adapter_config.json", target_modules=["gate_proj"])
    tensors = {f"{stem}.lora_A.weight": torch.randn(3, 48), f"{stem}.lora_B.weight": torch.randn(40, 3)}
    save_file(tensors, adapter / "adapter_model.safetensors")
    merged = merge(tmp_path, adapter, "split")
    report = run(tmp_path, adapter, merged)
    assert report.ran
    assert "single experts" in report.reason
    assert (report.effect, report.merged) == (None, None)
    exact(report.absorbed)
    assert not run(tmp_path, adapter, Checkpoint.open(without_absorbed(tmp_path / "out"))).ran


def _without(key: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.pop(key)


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.1.mlp.experts.2.up_proj.weight",
        "model.layers.2.self_attn.kv_b_proj.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor_is_named(tmp_path: Path, key: str) -> None:
    make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", target_modules=["o_proj"])
    shutil.copytree(tmp_path / "base", tmp_path / "out")
    edit_tensors(tmp_path / "out" / WEIGHTS, _without(key))
    with pytest.raises(CheckError) as error:
        run(tmp_path, adapter, Checkpoint.open(tmp_path / "out"))
    assert key in str(error.value)
    assert str(tmp_path / "out") in str(error.value)


@pytest.mark.parametrize("key", ["model.layers.1.mlp.experts.2.up_proj.weight", "model.norm.weight"])
def test_a_tensor_of_another_shape_is_named(tmp_path: Path, key: str) -> None:
    make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", target_modules=["o_proj"])
    shutil.copytree(tmp_path / "base", tmp_path / "out")
    edit_tensors(tmp_path / "out" / WEIGHTS, lambda tensors: tensors.update({key: tensors[key][:-1].clone()}))
    with pytest.raises(CheckError, match=key.replace(".", r"\.")):
        run(tmp_path, adapter, Checkpoint.open(tmp_path / "out"))


def test_a_missing_absorbed_tensor_is_named(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", target_modules=["o_proj"])
    merged = merge(tmp_path, adapter, "split")
    edit_tensors(tmp_path / "out" / "absorbed.safetensors", _without("model.layers.1.self_attn.W_UV"))
    with pytest.raises(CheckError, match=r"model\.layers\.1\.self_attn\.W_UV"):
        run(tmp_path, adapter, merged)


@pytest.mark.slow
def test_one_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a linear layer computes, no more weights of the base are in memory than those of the largest layer."""
    monkeypatch.setitem(merge_helpers.FAMILIES, "deepseek_v3", MLA | MOE | {"num_hidden_layers": 9})
    make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", **targets("deepseek_v3"))
    merged = merge(tmp_path, adapter, "split")
    layer = sum(ref.nbytes for key, ref in merged.tensors.items() if key.startswith("model.layers.1."))
    adapters = sum(ref.nbytes for ref in Checkpoint.open(_as_model(adapter)).tensors.values())
    gc.collect()
    before = _storages().keys()
    seen, calls = [0], 0
    forward = nn.Linear.forward

    def counting(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls % 23 == 0:  # listing all objects takes long
            seen.append(sum(nbytes for storage, nbytes in _storages().items() if storage not in before))
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counting)
    assert run(tmp_path, adapter, merged).ran
    assert 0 < max(seen) < 1.5 * layer + adapters
    assert 9 * layer > 3 * (1.5 * layer + adapters)


def _storages() -> dict[int, int]:
    """Address and bytes of the memory behind each parameter that there is."""
    parameters = [p for p in gc.get_objects() if isinstance(p, nn.Parameter) and not p.is_meta]
    parameters = [p for p in parameters if not isinstance(p, FakeTensor)]  # torch.compile's, which have none
    return {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}


def _as_model(adapter: Path) -> Path:
    folder = adapter.parent / "as-model"
    folder.mkdir()
    shutil.copy(adapter / "adapter_model.safetensors", folder / WEIGHTS)
    return folder


def test_nothing_is_computed_with_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", target_modules=["o_proj"])
    merged = merge(tmp_path, adapter)
    monkeypatch.setattr(memory_module, "free_memory", lambda: 1_000_000)
    report = run(tmp_path, adapter, merged)
    assert not report.ran
    assert "GB" in report.reason
    assert (report.effect, report.merged, report.absorbed) == (None, None, None)
    json.dumps(report.to_json())


def test_nothing_of_transformers_is_changed(tmp_path: Path) -> None:
    """A model that is loaded after a comparison computes as one before, and prefill uses the stock attention."""
    make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", **targets("deepseek_v3"))
    before, peft = logits(load(tmp_path / "base")), adapted(tmp_path / "base", adapter)
    run(tmp_path, adapter, merge(tmp_path, adapter, "split"))
    np.testing.assert_array_equal(before, logits(load(tmp_path / "base")))
    np.testing.assert_array_equal(peft, adapted(tmp_path / "base", adapter))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "base").config._attn_implementation == "sdpa"
