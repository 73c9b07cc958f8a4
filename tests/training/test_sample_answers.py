"""Samples before and after training: what they say, and that training is the same with and without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mla_tune.recipe.load import load_recipe
from mla_tune.training import sample_answers as module
from mla_tune.training.sample_answers import prompt_of_row, sample_prompts
from tests.helpers.data import ASSISTANT, BOS, USER, make_tokenizer

WORDS = ["red", "green", "blue", "one", "two", "three", "stone", "river", "light", "paper", "glass", "north"]


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": f"Say {w} twice.", "completion": f"{w} {w}"} for w in WORDS * 3]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def train(cli: Any, rows: Path, out: Path, *sets: str) -> dict[str, Any]:
    base = ["model.preset=tiny", "model.base=null", f"data.path={rows}", "train.max_steps=4", "train.batch_size=2"]
    base += ["train.max_length=64", "optimizer.learning_rate=3e-2", *sets]
    done = cli("train", "--recipe", "safe", "--output", str(out), *(x for s in base for x in ("--set", s)))
    assert done.code == 0, done.err
    return json.loads((out / "run.json").read_text())


def losses(out: Path) -> list[Any]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(x["step"], x.get("loss"), x.get("eval_loss"), x.get("grad_norms")) for x in lines]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sets",
    [
        (
            "model.attention=packed",
            "train.activation_checkpointing=mla",
            "adapter.targets=attention",
            "adapter.dropout=0.1",
        ),
        ("model.attention=sdpa", "train.packing=false"),
        ("model.dtype=bfloat16",),
    ],
)
def test_training_is_bit_equal_with_and_without_samples(
    cli, rows_file: Path, tmp_path: Path, sets: tuple[str, ...]
) -> None:
    with_samples = train(cli, rows_file, tmp_path / "with", "output.samples=2", *sets)
    without = train(cli, rows_file, tmp_path / "without", "output.samples=0", *sets)
    assert len(with_samples["samples"]["answers"]) == 2
    assert without["samples"]["answers"] == []
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    one, other = (load_file(tmp_path / n / "adapter/adapter_model.safetensors") for n in ("with", "without"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)
    names = sorted(p.name for p in (tmp_path / "with/adapter").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "without/adapter").iterdir())
    config = [(tmp_path / n / "base/config.json").read_text() for n in ("with", "without")]
    assert config[0] == config[1]


def test_answers_are_those_of_plain_transformers(cli, rows_file: Path, tmp_path: Path) -> None:
    """The oracle is `generate` of the saved base, and of PEFT's own adapter on it."""
    out = tmp_path / "run"
    answers = train(cli, rows_file, out, "output.samples=2")["samples"]["answers"]
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    model: Any = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32).eval()

    def ask(net: Any, prompt: str) -> str:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        new = net.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64)
        return tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)

    assert [a["before"] for a in answers] == [ask(model, a["prompt"]) for a in answers]
    tuned = PeftModel.from_pretrained(model, str(out / "adapter")).eval()
    assert [a["after"] for a in answers] == [ask(tuned, a["prompt"]) for a in answers]
    assert answers[0]["before"] != answers[0]["after"]
    held_out = {f"Say {w} twice.": f"{w} {w}" for w in WORDS}
    assert all(held_out[a["prompt"]] == a["reference"] for a in answers)


def test_asking_puts_everything_back(rows_file: Path) -> None:
    """Modes module by module, attention, random numbers; also where an answer fails."""
    from mla_tune.model.load import load_model
    from mla_tune.model.tokenizer import load_tokenizer, tokenizer_source
    from mla_tune.training.kernels import packed_attention as packed

    section = load_recipe("safe", ["model.preset=tiny", "model.base=null"]).model
    loaded = load_model(section, seed=0)
    net: Any = loaded.model.train()
    net.base_model.layers[1].eval()
    net.set_attn_implementation(packed.register())

    def state() -> Any:
        drawn = torch.random.get_rng_state().tolist()
        return [m.training for m in net.modules()], net.config._attn_implementation, drawn, net.config.use_cache

    before = state()
    tokenizer = load_tokenizer(tokenizer_source(section))
    question = prompt_of_row({"text": "one two three four"}, tokenizer, "auto")
    assert question is not None
    texts, _ = module.answer_prompts(net, loaded, tokenizer, [question])
    assert texts[0]
    assert state() == before
    with pytest.raises(IndexError):
        module.answer_prompts(net, loaded, tokenizer, [module.SamplePrompt([10**6], "", "")])
    assert state() == before
    assert torch.is_grad_enabled()


def test_without_held_out_rows_nothing_is_asked(cli, rows_file: Path, tmp_path: Path) -> None:
    run = train(cli, rows_file, tmp_path / "run", "data.eval_fraction=0", "train.max_steps=1")
    assert run["samples"]["answers"] == []
    assert "no held-out prompt was asked" in (tmp_path / "run/report.html").read_text()


def test_every_weight_trained_is_asked_too(cli, rows_file: Path, tmp_path: Path) -> None:
    run = train(
        cli, rows_file, tmp_path / "run", "adapter.method=none", "output.samples=1", "train.max_steps=1"
    )  # fmt: skip
    answer = run["samples"]["answers"][0]
    assert isinstance(answer["before"], str)
    assert isinstance(answer["after"], str)
    assert "Every weight of the model" in (tmp_path / "run/report.html").read_text()


def test_prompts_of_every_kind_of_row() -> None:
    tokenizer = make_tokenizer()

    def asked(row: dict[str, Any], template: str = "auto") -> tuple[str, str] | None:
        question = prompt_of_row(row, tokenizer, template)
        return None if question is None else (tokenizer.decode(question.ids), question.reference)

    prompt = {"prompt": "the cat", "completion": "sat"}
    assert asked(prompt) == (f"{BOS}{USER}the cat{ASSISTANT}", "sat")
    assert asked(prompt, "none") == (f"{BOS}the cat", "sat")
    turns = [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b"), ("user", "w")]
    chat = {"messages": [{"role": r, "content": c} for r, c in turns]}
    assert asked(chat) == (f"{BOS}s\n\n{USER}u{ASSISTANT}a<｜end▁of▁sentence｜>{USER}v{ASSISTANT}", "b")
    assert asked({"messages": chat["messages"][:2]}) is None
    text = asked({"text": "the cat sat on the mat."})
    assert text is not None
    assert text[0].removeprefix(BOS) + text[1] == "the cat sat on the mat."
    assert asked({"text": "a"}) is None
    ids = tokenizer("the cat sat", add_special_tokens=False)["input_ids"]
    tokens = asked({"input_ids": ids, "labels": [-100] * (len(ids) - 1) + ids[-1:]})
    assert tokens == (tokenizer.decode(ids[:-1]), tokenizer.decode(ids[-1:]))


def test_prompts_that_leave_no_room_are_passed_over() -> None:
    tokenizer, recipe = make_tokenizer(), load_recipe("safe", ["output.samples=2"])
    rows = [{"prompt": "x" * n, "completion": "y"} for n in (400, 5, 300, 6, 7)]
    assert [q.prompt for q in sample_prompts(recipe, rows, tokenizer, 200)] == ["xxxxx", "xxxxxx"]
    assert module.NEW_TOKENS == 64
