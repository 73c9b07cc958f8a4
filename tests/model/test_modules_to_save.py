"""`adapter.modules_to_save`: exactly the named modules are trained, saved, loaded by plain PEFT, and merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mla_tune.arch.build import architecture
from mla_tune.recipe.load import load_recipe
from tests.helpers.marks import fast_cases
from tests.helpers.runs import metrics, options

IDS = torch.arange(5, 30)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def train(cli: Callable[..., Any], rows: Path, out: Path, modules: str, *sets: str) -> dict[str, Any]:
    more = [f"adapter.modules_to_save={modules}", "output.samples=0", *sets]
    done = cli("train", "--recipe", "safe", *options(rows, out, *more))
    assert done.code == 0, done.err
    return json.loads((out / "run.json").read_text())


def base_of(out: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32).state_dict())


@fast_cases("[[]embed_tokens*")
@pytest.mark.parametrize("modules, trained", [
    ("[embed_tokens, lm_head]", ["lm_head", "model.embed_tokens"]),
    ("[model.norm]", ["model.norm"]),
    ("[kv_a_layernorm]", [f"model.layers.{i}.self_attn.kv_a_layernorm" for i in range(9)]),
])  # fmt: skip
def test_exactly_those_are_trained_and_saved(
    modules: str,
    trained: list[str],
    cli: Callable[..., Any],
    rows_file: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    run = train(cli, rows_file, out, modules, "train.max_steps=3")
    base = base_of(out)
    trained = [path for path in trained if f"{path}.weight" in base]
    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    whole = {k.removeprefix("base_model.model."): t for k, t in saved.items() if ".lora_" not in k}
    assert sorted(whole) == [f"{path}.weight" for path in sorted(trained)]
    for key, tensor in whole.items():
        assert tensor.dtype == torch.float32
        assert not torch.equal(tensor, base[key]), key
    assert run["adapter"]["modules_to_save"] == {path: base[f"{path}.weight"].numel() for path in trained}
    assert run["held_out_loss"]["after"] < run["held_out_loss"]["before"]
    # Plain PEFT loads it: the loaded model has the loss that the run reported.
    plain = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    before = logits(plain)
    tuned = PeftModel.from_pretrained(plain, out / "adapter")
    assert not torch.equal(logits(tuned), before)
    # … and merge-absorb writes it into the base.
    merged = cli("merge-absorb", str(out), "--out", str(tmp_path / "merged"))
    assert merged.code == 0, merged.err
    by_us = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(by_us), logits(tuned), rtol=1e-4, atol=1e-4)


def test_gradients_and_rates_against_plain_torch(
    cli: Callable[..., Any],
    rows_file: Path,
    tmp_path: Path,
) -> None:
    """AdamW's first step changes every number that has a gradient by its learning rate.  So the change shows that the
    head has learning_rate × mla_lr_scale × modules_to_save_lr_scale, and W_O its own rate."""
    out = tmp_path / "run"
    sets = ["train.max_steps=1", "optimizer.warmup_ratio=0", "optimizer.schedule=constant", "optimizer.weight_decay=0"]
    run = train(cli, rows_file, out, "[lm_head, embed_tokens]", "optimizer.modules_to_save_lr_scale=0.25", *sets)
    rate = 1e-2 * 0.5 * 0.25
    assert run["adapter"]["learning_rate"]["lm_head"] == pytest.approx(rate)
    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    base = base_of(out)
    for name in ("lm_head", "model.embed_tokens"):
        moved = (saved[f"base_model.model.{name}.weight"] - base[f"{name}.weight"]).abs()
        assert float(moved.max()) == pytest.approx(rate, rel=1e-2)
    # Of the embedding, only tokens that are in the data change; of the head, every row changes.
    moved = (saved["base_model.model.model.embed_tokens.weight"] - base["model.embed_tokens.weight"]).abs()
    assert 0 < float((moved.amax(1) > 0).float().mean()) < 0.5


def test_the_trained_head_takes_part_in_the_loss(
    cli: Callable[..., Any],
    rows_file: Path,
    tmp_path: Path,
) -> None:
    """The held-out loss that run.json has, computed again by plain PEFT and transformers."""
    from mla_tune.data.prepare import prepare
    from mla_tune.model.tokenizer import load_tokenizer

    out = tmp_path / "run"
    run = train(cli, rows_file, out, "[lm_head]", "train.activation_checkpointing=mla")
    config = json.loads((out / "base" / "config.json").read_text())
    tokenizer = load_tokenizer(str(out / "base"))
    data = prepare(load_recipe(str(out / "recipe.yaml")), architecture(config), tokenizer)
    model = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    tuned = PeftModel.from_pretrained(model, out / "adapter").eval()
    assert data.sources[0].held_out is not None
    total, count = 0.0, 0
    for sample in data.sources[0].held_out.samples:
        with torch.no_grad():
            scores = tuned(input_ids=torch.tensor([sample.input_ids])).logits[0, :-1].double()
        labels = torch.tensor(sample.labels[1:])
        keep = labels != -100
        total -= float(scores.log_softmax(-1)[keep].gather(1, labels[keep, None]).sum())
        count += int(keep.sum())
    assert total / count == pytest.approx(run["held_out_loss"]["after"], rel=1e-5)


@pytest.mark.slow
def test_bfloat16_bases_keep_their_dtype_between_layers(
    cli: Callable[..., Any],
    rows_file: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    run = train(cli, rows_file, out, "[embed_tokens, input_layernorm]", "model.dtype=bfloat16")
    assert run["held_out_loss"]["after"] < run["held_out_loss"]["before"]
    from mla_tune.adapter.placement import place
    from mla_tune.model.attach import attach
    from mla_tune.model.load import load_model
    from mla_tune.model.modules_to_save import modules_to_save_copies, with_modules_to_save
    from mla_tune.recipe.schema import AdapterSection, ModelSection

    loaded = load_model(ModelSection(base=str(out / "base"), dtype="bfloat16", device="cpu"))
    config = json.loads((out / "base" / "config.json").read_text())
    placement = with_modules_to_save(place(loaded.arch, AdapterSection()), loaded.arch, config, ["embed_tokens"], False)
    net = attach(loaded.model, loaded.arch, placement, 0)
    assert {p.dtype for c in modules_to_save_copies(net).values() for p in c.parameters()} == {torch.float32}
    assert net.get_base_model().model.embed_tokens(IDS).dtype == torch.bfloat16


@pytest.mark.slow
def test_resume_is_bit_equal(cli: Callable[..., Any], rows_file: Path, tmp_path: Path) -> None:
    import shutil

    from tests.helpers.runs import cut_back, hash_of

    sets = ["train.max_steps=8", "train.save_every=4", "train.keep_checkpoints=9", "train.packing=false"]
    straight, again = tmp_path / "straight", tmp_path / "again"
    train(cli, rows_file, straight, "[embed_tokens, model.norm]", *sets)
    shutil.copytree(straight, again)
    cut_back(again, 4)
    more = [*sets, "adapter.modules_to_save=[embed_tokens, model.norm]", "output.samples=0"]
    done = cli("train", "--recipe", "safe", "--resume", *options(rows_file, again, *more))
    assert done.code == 0, done.err
    assert hash_of(again / "adapter") == hash_of(straight / "adapter")
    assert metrics(again) == metrics(straight)


def test_plan_counts_them(cli: Callable[..., Any]) -> None:
    sets = ["--set", "adapter.modules_to_save=[lm_head, q_a_layernorm]", "--set", "model.base=deepseek-v3"]
    document = json.loads(cli("plan", "--recipe", "safe", "--no-data", "--json", *sets).out)
    plain = json.loads(cli("plan", "--recipe", "safe", "--no-data", "--json", *sets[2:]).out)
    head, norms = 129280 * 7168, 61 * 1536
    assert document["trainable_params"] - plain["trainable_params"] == head + norms
    rows = {r["role"]: r for r in document["roles"]}
    assert rows["lm_head"]["params"] == head
    assert rows["q_a_layernorm"]["params"] == norms
    assert document["memory"]["optimizer"] - plain["memory"]["optimizer"] == 8 * (head + norms)
    shown = cli("plan", "--recipe", "safe", "--no-data", *sets).out
    assert "lm_head" in shown
    assert "whole" in shown


@pytest.mark.parametrize(
    "sets, says",
    [
        (["adapter.modules_to_save=[lm_haed]"], "no module 'lm_haed'; did you mean 'lm_head'?"),
        (["adapter.modules_to_save=[mlp]"], "has modules inside, or is a stack of experts"),
        (["adapter.modules_to_save=[o_proj]"], "has a LoRA already"),
        (["adapter.modules_to_save=[lm_head]", "adapter.method=none"], "with method none every weight is trained"),
        (["adapter.modules_to_save=[experts]"], "has modules inside, or is a stack of experts"),
        (["adapter.modules_to_save=[kv_b_proj]", "model.quantize=nf4", "model.preset=null", "model.base=embedded"],
         "is quantized in this base"),
    ],
)  # fmt: skip
def test_what_can_not_be_trained_whole(
    sets: list[str],
    says: str,
    cli: Callable[..., Any],
    rows_file: Path,
    tmp_path: Path,
) -> None:
    done = cli("train", "--recipe", "safe", *options(rows_file, tmp_path / "run", *sets))
    assert done.code == 2
    assert says in done.err
    assert not (tmp_path / "run").exists()


def test_tied_embeddings_are_refused(cli: Callable[..., Any]) -> None:
    sets = ["--set", "adapter.modules_to_save=[embed_tokens]", "--set", "model.base=minicpm3-4b"]
    done = cli("plan", "--recipe", "safe", "--no-data", *sets)
    assert done.code == 2
    assert "embeddings and output head of this model are one matrix" in done.err
