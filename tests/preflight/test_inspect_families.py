"""Every family and wrapper as `inspect` lists it, against the model that transformers builds: nothing left out,
nothing made up."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mla_tune.arch.build import architecture
from mla_tune.arch.families import FAMILIES as TABLE
from mla_tune.arch.multimodal import WRAPPERS
from mla_tune.arch.roles import ADAPTABLE, Role
from mla_tune.arch.site import Site
from tests.helpers.marks import fast_families
from tests.helpers.tiny_families import FAMILIES, MLA, build, mla_modules, text_model

BARRED = {r for r in Role if r not in ADAPTABLE}
#: Words of the reasons for what is listed and not adapted.
REASON = {
    Role.ROUTER: "router",
    Role.LM_HEAD: "adapt",
    Role.ATTENTION_GATE: "gate",
    Role.INDEXER: "without gradients",
    Role.LINEAR_ATTENTION: "KDA",
    Role.HYPER_CONNECTION: "not a layer",
    Role.NORM_GATE: "norm gate",
    Role.TOWER: "processes no text",
}


def identity_experts(name: str, site: Site) -> int:
    """Numbers that transformers allocates for LongCat's identity experts, which have no weights."""
    config = FAMILIES[name]
    if name != "longcat_flash" or site.role != Role.EXPERTS_GATE_UP:
        return 0
    return config["zero_expert_num"] * site.shape[0] * site.shape[1]


@pytest.mark.parametrize("source", ["as published", "as transformers writes it"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_matrix_and_the_total(name: str, source: str) -> None:
    with torch.device("meta"):
        model = build(name, torch.float32, 0)
    saved = json.loads(model.config.to_json_string(use_diff=False))
    arch = architecture(FAMILIES[name] if source == "as published" else saved)
    real = dict(model.named_parameters())
    if arch.tied:  # named_parameters lists a shared weight once
        real["lm_head.weight"] = real[arch.embedding]
    counted = 0
    for site in arch:
        tensor = real.pop(site.parameter)
        assert tensor.numel() == site.count * prod(site.shape) + identity_experts(name, site), site.path
        assert tensor.shape[-1] == site.shape[1] or tensor.dim() > 3 or "conv" in site.path, site.path
        assert (real.pop(f"{site.path}.bias", None) is not None) == site.bias, site.path
        counted += site.params
    left = {n for n, p in real.items() if not n.endswith(("norm.weight", "norm.bias")) and p.dim() > 1}
    left -= {n for n in left if max(real[n].shape) == real[n].numel()}  # a vector in the shape of a matrix
    if not arch.tower_counted:
        left -= {n for n in left if n.startswith(("model.vision_tower.", "model.multi_modal_projector."))}
        tower = [m for n, m in model.named_modules() if n in ("model.vision_tower", "model.multi_modal_projector")]
        outside = sum(p.numel() for module in tower for p in module.parameters())
    else:
        outside = 0
    assert left == {arch.embedding}
    idle = sum(identity_experts(name, site) for site in arch)
    assert arch.params_total == sum(p.numel() for p in model.parameters()) - idle - outside


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_modules_and_their_sizes(name: str) -> None:
    with torch.device("meta"):
        model = build(name, torch.float32, 0)
    arch = architecture(FAMILIES[name])
    found: dict[str, Any] = mla_modules(model)
    assert set(arch.attention_paths) == set(found)
    for attention in arch.attention:
        module, d = found[attention.path], attention.dims
        heads = getattr(module, "num_heads", None) or module.num_attention_heads
        assert (heads, module.kv_lora_rank, module.v_head_dim) == (d.H, d.C, d.V)
        assert (module.qk_nope_head_dim, module.qk_rope_head_dim) == (d.P, d.R)
        assert attention.owns_cache == (getattr(module, "kv_a_proj_with_mqa", None) is not None)
        assert attention.has_indexer == (getattr(module, "indexer", None) is not None)
        assert attention.has_window == (getattr(module, "sliding_window", None) is not None)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_not_adapted_says_why(name: str) -> None:
    arch = architecture(FAMILIES[name])
    assert {s.role for s in arch if not s.attachable} <= BARRED
    assert {s.role for s in arch if s.attachable} <= set(ADAPTABLE)
    for site in arch:
        if not site.attachable:
            assert REASON[site.role] in site.reason, site.path


@pytest.mark.parametrize("name", FAMILIES)
def test_everything_adaptable_is_where_text_passes(name: str) -> None:
    """Sites lie in the text model's decoder layers, and in none that is not MLA where their names are those of KDA."""
    with torch.device("meta"):
        model = build(name, torch.float32, 0)
    inside = {id(m) for m in text_model(model).modules()}
    kda = {n for n, m in model.named_modules() if hasattr(m, "forget_gate")}
    for site in architecture(FAMILIES[name]):
        if site.attachable:
            path = site.path.rpartition(".")[0] if site.is_experts else site.path
            module = model.get_submodule(path)
            assert id(module) in inside
            assert path.rpartition(".")[0] not in kda
            assert site.is_experts or isinstance(module, nn.Linear)


def test_the_matrix_covers_the_family_table() -> None:
    """A new entry of the table needs a tiny config."""
    tested = {architecture(config).family.model_type for config in FAMILIES.values()}
    assert tested == {f.model_type for f in TABLE}
    assert {c["model_type"] for c in FAMILIES.values()} >= set(WRAPPERS)


MTP = {
    name: FAMILIES[name] | {"num_nextn_predict_layers": 2}
    for name in ("deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "bailing_hybrid")
}


@pytest.mark.parametrize("name", MTP)
def test_mtp_layers_are_listed_and_not_counted(name: str) -> None:
    config = {k: v for k, v in MTP[name].items() if k != "num_mtp_layers"}
    arch, without = architecture(config), architecture(FAMILIES[name])
    assert arch.mtp_layers == 2
    assert {s.layer for s in arch.mtp_sites} == {arch.num_layers, arch.num_layers + 1}
    assert (arch.params_total, arch.sites) == (without.params_total, without.sites)
    assert all(s.mtp and not s.attachable and "MTP" in s.reason for s in arch.mtp_sites)
    # A layer with experts, as they have them, and the projection of what goes in.
    last = [s for s in arch.mtp_sites if s.layer == arch.num_layers]
    roles = {s.role for s in last}
    assert {Role.MTP_PROJECTION, Role.W_DKV, Role.W_UKV, Role.W_O, Role.EXPERTS_DOWN, Role.SHARED_UP} <= roles
    assert last[0].shape == (48, 96)
    attention = next(s for s in last if s.role == Role.W_UKV)
    assert attention.path.startswith(f"model.layers.{arch.num_layers}.")


def test_an_unknown_type_is_read_as_a_plain_relative_with_a_warning(cli, tmp_path: Path) -> None:
    config = {**FAMILIES["deepseek_v2"], "model_type": "deepseek_v2_next"}
    arch, known = architecture(config), architecture(FAMILIES["deepseek_v2"])
    assert arch.sites == known.sites
    assert arch.params_total == known.params_total
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = cli("inspect", tmp_path)
    assert done.code == 0
    assert "model_type 'deepseek_v2_next' is not known: it is read as a plain relative of DeepSeek-V2" in " ".join(
        done.out.split()
    )
    dense = architecture({**MLA, "model_type": "new_dense", "tie_word_embeddings": False})
    assert not dense.tied
    assert dense.roles == architecture({**MLA, "model_type": "youtu"}).roles


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("deepseek_v32", "index_topk"),
        ("kimi_linear", "layer_types"),
        ("hy_v4", "index_topk"),
        ("longcat_flash", "zero_expert_num"),
        ("kimi_k25", "text_config"),
    ],
)
def test_an_unknown_type_with_peculiar_keys_is_refused(cli, tmp_path: Path, name: str, key: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**FAMILIES[name], "model_type": "unheard_of"}))
    done = cli("inspect", tmp_path)
    assert done.code == 2
    assert "unheard_of" in done.err
    assert key in done.err or "wrapper" in done.err


