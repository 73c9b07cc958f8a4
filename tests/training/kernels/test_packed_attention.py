"""Packed attention and the flat batch, against each sample alone in stock eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mla_tune.data.padding_free import PaddingFreeCollator
from mla_tune.training.kernels import packed_attention as packed
from tests.helpers.marks import fast_cases
from tests.helpers.packing import LENGTHS, PAIRS, batch_for, rows_of
from tests.helpers.tiny_families import tiny


def samples_of(rows: list[dict[str, list[int]]]) -> list[list[int]]:
    found = []
    for row, lengths in zip(rows, LENGTHS, strict=True):
        start = 0
        for n in lengths:
            found.append(row["input_ids"][start : start + n])
            start += n
    return found


def of_samples(attention: str, logits: torch.Tensor) -> list[torch.Tensor]:
    """The batch's logits, cut at the samples' borders."""
    if attention == packed.NAME:
        return list(logits[0].split([n for row in LENGTHS for n in row]))
    return [part for row, lengths in zip(logits, LENGTHS, strict=True) for part in row[: sum(lengths)].split(lengths)]


@fast_cases("deepseek_v3", "longcat_flash", "llava")
@pytest.mark.parametrize(("name", "attention"), PAIRS)
def test_a_packed_sample_has_the_logits_of_the_sample_alone(name: str, attention: str) -> None:
    packed.register()
    model = tiny(name)
    rows = rows_of(name)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        alone = [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in samples_of(rows)]
        model.set_attn_implementation(attention)
        together = of_samples(attention, model(**batch_for(attention, rows)).logits)
    for one, here in zip(alone, together, strict=True):
        torch.testing.assert_close(here, one, rtol=1e-4, atol=1e-4)


@fast_cases("deepseek_v3", "longcat_flash")
@pytest.mark.parametrize(("name", "attention"), [(n, a) for n, a in PAIRS if a != "eager" or n == "hy_v4"])
def test_gradients_are_those_of_the_samples_alone(name: str, attention: str) -> None:
    packed.register()
    model = tiny(name).train()
    rows = rows_of(name)

    def loss_of(logits: torch.Tensor, ids: list[int]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum")

    model.set_attn_implementation("eager")
    alone = [(ids, model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]) for ids in samples_of(rows)]
    sum(loss_of(logits, ids) for ids, logits in alone if len(ids) > 1).backward()  # type: ignore[union-attr]
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.set_attn_implementation(attention)
    together = of_samples(attention, model(**batch_for(attention, rows)).logits)
    pairs = zip(samples_of(rows), together, strict=True)
    sum(loss_of(logits, ids) for ids, logits in pairs if len(ids) > 1).backward()  # type: ignore[union-attr]
    assert wanted
    for n, p in model.named_parameters():
        if n in wanted:
            scale = wanted[n].abs().max().clamp(min=1e-3)
            assert (p.grad - wanted[n]).abs().max() <= 1e-4 * scale, n


def test_a_flat_batch_has_no_padding() -> None:
    rows = rows_of("deepseek_v3")
    batch = PaddingFreeCollator()(rows)
    assert batch["input_ids"].shape == (1, sum(map(sum, LENGTHS)))
    assert batch["cu_seq_lens_q"].tolist() == [0, 5, 6, 15, 22, 25]
    assert batch["max_length_q"] == 9
    assert batch["position_ids"][0, :7].tolist() == [0, 1, 2, 3, 4, 0, 0]


def test_plain_rows_are_one_sample_each() -> None:
    batch = PaddingFreeCollator()(
        [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    )
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5]
    # A row's first label trains nothing: token i is predicted from token i - 1, here of another row.
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9]]


@pytest.mark.parametrize(
    "odd", [{"attention_mask": torch.ones(1, 1, 4, 4)}, {"s_aux": torch.zeros(2)}, {"sliding_window": 3}]
)
def test_what_packed_attention_does_not_know_is_refused(odd: dict[str, Any]) -> None:
    q = torch.randn(1, 2, 4, 6)
    arguments: dict[str, Any] = {"attention_mask": None, "cu_seq_lens_q": torch.tensor([0, 4])} | odd
    with pytest.raises(NotImplementedError, match="packed attention"):
        packed.packed_attention(torch.nn.Module(), q, q, q, **arguments)
