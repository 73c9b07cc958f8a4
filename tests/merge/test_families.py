"""Every family: merged in its own names and layout on disk, proven, absorbed, and loaded by stock transformers.

The oracles: PEFT's model with the adapter unmerged (logits) and PEFT's own in-memory merge (every parameter).
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from mla_tune.absorption.fold import foldable_families
from mla_tune.adapter.placement import Placement
from mla_tune.arch.build import architecture
from tests.helpers.expert_tree import Tree
from tests.helpers.family_adapters import LOST, adapted, logits, planned
from tests.helpers.fp8 import make_fp8
from tests.helpers.marks import fast_cases, fast_families
from tests.helpers.tiny_families import FAMILIES, auto_class, tiny

WEIGHTS = "model.safetensors"


def trained(name: str, folder: Path) -> tuple[Any, Placement]:
    """The base and an adapter on all that the family takes, saved; the model with the adapter."""
    placement = planned(name, "attention-only" if name in LOST else "all-linear")
    tiny(name).save_pretrained(folder / "base")
    model = adapted(name, placement)
    model.save_pretrained(folder / "adapter")
    return model.eval(), placement


def loaded(folder: Path, name: str) -> Any:
    """By stock transformers, nothing missing and nothing left over."""
    model, info = auto_class(name).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


@fast_families()
@pytest.mark.parametrize("name", FAMILIES)
def test_merged_is_base_and_adapter_in_the_familys_own_layout(cli, name: str, tmp_path: Path) -> None:
    model, placement = trained(name, tmp_path)
    with torch.no_grad():
        want = logits(model)
    done = cli("merge-absorb", tmp_path / "adapter", "--base", tmp_path / "base", "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    again = loaded(tmp_path / "out", name)
    with torch.no_grad():
        assert (logits(again) - want).abs().max() < 5e-5

    # Every parameter is PEFT's own merge, and all but the planned ones are the base's, bit for bit.
    merged = dict(model.merge_and_unload().named_parameters())
    base, ours = dict(tiny(name).named_parameters()), dict(again.named_parameters())
    changed = {p.site.parameter for p in placement.sites}
    for key, parameter in ours.items():
        if key in changed:
            assert not torch.equal(parameter, base[key]), key
            rows = slice(0, 4) if name == "longcat_flash" and "experts.gate_up" in key else slice(None)
            assert (parameter[rows] - merged[key][rows]).abs().max() < 2e-6, key
        else:
            assert torch.equal(parameter, base[key]), key
    before, after = load_file(tmp_path / "base" / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert before.keys() == after.keys()
    touched = {key for key in before if not torch.equal(before[key], after[key])}
    assert len(touched) == report["tensors_changed"]

    # The proof looked at logits too, absorbed ones among them.
    assert report["logits"]["ran"], report["logits"]["reason"]
    assert report["logits"]["effect"]["max_error"] > 0.1
    for comparison in ("merged", "absorbed"):
        assert report["logits"][comparison]["max_error"] < 5e-5
        assert report["logits"][comparison]["top1"] == 1
    assert report["absorbed"]["modules"] == len(architecture(FAMILIES[name]).attention)

    checked = cli("verify", tmp_path / "out", "--json")
    assert checked.code == 0, checked.err
    assert json.loads(checked.out)["holds"]


@fast_families()
@pytest.mark.parametrize("name", FAMILIES)
def test_verify_sees_one_number(cli, name: str, tmp_path: Path) -> None:
    """A wrong number in the family's own names, in what was merged and in what was not."""
    trained(name, tmp_path)
    out = tmp_path / "out"
    options = ("--base", tmp_path / "base", "--out", out, "--absorb", "none", "--no-logits")
    assert cli("merge-absorb", tmp_path / "adapter", *options).code == 0
    before, good = load_file(tmp_path / "base" / WEIGHTS), load_file(out / WEIGHTS)
    merged = next(key for key in good if not torch.equal(good[key], before[key]))
    kept = next(key for key in good if torch.equal(good[key], before[key]) and good[key].numel() > 9)
    for key in (merged, kept):
        wrong = {k: v.clone() for k, v in good.items()}
        wrong[key].view(-1)[7] += 0.01
        save_file(wrong, out / WEIGHTS, {"format": "pt"})
        done = cli("verify", out, "--no-logits")
        assert done.code == 1
        assert key in done.out


