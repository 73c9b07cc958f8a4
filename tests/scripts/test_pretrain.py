"""scripts/pretrain_tiny.py: trains, resumes to the same weights, and writes a model that transformers opens."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[2] / "scripts" / "pretrain_tiny.py"
CONFIG = {
    "model_type": "deepseek_v3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "max_position_embeddings": 64,
    "num_nextn_predict_layers": 0,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    words = ["the", "cat", "saw", "a", "dog", "and", "then", "another", "on", "an", "old", "stone", "bridge", "river"]
    draw = random.Random(0)
    lines = [" ".join(draw.choices(words, k=30)) for _ in range(6000)]
    (folder / "text.txt").write_text("\n\n".join(lines))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def run(text: Path, work: Path, *extra: str) -> subprocess.CompletedProcess[str]:
    args = ["--text", text / "text.txt", "--no-stdlib", "--config", text / "config.json", "--work", work]
    args += ["--out", work / "model", "--vocab-size", "300", "--tokens", "1536", "--batch-size", "4", "--length", "64"]
    args += ["--no-compile", "--warmup", "1", "--held-out", "0.2", *extra]
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, args)], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_resumed_equals_straight_and_the_result_opens(text: Path, tmp_path: Path) -> None:
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    done = run(text, straight)
    assert done.returncode == 0, done.stderr
    first = run(text, halves, "--max-steps-now", "4")
    assert first.returncode == 0, first.stderr
    assert not (halves / "model").exists()
    second = run(text, halves)
    assert "continuing at step 4 of 6" in second.stdout, second.stderr
    a, b = (load_file(w / "model" / "model.safetensors") for w in (straight, halves))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)

    model = AutoModelForCausalLM.from_pretrained(straight / "model")
    tokenizer = AutoTokenizer.from_pretrained(straight / "model")
    ids = torch.tensor([tokenizer("the cat saw")["input_ids"]])
    assert model(input_ids=ids).logits.isfinite().all()
    facts = json.loads((straight / "model" / "training.json").read_text())
    assert facts["train_tokens"] == 1536
    assert facts["held_out"]["prose"]["loss"] > 0
    assert "unigram" in (straight / "model" / "README.md").read_text()
    bias = [t for k, t in a.items() if k.endswith("e_score_correction_bias")]
    assert bias
    assert all(bool(t.any()) for t in bias), "the routing bias has to move"


@pytest.mark.slow
def test_another_length_of_run_does_not_mix_in(text: Path, tmp_path: Path) -> None:
    assert run(text, tmp_path, "--max-steps-now", "2").returncode == 0
    again = run(text, tmp_path, "--tokens", "4096")
    assert again.returncode != 0
    assert "give another --work" in again.stderr
