"""Every family × every shipped placement: what was planned is attached, learns, and is there again after save and load.

The oracles are transformers' own loss and PEFT's own loader, on the models of `tests.helpers.tiny_families`.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from safetensors.torch import load_file

from mla_tune.adapter.peft_config import peft_config
from mla_tune.adapter.placement import Placement, PlannedSite
from mla_tune.arch.build import architecture
from mla_tune.arch.roles import GROUPS, PRESETS, Role
from mla_tune.data.collate import Collator
from mla_tune.errors import InputError, PlacementError
from mla_tune.preflight.family_limits import apply_family_limits
from mla_tune.recipe.load import load_recipe
from mla_tune.training.kernels.chunked_loss import use_chunked_loss
from mla_tune.training.kernels.lora_linear import use_lora_factors
from mla_tune.training.kernels.mla_checkpointing import enable_mla_checkpointing
from tests.helpers.families import checkpoint, rows
from tests.helpers.family_adapters import IDS, LOST, adapted, logits, planned
from tests.helpers.marks import fast_cases, fast_families
from tests.helpers.tiny_families import FAMILIES, VOCABULARY, build, tiny

KDA = ("bailing_hybrid", "glm5_next", "kimi_linear")
CELLS = [(name, preset) for name in FAMILIES for preset in PRESETS]


def lora_layers(model: Any) -> dict[str, LoraLayer]:
    """Adapted parameter → PEFT's layer, read from the module tree."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            leaf = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            found[f"{path.removeprefix('base_model.model.').replace('.base_layer', '')}.{leaf}"] = module
    return found


