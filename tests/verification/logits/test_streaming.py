"""How the comparison of logits reads weights: experts a few at a time and only those that run, in whichever form they
lie on disk, and what becomes of a comparison that can't be made as usual."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mla_tune.verification.logits.memory as memory_module
import mla_tune.verification.logits.peft_reference as peft_reference
import mla_tune.verification.logits.streamed_model as streamed_model
from mla_tune.checkpoint.index import Checkpoint, TensorRef
from mla_tune.verification.logits.differences import difference
from mla_tune.verification.logits.streamed_model import StreamedModel
from mla_tune.verification.logits.streamed_weights import WeightReader
from tests.helpers import merging as merge_helpers
from tests.helpers.logits import (
    ATTENTION,
    WEIGHTS,
    adapted,
    check,
    exact,
    figures,
    logits,
    merge,
    run,
    targets,
    tokens,
    wrong,
)
from tests.helpers.marks import fast_cases
from tests.helpers.merging import MLA, MOE, edit_tensors, load, make_adapter, make_base

#: As many experts as make several chunks, and a prime, so that none is full.
MANY = {"n_routed_experts": 7, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 3, "moe_topk": 3}


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of seven experts, three a token."""
    families = merge_helpers.FAMILIES | {"glm4_moe_lite": MLA | MOE}
    for name, settings in families.items():
        known = {k: v for k, v in MANY.items() if k in settings}
        monkeypatch.setitem(merge_helpers.FAMILIES, name, settings | known)


@fast_cases("deepseek_v3", "longcat_flash-1")
@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash"])
def test_one_expert_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many: None, family: str, readers: int
) -> None:
    make_base(tmp_path / "base", family)
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", **targets(family))
    merged = merge(tmp_path, adapter, "split")
    monkeypatch.setattr(memory_module, "CHUNK", 1)
    monkeypatch.setattr(memory_module, "reader_threads", lambda: readers)
    read_experts, chunks = StreamedModel._read_experts, []

    def recorded(self: StreamedModel, stack: Any, chunk: Any, memory: Any) -> Any:
        result = read_experts(self, stack, chunk, memory)
        chunks.append([len(t) for t in result])
        return result

    monkeypatch.setattr(StreamedModel, "_read_experts", recorded)
    report = run(tmp_path, adapter, merged)
    check(report.effect, logits(load(tmp_path / "base")), adapted(tmp_path / "base", adapter))
    wrong(report.effect)
    exact(report.merged)
    exact(report.absorbed)
    layers = 2
    assert layers * 2 < sum(c == [1, 1] for c in chunks) <= layers * 2 * 7
    assert all(c in ([1, 1], [0, 0]) for c in chunks), "identity experts have no weights"


@pytest.mark.parametrize("family", ["deepseek_v3", "minicpm3"])
def test_the_head_some_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """97 rows, ten at a time; the head of minicpm3 is the embedding."""
    make_base(tmp_path / "base", family)
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", target_modules=ATTENTION)
    monkeypatch.setattr(streamed_model, "_HEAD_BYTES", 10 * 48 * 4)
    report = run(tmp_path, adapter, merge(tmp_path, adapter, "split"))
    check(report.effect, logits(load(tmp_path / "base")), adapted(tmp_path / "base", adapter))
    exact(report.merged)


def test_a_trained_head_that_is_no_adapter(tmp_path: Path) -> None:
    """`save_embedding_layers` stores whole matrices, which PEFT does not mark in the module."""
    make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", target_modules=ATTENTION)
    head = load_file(tmp_path / "base" / WEIGHTS)["lm_head.weight"]
    edit_tensors(adapter / "adapter_model.safetensors", lambda t: t.update({"base_model.model.lm_head.weight": -head}))
    report = run(tmp_path, adapter, merge(tmp_path, adapter))
    assert report.effect is not None
    assert report.effect.top1 < 0.5
    exact(report.merged)


def test_three_experts_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many: None) -> None:
    make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", **targets("deepseek_v3"))
    monkeypatch.setattr(memory_module, "CHUNK", 3 * 3 * 40 * 48 * 4)
    report = run(tmp_path, adapter, merge(tmp_path, [(adapter, 2.0)]))
    check(report.merged, adapted(tmp_path / "base", adapter), logits(load(tmp_path / "out")))
    wrong(report.merged)


def test_only_what_runs_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many: None) -> None:
    """Expert 2 of the first sparse layer is sent no token, and the embedding is read for the tokens there are."""
    make_base(tmp_path / "base")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    edit_tensors(tmp_path / "base" / WEIGHTS, lambda t: t[bias].copy_(torch.tensor([0.0, 0, -9, 0, 0, 0, 0])))
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", **targets("deepseek_v3"))
    merged = merge(tmp_path, adapter)
    read, seen = WeightReader.read, []

    def recorded(self: WeightReader, ref: TensorRef, out: torch.Tensor, begin: int = 0, end: int | None = None) -> None:
        seen.append((ref.key, begin))
        read(self, ref, out, begin, end)

    monkeypatch.setattr(WeightReader, "read", recorded)
    exact(run(tmp_path, adapter, merged).merged)
    keys = {key for key, _ in seen}
    of = "model.layers.1.mlp.experts"
    assert {f"{of}.{e}.up_proj.weight" in keys for e in (0, 1, 3, 4, 5, 6)} == {True}
    assert not any(key.startswith(f"{of}.2.") for key in keys)
    rows = {row for key, row in seen if key == "model.embed_tokens.weight"}
    assert rows == set(tokens().flatten().tolist())


