"""`generate`: transformers' own generate is the oracle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mla_tune.resources import EMBEDDED_MODEL
from tests.helpers.runs import options

PROMPT = "Write a Python function add. Return the sum of a and b."


def answer(cli, *args: str) -> dict:
    done = cli("generate", *args, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def stock(prompt: str, n: int, chat: bool) -> str:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval()
    if chat:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
    else:
        text = tokenizer.bos_token + prompt
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    out = model.generate(**ids, max_new_tokens=n, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("raw", [False, True])
def test_greedy_equals_transformers(cli, raw: bool) -> None:
    got = answer(cli, "embedded", "--prompt", PROMPT, "--max-new-tokens", "12", *["--raw"] * raw)
    assert got["text"] == stock(PROMPT, 12, chat=not raw)
    assert 0 < got["tokens"] <= 12


def test_sampling_is_seeded(cli) -> None:
    args = ("embedded", "--prompt", PROMPT, "-n", "12", "-t", "1.0")
    one, same, other = (answer(cli, *args, "--seed", s)["text"] for s in ("1", "1", "2"))
    assert one == same
    assert one != other


def test_run_folder_adapter_and_merged_agree(cli, rows_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained = cli("train", "--recipe", "all-linear", *options(rows_file, run, "train.max_steps=8"))
    assert trained.code == 0, trained.err
    base = answer(cli, str(run / "base"), "--prompt", "Say red twice.", "-n", "8")["text"]
    by_run = answer(cli, str(run), "--prompt", "Say red twice.", "-n", "8")["text"]
    by_adapter = answer(cli, str(run / "adapter"), "--prompt", "Say red twice.", "-n", "8")["text"]
    explicit = answer(cli, str(run / "base"), "--adapter", str(run), "--prompt", "Say red twice.", "-n", "8")["text"]
    merged = cli("merge-absorb", str(run))
    assert merged.code == 0, merged.err
    by_merged = answer(cli, str(run / "merged"), "--prompt", "Say red twice.", "-n", "8")["text"]
    assert by_run == by_adapter == explicit == by_merged != base


@pytest.mark.slow
def test_merged_logits_equal_base_and_adapter(cli, rows_file: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    run = tmp_path / "run"
    assert cli("train", "--recipe", "all-linear", *options(rows_file, run, "train.max_steps=8")).code == 0
    assert cli("merge-absorb", str(run)).code == 0
    ids = torch.randint(5, 4000, (2, 40), generator=torch.Generator().manual_seed(0))
    base = AutoModelForCausalLM.from_pretrained(run / "base", dtype=torch.float32).eval()
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        tuned = PeftModel.from_pretrained(base, str(run / "adapter")).eval()(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32).eval()(input_ids=ids).logits
    assert (tuned - plain).abs().max() > 0.1
    assert (merged - tuned).abs().max() <= 1e-4


@pytest.mark.slow
def test_a_truncated_model_and_an_adapter_of_another_model_are_named(cli, rows_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cli("train", "--recipe", "safe", *options(rows_file, run, "train.max_steps=1")).code == 0
    other = cli("generate", "embedded", "--adapter", str(run), "--prompt", "x")
    assert other.code == 2
    assert "this adapter does not fit" in other.err
    weights = run / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for args in (("generate", str(run / "base"), "--prompt", "x"), ("generate", str(run), "--prompt", "x")):
        broken = cli(*args)
        assert broken.code == 2
        assert "damaged or incomplete" in broken.err
        assert "Traceback" not in broken.err


@pytest.mark.parametrize(
    "args, words",
    [
        (("embedded", "--prompt", "a " * 3000), "more than the model's window of 1024"),
        (("embedded", "--prompt", "  "), "--prompt is empty"),
        (("embedded", "--prompt", "x", "--adapter", "nowhere"), "not an adapter folder"),
        (("nowhere/at", "--prompt", "x"), "nowhere/at"),
    ],
)
def test_bad_input(cli, args: tuple[str, ...], words: str) -> None:
    done = cli("generate", *args)
    assert done.code == 2
    assert words in done.err
    assert "Traceback" not in done.err
