"""MTP layers, which transformers never loads: kept byte for byte, or merged with `--mtp`.  The oracle is float64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mla_tune.arch.build import architecture
from tests.helpers.family_adapters import adapted, planned
from tests.helpers.marks import fast_cases
from tests.helpers.tiny_families import FAMILIES, tiny

WEIGHTS, CONFIG, PREFIX = "model.safetensors", "config.json", "base_model.model."
NAMES = ("deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "bailing_hybrid")
RANK, SCALE = 4, 2.0


@pytest.fixture(params=NAMES)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint with one MTP layer: a copy of the last decoder layer under the next number, other numbers in it."""
    name = request.param
    folder = tmp_path / "base"
    tiny(name).save_pretrained(folder)
    config = json.loads((folder / CONFIG).read_text())
    n = config["num_hidden_layers"]
    for key in ("num_nextn_predict_layers", "num_mtp_layers"):
        config[key] = 1
    (folder / CONFIG).write_text(json.dumps(config))
    tensors = load_file(folder / WEIGHTS)
    last = {k: v for k, v in tensors.items() if f"layers.{n - 1}." in k}
    generator = torch.Generator().manual_seed(5)
    for key, tensor in last.items():
        tensors[key.replace(f"layers.{n - 1}.", f"layers.{n}.")] = torch.randn(tensor.shape, generator=generator)
    for leaf, shape in (("enorm", (48,)), ("hnorm", (48,)), ("eh_proj", (48, 96)), ("shared_head.head", (101, 48))):
        tensors[f"model.layers.{n}.{leaf}.weight"] = torch.randn(shape, generator=generator)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    adapted(name, planned(name, ["W_O", "shared"])).save_pretrained(tmp_path / "adapter")
    return folder


def on_mtp(base: Path, adapter: Path) -> dict[str, tuple[str, torch.Tensor, torch.Tensor]]:
    """Add factors for the MTP layer to the adapter's file; key of the base → (stem, A, B)."""
    arch = architecture(json.loads((base / CONFIG).read_text())).located(load_file(base / WEIGHTS))
    tensors = load_file(adapter / "adapter_model.safetensors")
    generator, added = torch.Generator().manual_seed(6), {}
    for site in arch.mtp_sites:
        if site.role.value in ("W_O", "shared_up", "W_UKV"):
            A = torch.randn(RANK, site.shape[1], generator=generator)
            B = torch.randn(site.shape[0], RANK, generator=generator)
            tensors |= {f"{PREFIX}{site.path}.lora_A.weight": A, f"{PREFIX}{site.path}.lora_B.weight": B}
            added[site.disk_keys()[0]] = (site.path, A, B)
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    return added


@fast_cases("deepseek_v3", "bailing_hybrid")
def test_without_the_option_they_stay(cli, base: Path, tmp_path: Path) -> None:
    done = cli("merge-absorb", tmp_path / "adapter", "--base", base, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    before, after = load_file(base / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    n = json.loads((base / CONFIG).read_text())["num_hidden_layers"]
    assert before.keys() == after.keys()
    mtp = [k for k in before if f"layers.{n}." in k]
    assert len(mtp) > 15
    assert all(torch.equal(before[k], after[k]) for k in mtp)
    assert cli("inspect", base, "--check-weights", base).code == 0


@fast_cases("deepseek_v3", "bailing_hybrid")
def test_with_the_option_they_are_merged(cli, base: Path, tmp_path: Path) -> None:
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    added = on_mtp(base, adapter)
    assert len(added) == 3
    done = cli("merge-absorb", adapter, "--base", base, "--out", out)
    assert done.code == 2
    assert "it is on an MTP layer, give --mtp to merge it too" in done.err
    done = cli("merge-absorb", adapter, "--base", base, "--out", out, "--mtp", "--exact", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert any("3 matrices of MTP layers are merged" in note for note in report["notes"])
    before, after = load_file(base / WEIGHTS), load_file(out / WEIGHTS)
    n = json.loads((base / CONFIG).read_text())["num_hidden_layers"]
    for key in before:
        if key in added:
            _, A, B = added[key]
            exact = before[key].double().numpy() + SCALE * (B.double().numpy() @ A.double().numpy())
            assert np.array_equal(after[key].numpy(), exact.astype(np.float32))
        elif f"layers.{n}." in key:
            assert torch.equal(before[key], after[key])
    assert report["logits"]["ran"], report["logits"]["reason"]
    assert report["logits"]["merged"]["max_error"] < 5e-5
    assert cli("verify", out).code == 0
    wrong = {k: v.clone() for k, v in after.items()}
    wrong[next(iter(added))].view(-1)[3] += 0.01
    save_file(wrong, out / WEIGHTS, {"format": "pt"})
    assert cli("verify", out, "--no-logits").code == 1


@fast_cases("*deepseek*")
def test_the_option_without_such_keys_says_so(cli, base: Path, tmp_path: Path) -> None:
    done = cli("merge-absorb", tmp_path / "adapter", "--base", base, "--out", tmp_path / "out", "--mtp", "--no-logits")
    assert done.code == 0, done.err
    assert "no adapter has a key of an MTP layer" in " ".join(done.out.split())


def test_a_family_whose_mtp_layout_is_not_known_says_so(cli, tmp_path: Path) -> None:
    name = "mistral4"
    tiny(name).save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / CONFIG).read_text()) | {"num_nextn_predict_layers": 1}
    (tmp_path / "base" / CONFIG).write_text(json.dumps(config))
    adapted(name, planned(name, ["W_O"])).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors |= {
        f"{PREFIX}model.layers.3.self_attn.o_proj.lora_A.weight": torch.zeros(4, 36),
        f"{PREFIX}model.layers.3.self_attn.o_proj.lora_B.weight": torch.zeros(48, 4),
    }
    save_file(tensors, file, {"format": "pt"})
    done = cli("merge-absorb", tmp_path / "adapter", "--base", tmp_path / "base", "--out", tmp_path / "out", "--mtp")
    assert done.code == 2
    assert "it is on an MTP layer, whose layout is not known here" in done.err
    assert FAMILIES[name]["num_hidden_layers"] == 3
