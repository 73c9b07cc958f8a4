"""The split of kv_b_proj, and absorbed attention with it: float64, numpy as the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mla_tune.absorption.split import fuse_kv_b, split_kv_b
from mla_tune.arch.dims import MLADims

DIMS = MLADims(H=3, P=5, R=4, V=7, C=11, L=9, D=13)
RANK = 2
RNG = np.random.default_rng(0)


def test_split_takes_key_rows_then_value_rows_of_each_head() -> None:
    weight = RNG.normal(size=(DIMS.H * (DIMS.P + DIMS.V), DIMS.C))
    W_UK, W_UV = split_kv_b(torch.from_numpy(weight), DIMS)
    assert W_UK.shape == (DIMS.H, DIMS.C, DIMS.P)
    assert W_UV.shape == (DIMS.H, DIMS.V, DIMS.C)
    for h in range(DIMS.H):
        first = h * (DIMS.P + DIMS.V)
        assert np.array_equal(W_UK[h].numpy(), weight[first : first + DIMS.P].T)
        assert np.array_equal(W_UV[h].numpy(), weight[first + DIMS.P : first + DIMS.P + DIMS.V])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_fuse_is_the_inverse_bit_for_bit(dtype: torch.dtype) -> None:
    weight = torch.randn(DIMS.H * (DIMS.P + DIMS.V), DIMS.C).to(dtype)
    W_UK, W_UV = split_kv_b(weight, DIMS)
    assert W_UK.is_contiguous()
    assert W_UV.is_contiguous()
    assert torch.equal(fuse_kv_b(W_UK, W_UV), weight)


def test_absorbed_attention_with_the_split_equals_expanded_attention() -> None:
    weight, x = kv_b(), inputs()
    W_UK, W_UV = (t.numpy() for t in split_kv_b(torch.from_numpy(weight), DIMS))
    np.testing.assert_allclose(absorbed(W_UK, W_UV, **x), expanded(weight, **x), rtol=1e-12, atol=1e-13)


def test_an_unmerged_lora_stays_low_rank_in_the_absorbed_form() -> None:
    """q̃ += s·(q_nope B_K) A and o += s·(õ Aᵀ) B_Vᵀ equal merging first, and merging then splitting."""
    weight, x, scale = kv_b(), inputs(), 1.7
    A, B = RNG.normal(size=(RANK, DIMS.C)), RNG.normal(size=(weight.shape[0], RANK))
    merged = weight + scale * B @ A
    W_UK, W_UV = (t.numpy() for t in split_kv_b(torch.from_numpy(weight), DIMS))
    B_K, B_V = (t.numpy() for t in split_kv_b(torch.from_numpy(B), DIMS))  # (H, r, P), (H, V, r)
    low_rank = absorbed(W_UK, W_UV, **x, lora=(A, B_K, B_V, scale))
    np.testing.assert_allclose(low_rank, expanded(merged, **x), rtol=1e-12, atol=1e-13)
    split = (t.numpy() for t in split_kv_b(torch.from_numpy(merged), DIMS))
    np.testing.assert_allclose(low_rank, absorbed(*split, **x), rtol=1e-12, atol=1e-13)


def kv_b() -> np.ndarray:
    return RNG.normal(size=(DIMS.H * (DIMS.P + DIMS.V), DIMS.C)) / 4


def inputs(T: int = 4, S: int = 6) -> dict[str, np.ndarray]:
    """Queries of T tokens and the cache of S tokens: latents (S, C) and roped shared keys (S, R)."""
    return {
        "q_nope": RNG.normal(size=(T, DIMS.H, DIMS.P)),
        "q_rope": RNG.normal(size=(T, DIMS.H, DIMS.R)),
        "latent": RNG.normal(size=(S, DIMS.C)),
        "k_rope": RNG.normal(size=(S, DIMS.R)),
    }


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def expanded(weight: np.ndarray, q_nope, q_rope, latent, k_rope) -> np.ndarray:
    """(T, H, V), head by head, with keys and values made for every cached token."""
    heads = []
    for h in range(DIMS.H):
        rows = weight[h * (DIMS.P + DIMS.V) : (h + 1) * (DIMS.P + DIMS.V)]
        key, value = latent @ rows[: DIMS.P].T, latent @ rows[DIMS.P :].T
        scores = (q_nope[:, h] @ key.T + q_rope[:, h] @ k_rope.T) / np.sqrt(DIMS.P + DIMS.R)
        heads.append(softmax(scores) @ value)
    return np.stack(heads, axis=1)


def absorbed(W_UK, W_UV, q_nope, q_rope, latent, k_rope, lora=None) -> np.ndarray:
    """(T, H, V) with the latent as the only key and value."""
    q = np.einsum("hcp,thp->thc", W_UK, q_nope)
    if lora:
        A, B_K, B_V, scale = lora
        q = q + scale * np.einsum("hrp,thp->thr", B_K, q_nope) @ A
    scores = (np.einsum("thc,sc->ths", q, latent) + np.einsum("thr,sr->ths", q_rope, k_rope)) / np.sqrt(DIMS.P + DIMS.R)
    o = np.einsum("ths,sc->thc", softmax(scores), latent)
    result = np.einsum("hvc,thc->thv", W_UV, o)
    if lora:
        result = result + scale * np.einsum("hvr,thr->thv", B_V, o @ A.T)
    return result