@fast_families()
@pytest.mark.parametrize("name", FAMILIES)
def test_fold_is_exact_or_refused(cli, name: str, tmp_path: Path) -> None:
    trained(name, tmp_path)
    options = ("--base", tmp_path / "base", "--out", tmp_path / "out", "--absorb", "fold", "--json")
    done = cli("merge-absorb", tmp_path / "adapter", *options)
    family = architecture(FAMILIES[name]).family.model_type
    if family in foldable_families():
        assert done.code == 0, done.err
        assert json.loads(done.out)["logits"]["absorbed"]["max_error"] < 1e-4
    else:
        assert done.code == 2
        assert "whether it is exact for model_type" in done.err
        assert "Use --absorb split" in done.err


def renamed(folder: Path, *pairs: tuple[str, str]) -> None:
    """Give the tensors of a checkpoint other names."""
    file = folder / WEIGHTS
    tensors = {}
    for key, tensor in load_file(file).items():
        for pattern, replacement in pairs:
            key = re.sub(pattern, replacement, key)
        tensors[key] = tensor
    save_file(tensors, file, {"format": "pt"})


#: Layouts that the same family is found in: (family, what is renamed, one key that is then there).
LAYOUTS = {
    "kimi_linear as published: dense MLPs by their own name": (
        "kimi_linear",
        [(r"\.block_sparse_moe\.(gate|up|down)_proj\.", r".mlp.\1_proj.")],
        "model.layers.0.mlp.gate_proj.weight",
    ),
    "hy_v4 as published: only the attention's gate is linear_gate": (
        "hy_v4",
        [(r"\.mlp\.(shared_experts\.)?linear_gate\.", r".mlp.\1gate_proj.")],
        "model.layers.1.mlp.shared_experts.gate_proj.weight",
    ),
    "kimi_k25 as published: layers, not blocks": (
        "kimi_k25",
        [(r"^language_model\.model\.blocks\.", "language_model.model.layers.")],
        "language_model.model.layers.1.mlp.experts.3.up_proj.weight",
    ),
    "mistral3 in the names of the module tree": (
        "mistral3",
        [(r"^language_model\.model\.", "model.language_model."), (r"^language_model\.lm_head", "lm_head")],
        "model.language_model.layers.0.self_attn.o_proj.weight",
    ),
    "bailing_hybrid in the names of the module tree": (
        "bailing_hybrid",
        [
            (r"\.attention\.dense\.", ".self_attn.o_proj."),
            (r"\.attention\.(A_log|dt_bias|f_proj)", r".self_attn.forget_gate.\1"),
            (r"\.attention\.", ".self_attn."),
        ],
        "model.layers.1.self_attn.kv_b_proj.weight",
    ),
}