@fast_cases("deepseek_v3", "kimi_linear-all-linear", "longcat_flash-all-linear")
@pytest.mark.parametrize(("name", "preset"), CELLS)
def test_attaches_learns_and_is_there_after_save_and_load(name: str, preset: str, tmp_path: Path) -> None:
    if preset in LOST.get(name, ()):
        with pytest.raises(PlacementError, match=r"don't survive saving.*targets: attention-only"):
            planned(name, preset)
        return
    placement = planned(name, preset)
    model = adapted(name, placement)
    layers = lora_layers(model)
    assert set(layers) == {p.site.parameter for p in placement.sites}
    with torch.no_grad():
        plain = logits(tiny(name))
        tuned = logits(model.eval())
    assert (tuned - plain).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    again: Any = PeftModel.from_pretrained(tiny(name), str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.equal(logits(again), tuned)

    trained = [p for p in model.parameters() if p.requires_grad]
    before = model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss
    before.backward()
    for parameter, layer in layers.items():
        factors: Any = (layer.lora_A["default"], layer.lora_B["default"])
        for factor in factors:
            assert factor.weight.grad is not None, parameter
            assert factor.weight.grad.abs().max() > 0, parameter
    # Small enough that the gradient foretells what a step does.
    torch.optim.SGD(trained, lr=1e-4 / max(float(p.grad.abs().max()) for p in trained if p.grad is not None)).step()
    after = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    assert after < before


@pytest.mark.parametrize("group", ["dense", "shared", "experts"])
def test_what_is_refused_of_mistral_large4_is_lost_by_peft(group: str, tmp_path: Path) -> None:
    """The reason for the refusal, measured: once this fails, PEFT keeps them, and the refusal can go."""
    name = "mistral_large4"
    arch = architecture(FAMILIES[name])
    sites = tuple(PlannedSite(s, 4, 8, 1.0) for s in arch if s.role in GROUPS[group])
    model = adapted(name, Placement("lora", 0.0, 4, 8, sites))
    with torch.no_grad():
        plain = logits(tiny(name))
        tuned = logits(model.eval())
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again: Any = PeftModel.from_pretrained(tiny(name), str(tmp_path)).eval()
    with torch.no_grad():
        got = logits(again)
    assert (tuned - plain).abs().max() > 1
    assert torch.equal(got, tuned if group == "dense" else plain)
    refused = {r for r in GROUPS[group] if r in arch.family.not_reloaded}
    assert refused == (set() if group == "dense" else set(GROUPS[group]))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_role_that_the_family_lacks_is_named(name: str) -> None:
    arch = architecture(FAMILIES[name])
    absent = [r for r in (Role.W_Q, Role.W_DQ, Role.EXPERTS_DOWN, Role.SHARED_UP) if r not in arch.roles]
    assert absent
    for role in absent:
        with pytest.raises(PlacementError, match=rf"has no {role}.*Roles of this model: {arch.roles[0]}"):
            planned(name, [role.value])


@pytest.mark.parametrize("name", FAMILIES)
def test_names_for_peft_mean_nothing_else(name: str) -> None:
    """Module names that PEFT compares by their ends reach no module beside the planned ones."""
    targets = "attention-only" if name in LOST else "all-linear"
    placement = planned(name, targets)
    config = peft_config(architecture(FAMILIES[name]), placement)
    assert isinstance(config.target_modules, set)
    with torch.device("meta"):
        modules = [path for path, _ in build(name, torch.float32, 0).named_modules()]
    hit = {m for m in modules if any(m == t or m.endswith(f".{t}") for t in config.target_modules)}
    assert hit <= {p.site.path for p in placement.sites}


@fast_families()
@pytest.mark.parametrize("name", FAMILIES)
def test_our_loss_and_recomputation_give_the_stock_gradients(name: str) -> None:
    placement = planned(name, "attention-only" if name in LOST else "all-linear")
    stock, ours = adapted(name, placement), adapted(name, placement)
    want = stock.train()(input_ids=IDS, labels=IDS, use_cache=False).loss
    want.backward()
    use_chunked_loss(ours.get_base_model())
    use_lora_factors(ours)
    enable_mla_checkpointing(ours)
    loss = ours.train()(input_ids=IDS, labels=IDS, token_loss=True) / (IDS.numel() - 1)
    loss.backward()
    assert abs(float((loss - want).detach())) < 1e-5
    other = dict(ours.named_parameters())
    for key, parameter in stock.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            scale = float(parameter.grad.abs().max())
            assert (other[key].grad - parameter.grad).abs().max() < 2e-5 * scale, key


def packed_loss(model: Any, samples: list[list[int]]) -> float:
    """Summed loss of samples in one packed row, as the collator lays it out."""
    row = {
        "input_ids": [token for s in samples for token in s],
        "labels": [token for s in samples for token in (-100, *s[1:])],
        "position_ids": [i for s in samples for i in range(len(s))],
    }
    batch = Collator(0, packed=True)([row])
    labels = batch.pop("labels")
    with torch.no_grad():
        scores = model(**batch).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"))


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_samples_stay_apart_or_packing_is_off(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in (5, 12, 9)]
    model: Any = tiny(name)
    with torch.no_grad():
        alone = sum(
            float(model(input_ids=x, labels=x, use_cache=False).loss) * (x.shape[1] - 1)
            for x in (torch.tensor([s]) for s in samples)
        )
    apart = abs(packed_loss(model, samples) - alone) < 1e-3
    recipe, said = apply_family_limits(load_recipe("safe", []), architecture(FAMILIES[name]))
    assert apart == recipe.train.packing == (name not in KDA)
    assert bool(said) == (name in KDA)


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_that_a_family_cant_have_is_refused_by_name(name: str) -> None:
    arch = architecture(FAMILIES[name])
    asked = load_recipe("safe", ["model.attention=packed"])
    if not arch.family.needs_mask:
        assert apply_family_limits(asked, arch)[0].model.attention == "packed"
        return
    with pytest.raises(InputError, match=re.escape(f"model.attention: packed: {arch.family.title} has")):
        apply_family_limits(asked, arch)
    auto = apply_family_limits(load_recipe("safe", []), arch)[0].model.attention
    assert auto == ("eager" if name == "hy_v4" else "sdpa")


@fast_cases("deepseek_v3", "kimi_linear")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_command(cli, name: str, tmp_path: Path) -> None:
    base, run = checkpoint(name, tmp_path / "base"), tmp_path / "run"
    recipe = "attention-only" if name in LOST else "all-linear"
    sets = [f"model.base={base}", f"data.path={rows(tmp_path / 'rows.jsonl')}", "train.max_steps=2", "adapter.rank=4"]
    sets += ["train.batch_size=2", "train.max_length=64", "data.eval_fraction=0", "model.device=cpu", "adapter.alpha=8"]
    sets += ["model.dtype=float32", "model.experts=eager"]
    done = cli("train", "--recipe", recipe, "--output", run, *(x for s in sets for x in ("--set", s)))
    assert done.code == 0, done.err
    assert ("train.packing: off" in done.err) == (name in KDA)
    record = json.loads((run / "run.json").read_text())
    assert record["state"] == "done"
    placement = planned(name, recipe)
    assert sum(record["adapter"]["matrices"].values()) == len(placement.sites)
    again: Any = PeftModel.from_pretrained(tiny(name), str(run / "adapter")).eval()
    factors: list[Any] = [layer.lora_B["default"].weight for layer in lora_layers(again).values()]
    assert len(factors) == len(placement.sites)
    assert all(float(f.detach().abs().max()) > 0 for f in factors)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kimi_k25", "hy_v4", "mistral_large4", "kimi_linear"])
def test_all_weights_but_those_that_text_does_not_reach(cli, name: str, tmp_path: Path) -> None:
    base, run = checkpoint(name, tmp_path / "base"), tmp_path / "run"
    sets = [f"model.base={base}", "model.preset=null", f"data.path={rows(tmp_path / 'rows.jsonl')}"]
    sets += ["train.max_steps=2", "train.batch_size=2", "train.max_length=64", "model.device=cpu"]
    done = cli("train", "--recipe", "full", "--output", run, *(x for s in sets for x in ("--set", s)))
    assert done.code == 0, done.err
    arch = architecture(FAMILIES[name])
    still = {s.path.partition(".indexer.")[0] for s in arch if s.role in (Role.INDEXER, Role.TOWER)}
    assert ("stay frozen" in done.err) == bool(still)
    before, after = load_file(base / "model.safetensors"), load_file(run / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    same = {key for key in before if torch.equal(before[key], after[key])}
    towers = ("vision", "projector", "patch_merger")
    for key in before:
        frozen = ".indexer." in key or any(word in key for word in towers) or key.endswith(("correction_bias", "alpha"))
        assert (key in same) == frozen, key


@pytest.mark.parametrize("name", FAMILIES)
def test_plan_tells_what_train_would_do(cli, name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES[name]))
    recipe = "attention-only" if name in LOST else "safe"
    sets = [f"model.base={tmp_path}", "train.max_length=64", "model.device=cpu"]
    done = cli("plan", "--recipe", recipe, "--no-data", "--json", *(x for s in sets for x in ("--set", s)))
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert set(document["adapted"]) == {p.site.parameter for p in planned(name, recipe).sites}
    assert document["memory"]["total"] > document["memory"]["weights"] > 4 * document["params_total"] - 1
    arch = architecture(FAMILIES[name])
    beyond = any(arch.by_role(r) for r in (Role.LINEAR_ATTENTION, Role.INDEXER, Role.HYPER_CONNECTION))
    assert any("is not estimated" in w for w in document["warnings"]) == beyond
    assert any("train.packing: off" in w for w in document["warnings"]) == (name in KDA)
