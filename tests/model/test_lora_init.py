"""Every method × initialization × target × LoRA+ trains, is loaded by plain PEFT and merges, or is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mla_tune.adapter.placement import place
from mla_tune.model.attach import attach, attached_loras
from mla_tune.model.load import load_model
from mla_tune.model.lora_init import initialize
from mla_tune.recipe.load import load_recipe
from mla_tune.recipe.schema import ModelSection
from mla_tune.training import loop as train_loop
from mla_tune.training.optimizer import param_groups
from tests.helpers.marks import fast_cases
from tests.helpers.runs import hash_of, metrics, options

IDS = torch.randint(5, 4000, (2, 30), generator=torch.Generator().manual_seed(0))
CELLS = [
    (method, init, targets, plus)
    for method in ("lora", "rslora", "dora")
    for init in ("default", "gaussian", "orthogonal", "pissa", "olora")
    for targets, plus in (("attention-only", 1), ("safe", 16), ("all-linear", 4))
]


def recipe_of(method: str, init: str, targets: str, plus: float) -> Any:
    sets = [f"adapter.method={method}", f"adapter.init={init}", f"adapter.targets={targets}", "adapter.rank=4"]
    return load_recipe("safe", [*sets, "adapter.alpha=6", f"optimizer.lora_plus_ratio={plus}"])


@fast_cases("lora-default-safe-16", "rslora-pissa-attention-only-1")
@pytest.mark.parametrize("method, init, targets, plus", CELLS)
def test_trains_reloads_and_merges_or_is_refused(
    cli,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    init: str,
    targets: str,
    plus: float,
) -> None:
    out = tmp_path / "run"
    sets = [f"adapter.method={method}", f"adapter.init={init}", f"adapter.targets={targets}", "adapter.rank=4"]
    sets += ["model.attention=sdpa"]  # the model is also called below without the borders that packed attention needs
    sets += ["adapter.alpha=6", f"optimizer.lora_plus_ratio={plus}", "train.max_steps=3", "data.eval_fraction=0"]
    seen: list[torch.Tensor] = []
    real = train_loop.save_result

    def recording(model: Any, *args: Any) -> None:
        model.eval()
        with torch.no_grad():
            seen.append(model(input_ids=IDS).logits.clone())
        real(model, *args)

    monkeypatch.setattr(train_loop, "save_result", recording)
    done = cli("train", "--recipe", "safe", *options(rows_file, out, *sets, "optimizer.learning_rate=1e-3"))
    if method == "dora" and targets != "attention-only":
        assert done.code == 2
        assert "adapter.method: dora: PEFT can't do that for" in done.err
        return
    if init in ("orthogonal", "pissa", "olora") and targets == "all-linear":
        assert done.code == 2
        assert f"adapter.init: {init} is defined for single matrices" in done.err
        return
    assert done.code == 0, done.err
    base: Any = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32).eval()
    with torch.no_grad():
        plain = base(input_ids=IDS).logits
        reloaded = PeftModel.from_pretrained(base, str(out / "adapter")).eval()(input_ids=IDS).logits
    assert (seen[0] - plain).abs().max() > 1e-3
    assert (seen[0] - reloaded).abs().max() <= 1e-5
    merged = cli("merge-absorb", out, "--out", tmp_path / "merged")
    assert merged.code == 0, merged.err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (model(input_ids=IDS).logits - seen[0]).abs().max() <= 2e-5
    rates = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["learning_rate"]
    if plus != 1:
        assert rates["W_O.B"] == pytest.approx(plus * rates["W_O.A"])
    else:
        assert "W_O" in rates


def tiny_with(init: str, method: str = "lora", rank: int = 4) -> tuple[Any, Any, Any]:
    loaded = load_model(ModelSection(preset="tiny", device="cpu"), seed=1)
    before = {n: p.clone() for n, p in loaded.model.named_parameters()}
    recipe = load_recipe("safe", [f"adapter.method={method}", f"adapter.init={init}", f"adapter.rank={rank}"])
    placement = place(loaded.arch, recipe.adapter)
    model = attach(loaded.model, loaded.arch, placement, 0)
    initialize(model, placement, 0)
    return model, before, placement


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", "pissa", "olora"])
@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_nothing_is_changed_before_the_first_step(init: str, method: str) -> None:
    model, before, _ = tiny_with(init, method)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter, before[plain]), name
    with torch.no_grad():
        adapted = model(input_ids=IDS).logits
        with model.disable_adapter():
            assert (adapted - model(input_ids=IDS).logits).abs().max() <= 2e-5
    loras = attached_loras(model)
    assert all(bool(lora.layer.lora_A["default"].weight.any()) for lora in loras)
    assert any(bool(lora.layer.lora_B["default"].weight.any()) for lora in loras) == (
        init not in ("default", "gaussian")
    )


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_the_trained_half_begins_where_pefts_own_does(init: str, method: str) -> None:
    """The oracle: PEFT's initialization of the same matrix, whose product B A is free of s and of the signs of
    vectors."""
    model, before, placement = tiny_with(init, method)
    lora = next(x for x in attached_loras(model) if x.parameter.endswith("layers.2.self_attn.o_proj.weight"))
    weight = before[lora.parameter]
    net = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    net[0].weight.data.copy_(weight)
    config = LoraConfig(
        r=4, lora_alpha=placement.alpha, target_modules=["0"], init_lora_weights=init, use_rslora=method == "rslora"
    )
    theirs: Any = get_peft_model(net, config).base_model.model[0]
    a, b = lora.layer.lora_A["default"].weight, lora.layer.lora_B["default"].weight
    assert a.shape[0] == 8
    wanted = theirs.scaling["default"] * theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    torch.testing.assert_close(lora.scale * b[:, :4] @ a[:4], wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight - lora.scale * b[:, :4] @ a[:4], theirs.base_layer.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_frozen_half_stays(cli, rows_file: Path, tmp_path: Path, init: str) -> None:
    sets = [f"adapter.init={init}", "adapter.rank=4", "model.attention=sdpa"]
    for steps in (1, 5):
        out = tmp_path / str(steps)
        done = cli("train", "--recipe", "safe", *options(rows_file, out, *sets, f"train.max_steps={steps}"))
        assert done.code == 0, done.err
    first, last = (load_file(tmp_path / str(n) / "adapter" / "adapter_model.safetensors") for n in (1, 5))
    for name, tensor in last.items():
        moved = tensor != first[name]
        trained, frozen = (moved[:4], moved[4:]) if "lora_A" in name else (moved[:, :4], moved[:, 4:])
        assert trained.any(), name
        assert not frozen.any(), name
    assert json.loads((tmp_path / "5" / "adapter" / "adapter_config.json").read_text())["r"] == 8


@pytest.mark.slow
@pytest.mark.parametrize("keys", [["adapter.init=pissa", "adapter.dropout=0.1"], ["optimizer.lora_plus_ratio=8"]])
def test_resume_ends_bit_equal(cli, rows_file: Path, tmp_path: Path, keys: list[str]) -> None:
    from tests.helpers.runs import cut_back

    sets = ["train.max_steps=8", "train.save_every=4", "train.keep_checkpoints=9", *keys]
    hashes, lines = [], []
    for resume in (False, True):
        command = ["train", "--recipe", "attention-only", *options(rows_file, tmp_path / "run", *sets)]
        done = cli(*command, *["--resume"] * resume)
        assert done.code == 0, done.err
        hashes.append(hash_of(tmp_path / "run" / "adapter"))
        lines.append((metrics(tmp_path / "run"), metrics(tmp_path / "run", "learning_rate")))
        if not resume:
            cut_back(tmp_path / "run", 4)
    assert hashes[0] == hashes[1]
    assert lines[0] == lines[1]


def test_lora_plus_groups_are_those_of_peft() -> None:
    model, _, placement = tiny_with("default")
    recipe = load_recipe("safe", ["optimizer.lora_plus_ratio=16", "adapter.rank=4", "optimizer.mla_lr_scale=1.0"])
    groups = param_groups(model, placement, recipe)
    ours = {id(p): g["lr"] for g in groups for p in g["params"]}
    lr = recipe.optimizer.learning_rate
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=16)
    wanted = {id(p): g["lr"] for g in theirs.param_groups for p in g["params"]}
    assert ours == pytest.approx(wanted)
    assert {g["role"] for g in groups} >= {"W_O.A", "W_O.B"}


@pytest.mark.parametrize(
    "sets, words",
    [
        (["adapter.init=pissa", "adapter.rank=64"], "has only 56"),
        (["adapter.init=orthogonal", "adapter.rank=3"], "has to be even; 3 is not"),
        (["adapter.init=pissa", "optimizer.weight_decay=0.1"], "decay would shrink"),
        (["adapter.method=none", "adapter.init=pissa"], "adapter.method is none"),
        (["adapter.method=none", "optimizer.lora_plus_ratio=2"], "adapter.method is none"),
        (["optimizer.lora_plus_ratio=0.5"], "expected at least 1.0, got 0.5"),
        (["adapter.dropout=0.1"], "adapter.dropout: 0.1: PEFT can't do that for"),
    ],
)
def test_contradictions_are_told(cli, rows_file: Path, tmp_path: Path, sets: list[str], words: str) -> None:
    done = cli("train", "--recipe", "safe", *options(rows_file, tmp_path / "run", *sets))
    assert done.code == 2
    assert words in done.err.replace("\n", " ")
    assert not (tmp_path / "run").exists()
