"""What ships with the package: the embedded model, its card, the data with its licenses."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mla_tune.arch.build import architecture
from mla_tune.resources import CONFIGS, EMBEDDED_DATA, EMBEDDED_MODEL

CONFIG = json.loads((EMBEDDED_MODEL / "config.json").read_text())
FACTS = json.loads((EMBEDDED_MODEL / "training.json").read_text())


def test_size_and_shape_are_as_promised() -> None:
    assert sum(p.stat().st_size for p in EMBEDDED_MODEL.iterdir()) <= 16e6
    arch = architecture(CONFIG)
    assert 4e6 <= arch.params_total <= 8e6
    d = arch.dims
    assert d.L is not None
    assert d.P + d.R in (64, 96, 128)
    assert 4000 <= arch.vocab_size <= 8192
    roles = {s.role for s in arch.sites}
    assert {"gate", "shared_gate", "experts_gate_up", "router"} <= roles
    # What vLLM and llama.cpp read; transformers' own class writes neither.
    assert CONFIG["topk_method"] == "noaux_tc"
    assert CONFIG["scoring_func"] == "sigmoid"


def test_the_shape_is_that_of_its_preset() -> None:
    preset = json.loads((CONFIGS / "presets" / "embedded.json").read_text())
    differing = {k for k in preset if k in CONFIG and preset[k] != CONFIG[k]}
    assert differing <= {"rope_theta"}


def test_weights_are_bf16_and_routing_bias_float32() -> None:
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    biases = [b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]
    assert {b.dtype for b in biases} == {torch.float32}
    assert all(bool(b.any()) for b in biases), "the experts were balanced in training"


def test_it_was_really_trained() -> None:
    assert FACTS["train_tokens"] >= 20e6
    for domain in ("prose", "code"):
        held = FACTS["held_out"][domain]
        assert held["tokens"] > 20_000
        assert held["loss"] < 0.65 * held["unigram_loss"]


def test_its_measured_loss_is_reproduced() -> None:
    """Text that nobody trained on: the loss must be near the card's, far from that of noise (log 4096 = 8.3)."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval()
    text = "It is a truth that the people of this country have always wished for peace with all nations, and the "
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert loss < FACTS["held_out"]["prose"]["loss"] + 1.5


def test_the_card_says_what_was_measured() -> None:
    card = (EMBEDDED_MODEL / "README.md").read_text()
    for domain in FACTS["held_out"].values():
        assert f"{domain['loss']:.3f} | {domain['unigram_loss']:.3f}" in card
    assert "Python's standard library" in card


def test_the_tokenizer_round_trips_and_has_a_chat_template() -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    for text in ("def f(x):\n\treturn x  # 12345\n", "naïve – “quoted” 漢字 \x07"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    assert rendered == "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>Yes.<｜end▁of▁sentence｜>"
    # The template writes the first token itself, so tokenizing its text must not add a second one.
    ids = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("name", ["mbpp", "gsm8k"])
def test_data_sides_do_not_overlap(name: str) -> None:
    sides = []
    for side in ("train", "held_out"):
        lines = (EMBEDDED_DATA / f"{name}.{side}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert all(r["prompt"].strip() and r["completion"].strip() for r in rows)
        sides.append({r["prompt"] for r in rows})
    assert len(sides[0]) >= 300
    assert len(sides[1]) >= 50
    assert not sides[0] & sides[1]


def test_licenses_are_named() -> None:
    text = (EMBEDDED_DATA / "LICENSES.md").read_text()
    assert re.search(r"CC-BY-4\.0", text)
    assert "Copyright (c) 2021 OpenAI" in text