@fast_families()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_of_the_family_is_what_its_config_says(cli, tmp_path: Path, name: str) -> None:
    build(name, torch.float32, 0).save_pretrained(tmp_path)
    done = cli("inspect", tmp_path, "--json", "--check-weights", tmp_path)
    assert done.code == 0, done.err
    weights = json.loads(done.out)["weights"]
    assert weights["holds"]
    assert (weights["missing"], weights["wrong_shape"], weights["unexplained"]) == ([], [], [])
    arch = architecture(FAMILIES[name])
    text = [s for s in arch if s.role != Role.TOWER and not (s.path == "lm_head" and arch.tied)]
    assert weights["found"] >= len(text)


def test_check_weights_names_what_differs(cli, tmp_path: Path) -> None:
    build("deepseek_v3", torch.float32, 0).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    tensors["model.layers.0.self_attn.kv_b_proj.weight"] = torch.zeros(96, 29)
    tensors["model.layers.9.strange.weight"] = torch.zeros(3, 4)
    save_file(tensors, file, {"format": "pt"})
    done = cli("inspect", tmp_path, "--check-weights", tmp_path)
    assert done.code == 1
    assert "1 missing:\n  model.layers.1.mlp.experts.2.up_proj.weight" in done.err
    assert "kv_b_proj.weight: config.json gives (96, 28), the file has (96, 29)" in done.err
    assert "1 in the files and not in config.json:\n  model.layers.9.strange.weight" in done.err
    assert "Role" in done.out  # the table comes all the same
