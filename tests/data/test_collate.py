"""Batches: shapes and padding, and on a real small MLA model that packed samples don't see each other."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from mla_tune.data.collate import Collator, trainer_rows
from mla_tune.data.encode import Sample
from mla_tune.errors import InputError

PAD, VOCAB, LENGTH = 2, 96, 24
# Rounding alone: fp32 sums in another order, over rows of other lengths; the logits reach 3.
CLOSE = 1e-5


def make_samples(lengths, seed=0) -> list[Sample]:
    """Random ids; a sample's first id stands nowhere else, and its first third is prompt."""
    rng = random.Random(seed)
    samples = []
    for first, n in enumerate(lengths, start=3):
        ids = [first, *(rng.randrange(16, VOCAB) for _ in range(n - 1))]
        samples.append(Sample(ids, [-100 if i <= n // 3 else t for i, t in enumerate(ids)]))
    return samples


# 24 + 24 + 21 tokens when packed: one full row, one of two samples, one that needs padding.
SAMPLES = make_samples([24, 15, 9, 8, 7, 5, 1])


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=24,
        kv_lora_rank=20,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=10,
        max_position_embeddings=64,
        initializer_range=0.1,  # far from zero, so that a leak between samples shows
        pad_token_id=PAD,
        attn_implementation=request.param,
    )
    assert config.use_cache, "the leak that use_cache: False stops needs this default"
    return DeepseekV3ForCausalLM(config)


@torch.no_grad()
def logits_alone(model, sample: Sample) -> torch.Tensor:
    return model(input_ids=torch.tensor([sample.input_ids]), use_cache=False).logits[0]


@torch.no_grad()
def largest_gap(model, batch: dict) -> float:
    """Largest difference between a sample's logits in the batch and alone, over all samples of the batch."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    logits, ids = model(**inputs).logits.flatten(0, 1), batch["input_ids"].flatten().tolist()
    gaps = []
    for sample in SAMPLES:
        if sample.input_ids[0] in ids:
            start = ids.index(sample.input_ids[0])
            part = logits[start : start + len(sample.input_ids)]
            gaps.append((part - logits_alone(model, sample)).abs().max().item())
    assert gaps
    return max(gaps)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("size", [1, 3])
def test_packed_samples_get_the_logits_they_get_alone(model, size, training):
    model.train(training)
    rows = trainer_rows(SAMPLES, LENGTH, packing=True)
    assert len(rows) == 3
    collator = Collator(PAD, LENGTH, packed=True)
    batches = [collator(rows[i : i + size]) for i in range(0, 3, size)]
    for batch in batches:
        assert "attention_mask" not in batch
        assert largest_gap(model, batch) <= CLOSE


def test_without_positions_packed_samples_leak(model):
    model.eval()
    batch = Collator(PAD, LENGTH, packed=True)(trainer_rows(SAMPLES, LENGTH, packing=True))
    del batch["position_ids"]
    assert largest_gap(model, batch) > 0.1


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_with_a_cache_packed_samples_leak(model, training):
    """Why a packed batch sets `use_cache: False`: by default samples see each other although positions restart."""
    model.train(training)
    batch = Collator(PAD, LENGTH, packed=True)(trainer_rows(SAMPLES, LENGTH, packing=True))
    assert batch["use_cache"] is False
    del batch["use_cache"]
    assert largest_gap(model, batch) > 0.1


def test_packing_and_padding_do_not_change_the_loss_per_token(model):
    model.eval()

    @torch.no_grad()
    def loss_sum(packing: bool, size: int) -> tuple[float, int]:
        rows = trainer_rows(SAMPLES, LENGTH, packing=packing)
        total, tokens = 0.0, 0
        for i in range(0, len(rows), size):
            batch = Collator(PAD, LENGTH, packed=packing)(rows[i : i + size])
            n = int((batch["labels"][:, 1:] != -100).sum())
            assert n == int((batch["labels"] != -100).sum()), "a label that no token predicts"
            if n:
                total += model(**batch).loss.item() * n
            tokens += n
        return total, tokens

    alone, tokens = loss_sum(False, 1)
    assert tokens == sum(len(s.labels) - s.labels.count(-100) for s in SAMPLES)
    for packing, size in ((False, 4), (True, 1), (True, 3)):
        assert loss_sum(packing, size) == (pytest.approx(alone, rel=1e-5), tokens)


def test_first_label_of_each_packed_sample_is_masked():
    samples = [Sample([5, 6, 7], [5, 6, 7]), Sample([8, 9], [8, 9])]
    assert trainer_rows(samples, 6, packing=True) == [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, -100, 9], "position_ids": [0, 1, 2, 0, 1]}
    ]
    assert samples[0].labels == [5, 6, 7]


def test_unpacked_batches_are_padded_right():
    rows = trainer_rows(make_samples([3, 9]), 100, packing=False)
    batch = Collator(PAD)(rows)
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    assert {v.shape for v in batch.values()} == {(2, 16)}
    assert batch["input_ids"].tolist()[0] == rows[0]["input_ids"] + [PAD] * 13
    assert batch["labels"].tolist()[0] == rows[0]["labels"] + [-100] * 13
    assert batch["attention_mask"].tolist() == [[1] * 3 + [0] * 13, [1] * 9 + [0] * 7]
    assert Collator(PAD, max_length=10)(rows)["input_ids"].shape == (2, 10)


def test_packed_padding_is_a_sample_of_its_own():
    rows = trainer_rows([Sample([5, 6, 7], [-100, 6, 7]), Sample([8], [-100])], 8, packing=True)
    batch = Collator(PAD, 8, packed=True)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, PAD, PAD, PAD, PAD]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[-100, 6, 7, *[-100] * 5]]


def test_lost_position_ids_are_an_error():
    rows = [{"input_ids": [5, 6], "labels": [-100, 6]}]
    with pytest.raises(InputError, match=r"have no position_ids.*remove_unused_columns=False"):
        Collator(PAD, 8, packed=True)(rows)