@fast_cases("kimi_linear*")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_names_of_the_same_family(cli, layout: str, tmp_path: Path) -> None:
    name, pairs, expected = LAYOUTS[layout]
    model, _ = trained(name, tmp_path)
    with torch.no_grad():
        want = logits(model)
    renamed(tmp_path / "base", *pairs)
    assert expected in load_file(tmp_path / "base" / WEIGHTS)
    done = cli("merge-absorb", tmp_path / "adapter", "--base", tmp_path / "base", "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert load_file(tmp_path / "base" / WEIGHTS).keys() == load_file(tmp_path / "out" / WEIGHTS).keys()
    with torch.no_grad():
        assert (logits(loaded(tmp_path / "out", name)) - want).abs().max() < 5e-5
    assert json.loads(done.out)["logits"]["merged"]["max_error"] < 5e-5


@fast_cases("deepseek_v3", "longcat_flash")
@pytest.mark.parametrize("name", ["deepseek_v3", "axk1", "longcat_flash", "kimi_k25"])
def test_experts_as_one_tensor_on_disk(cli, name: str, tmp_path: Path) -> None:
    """Files that hold the fused stacks, as transformers has them in memory."""
    model, _ = trained(name, tmp_path)
    with torch.no_grad():
        want = logits(model)
    file = tmp_path / "base" / WEIGHTS
    tensors, stacks = {}, dict[str, dict[int, dict[str, torch.Tensor]]]()
    for key, tensor in load_file(file).items():
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", key)
        if match:
            stacks.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = tensor
        else:
            tensors[key] = tensor
    for path, experts in stacks.items():
        gate_up = [torch.cat((experts[e]["gate_proj"], experts[e]["up_proj"])) for e in sorted(experts)]
        tensors[f"{path}.gate_up_proj"] = torch.stack(gate_up)
        down = [experts[e]["down_proj"] for e in sorted(experts) if "down_proj" in experts[e]]
        tensors[f"{path}.down_proj"] = torch.stack(down)
    save_file(tensors, file, {"format": "pt"})
    done = cli("merge-absorb", tmp_path / "adapter", "--base", tmp_path / "base", "--out", tmp_path / "out", "--json")
    if name == "longcat_flash":
        # transformers saves a row for each identity expert too, and such a stack is no layout that was ever published.
        assert done.code == 2
        assert "gate_up_proj" in done.err
        return
    assert done.code == 0, done.err
    with torch.no_grad():
        assert (logits(loaded(tmp_path / "out", name)) - want).abs().max() < 5e-5
    assert json.loads(done.out)["logits"]["merged"]["max_error"] < 5e-5


def test_a_weight_that_is_there_under_two_names(cli, tmp_path: Path) -> None:
    """Whichever of them a program reads, it reads the merged one."""
    name = "kimi_linear"
    model, _ = trained(name, tmp_path)
    with torch.no_grad():
        want = logits(model)
    file = tmp_path / "base" / WEIGHTS
    tensors = load_file(file)
    doubled = {k: v for k, v in tensors.items() if re.search(r"block_sparse_moe\.(gate|up|down)_proj", k)}
    assert doubled
    tensors |= {k.replace("block_sparse_moe", "mlp"): v.clone() for k, v in doubled.items()}
    save_file(tensors, file, {"format": "pt"})
    out = tmp_path / "out"
    done = cli("merge-absorb", tmp_path / "adapter", "--base", tmp_path / "base", "--out", out)
    assert done.code == 0, done.err
    merged = load_file(out / WEIGHTS)
    for key in doubled:
        assert torch.equal(merged[key], merged[key.replace("block_sparse_moe", "mlp")])
        assert not torch.equal(merged[key], tensors[key])
    for left_out in ("mlp", "block_sparse_moe"):
        one = tmp_path / left_out
        shutil.copytree(out, one)
        rest = {k: v for k, v in merged.items() if not re.search(rf"\.{left_out}\.(gate|up|down)_proj", k)}
        save_file(rest, one / WEIGHTS, {"format": "pt"})
        (one / "model.safetensors.index.json").unlink(missing_ok=True)
        for extra in one.glob("absorbed*"):
            extra.unlink()
        with torch.no_grad():
            assert (logits(loaded(one, name)) - want).abs().max() < 5e-5
    assert cli("verify", out).code == 0


def test_the_config_of_a_wrapper_stays(cli, tmp_path: Path) -> None:
    """`--dtype` and whatever else edits config.json leaves a wrapper's text_config a text_config."""
    trained("mistral3", tmp_path)
    options = ("--base", tmp_path / "base", "--out", tmp_path / "out", "--dtype", "bfloat16", "--no-logits")
    assert cli("merge-absorb", tmp_path / "adapter", *options).code == 0
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.get_text_config().kv_lora_rank == 28
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert next(again.parameters()).dtype == torch.bfloat16


@fast_families()
@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_trained_on_the_checkpoints_own_code(cli, name: str, tmp_path: Path) -> None:
    """`trust_remote_code` models and the tools around them (LLaMA-Factory, ms-swift, axolotl) have a Linear for each
    matrix on disk, each expert apart, under its name there: so has `Tree`, which PEFT adapts and merges by itself."""
    base, out = tmp_path / "base", tmp_path / "out"
    tiny(name).save_pretrained(base)
    before = load_file(base / WEIGHTS)
    arch = architecture(FAMILIES[name]).located(before)
    paths = [k.removesuffix(".weight") for s in arch if s.attachable and s.disk != "fused" for k in s.disk_keys()]
    exactly = "|".join(map(re.escape, paths))  # a list would mean the tower's layers too
    config = LoraConfig(r=3, lora_alpha=6, target_modules=exactly, init_lora_weights=False, use_rslora=True)
    tree: Any = get_peft_model(Tree(base), config)  # type: ignore[arg-type]
    tree.save_pretrained(tmp_path / "adapter")
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 2 * len(paths)
    expected = tree.merge_and_unload().state_dict()
    options = ("--base", base, "--out", out, "--absorb", "none", "--exact", "--json")
    done = cli("merge-absorb", tmp_path / "adapter", *options)
    assert done.code == 0, done.err
    after = load_file(out / WEIGHTS)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {f"{path}.weight" for path in paths}
    for key in changed:
        assert (after[key] - expected[key]).abs().max() < 2e-6, key


def test_an_unknown_type_that_is_read_as_a_relative(cli, tmp_path: Path) -> None:
    """Merged and proven number by number; logits can't be had, and that is said."""
    model, _ = trained("deepseek_v2", tmp_path)
    config = json.loads((tmp_path / "base" / "config.json").read_text()) | {"model_type": "deepseek_v2_next"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    done = cli("merge-absorb", tmp_path / "adapter", "--base", tmp_path / "base", "--out", out, "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert not report["proof"]["failed"]
    assert report["logits"]["ran"] is False
    assert "transformers has no model of the type 'deepseek_v2_next'" in report["logits"]["reason"]
    assert any("'deepseek_v2_next' is not known" in note for note in report["notes"])
    (out / "config.json").write_text(json.dumps(config | {"model_type": "deepseek_v2"}))
    with torch.no_grad():
        assert (logits(loaded(out, "deepseek_v2")) - logits(model)).abs().max() < 5e-5


@fast_cases("deepseek_v32-dequantize", "kimi_linear-keep")
@pytest.mark.parametrize("quantized", ["dequantize", "keep"])
@pytest.mark.parametrize(
    "name", ["deepseek_v32", "glm_moe_dsa", "bailing_hybrid", "kimi_linear", "kimi_k25", "dots3_note", "axk1"]
)
def test_fp8_bases(cli, name: str, quantized: str, tmp_path: Path) -> None:
    """Block FP8 in the family's own names: what is changed is written as bfloat16, or as FP8 with fresh scales.  The
    oracle dequantizes in torch and adds B·A."""
    trained(name, tmp_path)
    make_fp8(tmp_path / "base", tmp_path / "fp8", block=(16, 16))
    out = tmp_path / "out"
    options = ("--base", tmp_path / "fp8", "--out", out, "--quantized", quantized, "--json")
    done = cli("merge-absorb", tmp_path / "adapter", *options)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["logits"]["ran"], report["logits"]["reason"]
    if quantized == "dequantize":  # codes of 3 bits send some tokens to other experts: only the numbers are compared
        assert report["logits"]["merged"]["max_error"] < 0.05 * report["logits"]["merged"]["largest"]
    before, after = load_file(tmp_path / "fp8" / WEIGHTS), load_file(out / WEIGHTS)
    plain = load_file(tmp_path / "base" / WEIGHTS)
    merged = tmp_path / "plain"
    options = ("--base", tmp_path / "base", "--out", merged, "--absorb", "none", "--no-logits")
    assert cli("merge-absorb", tmp_path / "adapter", *options).code == 0
    wanted = load_file(merged / WEIGHTS)
    coded = [k for k, t in before.items() if t.dtype == torch.float8_e4m3fn]
    assert len(coded) > 10
    for key in coded:
        change = wanted[key] - plain[key]
        if not change.any():
            assert torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8)) or quantized == "dequantize"
            continue
        exact = dequantized(before, key, 16) + change
        if quantized == "dequantize":
            assert after[key].dtype == torch.bfloat16
            assert (after[key].float() - exact).abs().max() <= exact.abs().max() * 2**-8
        else:
            assert after[key].dtype == torch.float8_e4m3fn
            assert (dequantized(after, key, 16) - exact).abs().max() <= exact.abs().max() * 2**-4
    assert cli("verify", out).code == 0


def dequantized(tensors: dict[str, torch.Tensor], key: str, block: int) -> torch.Tensor:
    scale = tensors[f"{key}_scale_inv"]
    wide = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)
    rows, columns = tensors[key].shape
    return tensors[key].float() * wide[:rows, :columns]
