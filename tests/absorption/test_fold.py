"""Split and fold: float64 attention written by hand as the oracle, costs counted product by product."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from mla_tune.absorption.fold import (
    LAYOUTS,
    absorbed_shapes,
    attention_costs,
    fold_output,
    fold_query,
    foldable_families,
    latent_scales,
    split_heads,
    unsupported_reason,
)
from mla_tune.absorption.split import split_kv_b
from mla_tune.arch.build import architecture
from mla_tune.arch.dims import MLADims
from mla_tune.arch.families import BY_TYPE, FAMILIES

ROOT = Path(__file__).parents[2]
DIMS = MLADims(H=3, P=5, R=4, V=7, C=11, L=9, D=13)
NO_COMPRESSION = MLADims(H=3, P=5, R=4, V=7, C=11, L=None, D=13)
V3 = MLADims(H=128, P=128, R=64, V=128, C=512, L=1536, D=7168)
T, S = 4, 6


@pytest.mark.parametrize("d", [DIMS, NO_COMPRESSION], ids=["compressed query", "plain query"])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (1.7, 0.6)], ids=["", "scaled latents"])
def test_folded_attention_equals_expanded_attention(d: MLADims, scales: tuple[float, float]) -> None:
    """Compute the output of a module from query latent and cache in both forms, which share only the weights."""
    rng = np.random.default_rng(0)
    W_UQ = rng.normal(size=(d.H * (d.P + d.R), d.L or d.D)) / 3
    W_UKV = rng.normal(size=(d.H * (d.P + d.V), d.C)) / 3
    W_O = rng.normal(size=(d.D, d.H * d.V)) / 3
    c_q, latent = rng.normal(size=(T, d.L or d.D)), scales[1] * rng.normal(size=(S, d.C))
    angle = rng.normal(size=(T, d.H, d.R))  # stands for the position: the rope part of the query is not linear in T
    k_rope, temperature = rng.normal(size=(S, d.R)), 1 / np.sqrt(d.P + d.R)

    expected = np.zeros((T, d.D))
    for t in range(T):
        for h in range(d.H):
            q = scales[0] * (W_UQ[h * (d.P + d.R) : (h + 1) * (d.P + d.R)] @ c_q[t])
            kv = latent @ W_UKV[h * (d.P + d.V) : (h + 1) * (d.P + d.V)].T
            scores = kv[:, : d.P] @ q[: d.P] + k_rope @ (np.cos(angle[t, h]) * q[d.P :])
            expected[t] += W_O[:, h * d.V : (h + 1) * d.V] @ (softmax(scores * temperature) @ kv[:, d.P :])

    W_UK, W_UV = split_heads(W_UKV, d)
    per_head = W_UQ.reshape(d.H, d.P + d.R, -1)
    W_QK = np.stack([fold_query(per_head[h, : d.P], W_UK[h]) for h in range(d.H)])
    W_VO = np.stack([fold_output(W_O[:, h * d.V : (h + 1) * d.V], W_UV[h]) for h in range(d.H)])
    assert {"W_QK": W_QK.shape, "W_VO": W_VO.shape} == absorbed_shapes(d, "fold")
    q_absorbed = scales[0] * np.einsum("tq,hqc->thc", c_q, W_QK)
    q_rope = scales[0] * np.einsum("tq,hrq->thr", c_q, per_head[:, d.P :]) * np.cos(angle)
    scores = q_absorbed @ latent.T + q_rope @ k_rope.T
    found = np.einsum("hdc,thc->td", W_VO, softmax(scores * temperature) @ latent)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


def test_split_heads_is_the_torch_split() -> None:
    rows = np.random.default_rng(0).integers(0, 1 << 16, (DIMS.H * (DIMS.P + DIMS.V), DIMS.C), np.uint16)
    halves = split_heads(rows, DIMS)
    expected = split_kv_b(torch.from_numpy(rows.view(np.int16)), DIMS)
    for name, half, other in zip(("W_UK", "W_UV"), halves, expected, strict=True):
        assert half.flags.c_contiguous
        assert half.shape == absorbed_shapes(DIMS, "split")[name]
        assert np.array_equal(half, other.numpy().view(np.uint16))
    some = split_heads(rows[DIMS.P + DIMS.V : 3 * (DIMS.P + DIMS.V)], DIMS)
    assert all(np.array_equal(half[1:], part) for half, part in zip(halves, some, strict=True))


def test_costs_at_deepseek_v3_size() -> None:
    """Published figures: millions of parameters of a layer on the query and on the output side."""
    by_name = {form.name: form for form in attention_costs(V3, 4096)}
    assert (by_name["split"].query_params, by_name["split"].output_params) == (33_554_432, 125_829_120)
    assert (by_name["fold"].query_params, by_name["fold"].output_params) == (100_663_296, 469_762_048)
    assert by_name["fold"].params == 570_425_344
    # 70,272 bytes a token over 61 layers in bfloat16, against 4,997,120 expanded.
    in_all = {form.name: form for form in attention_costs(V3, 4096, 61)}
    assert (in_all["fold"].cache * 2, in_all["split"].cache * 2) == (70_272, 70_272)
    assert in_all["expanded"].cache * 2 == 4_997_120
    assert in_all["fold"].flops == 61 * by_name["fold"].flops


@pytest.mark.parametrize("d", [DIMS, NO_COMPRESSION], ids=["compressed query", "plain query"])
def test_flops_are_those_of_the_products(d: MLADims) -> None:
    """Decode one token with each form, and count the operations of every product that absorption changes."""
    count = 0

    def mul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return a @ b

    ones = np.ones
    Q = d.L or d.D
    found = {}
    for name in ("expanded", "re-expanded", "split", "fold"):
        count = 0
        out = np.zeros((d.D, 1))
        for _ in range(d.H):
            if name in ("expanded", "re-expanded"):
                q = mul(ones((d.P, Q)), ones((Q, 1)))
                new = S if name == "re-expanded" else 1
                kv = mul(ones((d.P + d.V, d.C)), ones((d.C, new)))
                keys, values = (np.repeat(part, S // new, axis=1) for part in (kv[: d.P], kv[d.P :]))
                scores = mul(ones((S, d.P + d.R)), np.concatenate([q, ones((d.R, 1))]))
                assert keys.shape[1] == S
                out += mul(ones((d.D, d.V)), mul(values, scores))
                continue
            if name == "split":
                q = mul(ones((d.C, d.P)), mul(ones((d.P, Q)), ones((Q, 1))))
            else:
                q = mul(ones((d.C, Q)), ones((Q, 1)))
            scores = mul(ones((S, d.C + d.R)), np.concatenate([q, ones((d.R, 1))]))
            o = mul(ones((d.C, S)), scores)
            out += mul(ones((d.D, d.V)), mul(ones((d.V, d.C)), o)) if name == "split" else mul(ones((d.D, d.C)), o)
        found[name] = count
    assert found == {form.name: form.flops for form in attention_costs(d, S)}


def test_foldable_families_have_nothing_between_the_folded_matrices() -> None:
    """`tests.merge.test_families` tests that all other families are refused."""
    foldable = [family for family in FAMILIES if family.fold]
    assert len(foldable) == len(foldable_families())
    for family in foldable:
        assert not family.parts.get("mla")
        assert not family.needs_mask
    assert latent_scales(BY_TYPE["deepseek_v3"], V3) == {}
    assert latent_scales(BY_TYPE["longcat_flash"], MLADims(64, 128, 64, 128, 512, 1536, 6144)) == {
        "query": 2.0,
        "latent": pytest.approx(12**0.5),
    }


def test_the_scales_are_those_of_transformers() -> None:
    from transformers.models.longcat_flash.configuration_longcat_flash import LongcatFlashConfig
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMLA

    d = MLADims(H=3, P=10, R=6, V=12, C=14, L=20, D=36)
    config = LongcatFlashConfig(
        hidden_size=d.D, num_attention_heads=d.H, q_lora_rank=d.L, kv_lora_rank=d.C, qk_nope_head_dim=d.P,
        qk_rope_head_dim=d.R, v_head_dim=d.V, head_dim=d.R,
    )  # fmt: skip
    module = LongcatFlashMLA(config, 0)
    expected = {"query": module.mla_scale_q_lora, "latent": module.mla_scale_kv_lora}
    assert latent_scales(BY_TYPE["longcat_flash"], d) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("q_b_proj.bias", "a bias on the query"),
        ("q_proj.bias", "a bias on the query"),
        ("kv_b_proj.bias", "keys and values with a bias"),
        ("q_norm.weight", "a norm stands between W_UQ and W_UK"),
        ("q_b_layernorm.weight", "a norm stands between W_UQ and W_UK"),
        ("k_norm.weight", "a norm stands between W_UK and the scores"),
        ("g_proj.weight", "an output gate"),
        ("gate_proj.weight", "an output gate"),
        ("indexer.wk.weight", "not known"),
        ("sinks", "not known"),
        ("q_b_proj.weight_packed", "not known"),
        *(
            (name, None)
            for name in (
                "q_a_proj.bias", "q_a_layernorm.weight", "q_b_proj.weight", "q_b_proj.weight_scale_inv", "o_proj.bias",
                "kv_a_proj_with_mqa.bias", "kv_a_layernorm.weight", "kv_b_proj.weight_scale", "o_proj.input_scale",
            )
        ),
    ],
)  # fmt: skip
def test_reasons_why_fold_is_not_exact(name: str, reason: str | None) -> None:
    found = unsupported_reason(name)
    assert found is None if reason is None else reason in (found or "")


def test_the_cost_table_of_the_docs() -> None:
    text = (ROOT / "docs" / "absorption.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z0-9.-]+) \| ([\d.]+) → ([\d.]+) \| ([\d.]+) → ([\d.]+) \| ([\d.]+)× \|$", text, re.M)
    configs = {file.stem: json.loads(file.read_text()) for file in (ROOT / "configs" / "models").glob("*.json")}
    folded = {name for name, c in configs.items() if architecture(c).family.fold}
    assert {row[0] for row in rows} == folded
    for name, *figures in rows:
        config = json.loads((ROOT / "configs" / "models" / f"{name}.json").read_text())
        form = {form.name: form for form in attention_costs(architecture(config).dims, 4096)}
        split, fold = form["split"], form["fold"]
        millions = (split.query_params, fold.query_params, split.output_params, fold.output_params)
        assert figures == [*(f"{n / 1e6:.1f}" for n in millions), f"{fold.params / split.params:.1f}"], name
    for mode in LAYOUTS:
        assert all(f"`{part.split(' ')[0]}`" in text for part in LAYOUTS[mode].split("), "))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