@pytest.mark.parametrize("chunk", [1, 10**9])
def test_experts_in_one_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """As another tool may store them, and with tensors beside them that are no part of the model."""
    make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", **targets("deepseek_v3"))
    merge(tmp_path, adapter)

    def fuse(tensors: dict[str, torch.Tensor]) -> None:
        for layer in (1, 2):
            path = f"model.layers.{layer}.mlp.experts"
            parts = {
                name: torch.stack([tensors.pop(f"{path}.{e}.{name}_proj.weight") for e in range(4)])
                for name in ("gate", "up", "down")
            }
            tensors[f"{path}.gate_up_proj"] = torch.cat((parts["gate"], parts["up"]), dim=1)
            tensors[f"{path}.down_proj"] = parts["down"]
        tensors["model.layers.3.enorm.weight"] = torch.ones(48)

    edit_tensors(tmp_path / "out" / WEIGHTS, fuse)
    monkeypatch.setattr(memory_module, "CHUNK", chunk)
    exact(run(tmp_path, adapter, Checkpoint.open(tmp_path / "out")).merged)


def test_a_peft_without_the_class_that_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then PEFT sums the deltas of all experts itself, and the logits are the same."""
    make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", **targets("deepseek_v3"))
    merged = merge(tmp_path, adapter)
    usual = run(tmp_path, adapter, merged)
    monkeypatch.setattr(peft_reference, "_PROXY_CLASS", "_NotThere")
    report = run(tmp_path, adapter, merged)
    check(report.effect, logits(load(tmp_path / "base")), adapted(tmp_path / "base", adapter))
    exact(report.merged)
    assert report.memory != usual.memory, "all experts at once are counted"


def test_tokens_and_seed(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", target_modules=ATTENTION)
    merged = merge(tmp_path, adapter)
    report = run(tmp_path, adapter, merged, tokens=5, seed=3)
    with torch.no_grad():
        largest = load(tmp_path / "base")(tokens(3, 5)).logits.abs().max()
    assert report.effect is not None
    assert report.effect.largest == pytest.approx(float(largest), rel=1e-5)
    assert (report.tokens, report.seed) == (5, 3)


def test_bfloat16_where_float32_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many: None) -> None:
    """Each step rounds by up to 0.4 %: the right merge is close, a merge of twice the delta is not."""
    make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", **targets("deepseek_v3"))
    merged = merge(tmp_path, adapter, "split")
    monkeypatch.setattr(memory_module, "CHUNK", 1)
    monkeypatch.setattr(memory_module, "OVERHEAD", 0)
    full = run(tmp_path, adapter, merged)
    monkeypatch.setattr(memory_module, "free_memory", lambda: (full.memory - 1) / memory_module.SHARE)
    report = run(tmp_path, adapter, merged)
    assert (full.dtype, report.dtype) == ("float32", "bfloat16")
    assert report.memory < full.memory
    assert report.effect is not None
    assert report.merged is not None
    assert report.absorbed is not None
    assert report.effect.kl == pytest.approx(full.effect.kl, rel=0.2) if full.effect else False
    assert 0 < report.merged.kl < 0.05 * report.effect.kl
    assert 0 < report.absorbed.kl < 0.05 * report.effect.kl


def test_infinite_logits_are_reported(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", target_modules=["o_proj"])
    merge(tmp_path, adapter)
    edit_tensors(tmp_path / "out" / WEIGHTS, lambda t: t["model.norm.weight"].fill_(math.inf))
    report = run(tmp_path, adapter, Checkpoint.open(tmp_path / "out"))
    assert not report.ran
    assert "the merged model are not finite" in report.reason
    json.dumps(report.to_json(), allow_nan=False)


def test_an_adapter_that_peft_loads_in_part(tmp_path: Path) -> None:
    """PEFT only warns of factors that are missing in the file, and initializes them."""
    make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", target_modules=["o_proj", "kv_b_proj"])
    edit_tensors(
        adapter / "adapter_model.safetensors",
        lambda tensors: [tensors.pop(k) for k in list(tensors) if "layers.1.self_attn.o_proj" in k],
    )
    report = run(tmp_path, adapter, merge(tmp_path, adapter, "split"))
    assert (report.ran, report.merged) == (True, None)
    assert "trained numbers" in report.reason


@pytest.mark.slow
def test_threads_are_as_before(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", target_modules=["o_proj"])
    merged = merge(tmp_path, adapter)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run(tmp_path, adapter, merged)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_figures_against_numpy() -> None:
    """The comparison itself, on logits that differ in every way."""
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.randn(6, 11, generator=generator) * 4 for _ in range(2))
    found = difference("a", a, "b", b)
    error, kl, top1 = figures(a.double().numpy(), b.double().numpy())
    assert found.max_error == pytest.approx(error)
    assert found.kl == pytest.approx(kl)
    assert found.top1 == pytest.approx(top1)
    assert 0 <= top1 < 1
    assert found.largest == pytest.approx(float(a.abs().max()))


def test_a_file_that_ends_early_is_an_error(tmp_path: Path) -> None:
    """The file is read ahead in another thread: its error is raised here, and no garbage is computed with."""
    make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", **targets("deepseek_v3"))
    merged = merge(tmp_path, adapter)
    ref = merged["model.layers.2.mlp.experts.3.down_proj.weight"]
    with ref.file.open("r+b") as stream:
        stream.truncate(ref.begin + 100)
    with pytest.raises(OSError, match="changed while it was read"):
        run(tmp_path, adapter, merged)


def test_a_checkpoint_in_float16(tmp_path: Path) -> None:
    make_base(tmp_path / "base", dtype="float16")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", **targets("deepseek_v3"))
    merged = merge(tmp_path, adapter)
    report = run(tmp_path, adapter, merged)
    check(report.merged, adapted(tmp_path / "base", adapter), logits(load(tmp_path / "out", "float32")))
