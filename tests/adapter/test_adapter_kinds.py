"""Every kind of adapter that PEFT's LoRA writes is mapped to the right tensors of the base.

PEFT writes an adapter, `open_adapter` maps it, and numpy merges it as mapped.  The oracle is PEFT's own merge, which
transformers saves; both must agree key by key.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mla_tune.adapter.deltas import Adapter
from mla_tune.adapter.files import open_adapter
from mla_tune.arch.build import architecture
from mla_tune.checkpoint.index import Checkpoint
from mla_tune.errors import InputError
from tests.helpers.expert_tree import Tree
from tests.helpers.merging import MLA, MOE, edit_json, edit_tensors, load, make_base

CONFIG = MLA | MOE | {"attention_bias": True, "num_hidden_layers": 2}
PREFIX = "base_model.model.model.layers"
WEIGHTS = "adapter_model.safetensors"
MLP = ["gate_proj", "up_proj", "down_proj"]
#: The oracle computes in float32: sums of at most 6 products and a norm over 80 numbers, each off by a few last digits.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deepseek_v3 with a dense and a sparse layer and biases on q_a, kv_a and o_proj; no bias is 0, no norm is 1."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", **CONFIG), dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 1:
                tensor.copy_(float("norm" in name) + 0.1 * torch.randn_like(tensor))
    model.save_pretrained(folder)
    return folder


def adapter_of(model: nn.Module, folder: Path, save: Any = False, **settings: Any) -> Path:
    """Put PEFT's adapter on `model`, change every trained number at random, and let PEFT save it to `folder`."""
    torch.manual_seed(1)
    wrapped = get_peft_model(model, LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": []} | settings))
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    wrapped.save_pretrained(str(folder), save_embedding_layers=save)
    return folder


def opened(folder: Path, base: Path) -> Adapter:
    arch = architecture(json.loads((base / "config.json").read_text()))
    return open_adapter(folder, arch, Checkpoint.open(base).tensors)


def numpy_merge(adapter: Adapter, base: Path) -> dict[str, np.ndarray]:
    """Merge in float64, by the definitions of `LoraDelta` and `SavedTensor`; return the weights by checkpoint key."""
    out = {k: t.double().numpy() for k, t in load_file(base / "model.safetensors").items()}
    file = {k: t.double().numpy() for k, t in load_file(adapter.folder / WEIGHTS).items()}
    for saved in adapter.saved:
        out[saved.key] = file[saved.ref.key]
    for d in adapter.deltas:
        A, B = file[d.A.key], file[d.B.key]
        if d.site.is_experts and d.expert is None:
            stacks = A.reshape(d.experts, d.rank, -1), B.reshape(-1, d.rank, d.experts)
            pairs = [(stacks[0][e], stacks[1][:, :, e]) for e in range(d.site.count)]
            container, leaf = d.site.path.rsplit(".", 1)
            for e, (a, b) in enumerate(pairs):
                delta = d.scale * b @ a
                half = len(delta) // 2
                parts = {"down_proj": delta} if leaf == "down_proj" else {MLP[0]: delta[:half], MLP[1]: delta[half:]}
                for name, part in parts.items():
                    out[f"{container}.{e}.{name}.weight"] += part
            continue
        path = d.site.path
        if d.expert is not None:
            container, leaf = path.rsplit(".", 1)
            if d.rows is not None:
                assert d.rows in ((0, 40), (40, 80))
                leaf = "gate_proj" if d.rows[0] == 0 else "up_proj"
            path = f"{container}.{d.expert}.{leaf}"
        W = out[f"{path}.weight"] + d.scale * B @ A
        if d.vectors:
            W *= (file[d.vectors[0].key] / np.linalg.norm(W, axis=1))[:, None]
        out[f"{path}.weight"] = W
        if d.bias is not None:
            out[f"{path}.bias"] += d.scale * file[d.bias.key]
    return out


def assert_is_pefts_merge(folder: Path, base: Path, tmp_path: Path, unread: tuple[str, ...] = ()) -> Adapter:
    """Compare `numpy_merge` with PEFT's merge; keys that contain one of `unread` are of weights that nothing reads."""
    adapter = opened(folder, base)
    PeftModel.from_pretrained(load(base), folder).merge_and_unload().save_pretrained(tmp_path / "oracle")
    expected = load_file(tmp_path / "oracle" / "model.safetensors")
    merged = numpy_merge(adapter, base)
    assert merged.keys() == expected.keys()
    for key, tensor in expected.items():
        if not any(part in key for part in unread):
            np.testing.assert_allclose(merged[key], tensor.double().numpy(), **CLOSE, err_msg=key)
    held = load_file(folder / WEIGHTS)
    copies = [k for k in held if ".original_module." in k or ".modules_to_save." in k]
    assert sorted([*(r.key for r in adapter.refs()), *copies]) == sorted(held), "every key is used once"
    return adapter


def changed(adapter: Adapter, base: Path) -> set[str]:
    """Return the keys of all tensors of the base that a merge changes."""
    before, after = load_file(base / "model.safetensors"), numpy_merge(adapter, base)
    return {k for k in after if not np.array_equal(after[k], before[k].double().numpy())}


def test_lora_bias(base: Path, tmp_path: Path) -> None:
    folder = adapter_of(
        load(base),
        tmp_path / "a",
        target_modules=["q_a_proj", "o_proj"],
        lora_bias=True,
        use_rslora=True,
        rank_pattern={"o_proj": 5},
    )
    adapter = assert_is_pefts_merge(folder, base, tmp_path)
    names = {
        f"model.layers.{i}.self_attn.{m}.{p}"
        for i in (0, 1)
        for m in ("q_a_proj", "o_proj")
        for p in ("weight", "bias")
    }
    assert changed(adapter, base) == names


def test_lora_bias_without_a_bias_in_the_base(base: Path, tmp_path: Path) -> None:
    folder = adapter_of(load(base), tmp_path / "a", target_modules=["q_a_proj", "kv_b_proj"], lora_bias=True)
    with pytest.raises(RuntimeError, match="Impossible to merge LoRA with `lora_bias=True`"):
        PeftModel.from_pretrained(load(base), folder).merge_and_unload()
    with pytest.raises(
        InputError, match=r"0\.self_attn\.kv_b_proj\.lora_B\.bias' \(lora_bias\) needs the bias of .*none"
    ):
        opened(folder, base)


def test_lora_bias_that_is_not_set_or_not_complete(base: Path, tmp_path: Path) -> None:
    folder = adapter_of(load(base), tmp_path / "a", target_modules=["q_a_proj"], lora_bias=True)
    edit_json(folder / "adapter_config.json", lora_bias=False)
    with pytest.raises(InputError, match=r"has lora_B\.bias, but lora_bias is not set"):
        opened(folder, base)
    edit_json(folder / "adapter_config.json", lora_bias=True)
    edit_tensors(folder / WEIGHTS, lambda t: t.pop(f"{PREFIX}.1.self_attn.q_a_proj.lora_B.bias"))
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.q_a_proj' lacks lora_B\.bias"):
        opened(folder, base)


@pytest.mark.parametrize(
    "bias, targets, count",
    [
        ("all", ["q_a_proj", "kv_b_proj"], 6),
        ("lora_only", ["q_a_proj", "kv_b_proj"], 2),
        ("lora_only", ["kv_b_proj"], 0),
    ],
)
def test_trained_biases(bias: Any, targets: list[str], count: int, base: Path, tmp_path: Path) -> None:
    folder = adapter_of(load(base), tmp_path / "a", target_modules=targets, bias=bias)
    adapter = assert_is_pefts_merge(folder, base, tmp_path)
    assert len(adapter.saved) == count
    assert {s.key for s in adapter.saved} <= changed(adapter, base)


@pytest.mark.parametrize("bias, targets", [("all", ["kv_b_proj"]), ("lora_only", ["o_proj"])])
def test_trained_biases_that_were_not_saved(bias: Any, targets: list[str], base: Path, tmp_path: Path) -> None:
    folder = adapter_of(load(base), tmp_path / "a", target_modules=targets, bias=bias)
    edit_tensors(folder / WEIGHTS, lambda t: [t.pop(k) for k in list(t) if k.endswith(".bias")])
    with pytest.raises(
        InputError, match=rf"says bias: '{bias}', but the trained 'model\..*\.bias' is not in .*, nor are"
    ):
        opened(folder, base)
    edit_json(folder / "adapter_config.json", bias="none")
    assert not opened(folder, base).saved


def test_bias_all_on_a_base_without_biases(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    folder = adapter_of(load(base), tmp_path / "a", target_modules=["kv_b_proj"], bias="all")
    assert not opened(folder, base).saved


SAVED = ["lm_head", "embed_tokens", "model.norm", "q_a_layernorm", "mlp.gate"]


def test_modules_to_save(base: Path, tmp_path: Path) -> None:
    folder = adapter_of(load(base), tmp_path / "a", target_modules=["kv_b_proj"], modules_to_save=SAVED)
    edit_tensors(folder / WEIGHTS, lambda t: t[f"{PREFIX}.1.mlp.gate.e_score_correction_bias"].add_(1))
    adapter = assert_is_pefts_merge(folder, base, tmp_path)
    assert {s.key for s in adapter.saved} == {
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_a_layernorm.weight",
        "model.layers.1.self_attn.q_a_layernorm.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
    }
    assert {s.key for s in adapter.saved} < changed(adapter, base)


def test_a_name_means_every_module_whose_path_ends_with_it(base: Path, tmp_path: Path) -> None:
    folder = adapter_of(load(base), tmp_path / "a", target_modules=["kv_b_proj"], modules_to_save=["norm", "mlp"])
    with pytest.raises(InputError, match=r"holds fully trained experts, which are not supported"):
        opened(folder, base)
    folder = adapter_of(
        load(base), tmp_path / "b", target_modules=["kv_b_proj"], modules_to_save=["norm", "shared_experts"]
    )
    assert len(assert_is_pefts_merge(folder, base, tmp_path).saved) == 2 * 4 + 1 + 3


def test_expert_keys_on_disk_are_no_modules_to_save(base: Path, tmp_path: Path) -> None:
    """`down_proj` means dense and shared MLPs; the down_proj of a routed expert is a key on disk, not a module."""
    folder = adapter_of(load(base), tmp_path / "a", target_modules=["kv_b_proj"], modules_to_save=["down_proj"])
    assert {s.key for s in assert_is_pefts_merge(folder, base, tmp_path).saved} == {
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.shared_experts.down_proj.weight",
    }


@pytest.mark.parametrize(
    "lost", ["lm_head.weight", "model.layers.1.mlp.gate.e_score_correction_bias", "model.norm.weight"]
)
def test_modules_to_save_that_were_not_saved(lost: str, base: Path, tmp_path: Path) -> None:
    folder = adapter_of(load(base), tmp_path / "a", target_modules=["kv_b_proj"], modules_to_save=SAVED)
    edit_tensors(folder / WEIGHTS, lambda t: t.pop(f"base_model.model.{lost}"))
    with pytest.raises(KeyError):
        PeftModel.from_pretrained(load(base), folder)
    with pytest.raises(
        InputError, match=rf"says modules_to_save: lm_head, .*, but the trained '{lost}' is not in the file:"
    ):
        opened(folder, base)


def test_modules_to_save_that_the_model_lacks(base: Path, tmp_path: Path) -> None:
    folder = adapter_of(load(base), tmp_path / "a", target_modules=["kv_b_proj"], modules_to_save=["norm", "score"])
    assert len(assert_is_pefts_merge(folder, base, tmp_path).saved) == 9


def test_bias_all_with_a_module_to_save_that_has_a_bias(base: Path, tmp_path: Path) -> None:
    """PEFT writes such a bias under three keys, and loads the one with the module's own name."""
    settings = {"target_modules": ["kv_b_proj"], "modules_to_save": ["o_proj"], "bias": "all"}
    folder = adapter_of(load(base), tmp_path / "a", **settings)
    for copy in ("original_module", "modules_to_save"):
        edit_tensors(folder / WEIGHTS, lambda t, c=copy: t[f"{PREFIX}.0.self_attn.o_proj.{c}.bias"].add_(1))
    assert_is_pefts_merge(folder, base, tmp_path)
    edit_tensors(folder / WEIGHTS, lambda t: t.pop(f"{PREFIX}.0.self_attn.o_proj.bias"))
    with pytest.raises(InputError, match="is a copy that PEFT does not load again"):
        opened(folder, base)


def test_embeddings_saved_beside_the_lora(base: Path, tmp_path: Path) -> None:
    folder = adapter_of(load(base), tmp_path / "a", save=True, target_modules=["o_proj"])
    edit_tensors(folder / WEIGHTS, lambda t: [t[k].mul_(1.5) for k in t if "lora" not in k])
    adapter = assert_is_pefts_merge(folder, base, tmp_path)
    assert {s.key for s in adapter.saved} == {"lm_head.weight", "model.embed_tokens.weight"} < changed(adapter, base)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapted_head_saved_with_its_base_layer(dora: bool, base: Path, tmp_path: Path) -> None:
    """The LoRA is added to the saved weight, which PEFT loads into the wrapped layer."""
    folder = adapter_of(load(base), tmp_path / "a", save="auto", target_modules=["lm_head", "kv_b_proj"], use_dora=dora)
    edit_tensors(folder / WEIGHTS, lambda t: t["base_model.model.lm_head.base_layer.weight"].mul_(1.5))
    adapter = assert_is_pefts_merge(folder, base, tmp_path)
    assert [s.key for s in adapter.saved] == ["lm_head.weight"]
    assert adapter.deltas[-1].site.path == "lm_head"


def test_a_trained_weight_that_no_setting_names_is_used_as_peft_would(base: Path, tmp_path: Path) -> None:
    folder = adapter_of(load(base), tmp_path / "a", target_modules=["o_proj"])
    new = torch.randn(75, 28)
    edit_tensors(folder / WEIGHTS, lambda t: t.update({f"{PREFIX}.0.self_attn.kv_b_proj.weight": new}))
    assert [s.key for s in assert_is_pefts_merge(folder, base, tmp_path).saved] == [
        "model.layers.0.self_attn.kv_b_proj.weight"
    ]


@pytest.mark.parametrize(
    "key, words",
    [
        (
            f"{PREFIX}.0.self_attn.o_proj.weight",
            r"would be ignored by PEFT: .*o_proj' has a LoRA, so its own tensors must be in",
        ),
        (f"{PREFIX}.0.self_attn.kv_b_proj.base_layer.weight", "would be ignored by PEFT: .*has no LoRA in this file"),
        ("model.norm.weight", r"does not begin with 'base_model\.model\.'"),
        (
            "base_model.model.model.nrom.weight",
            r"fits no tensor of the base model; did you mean 'base_model.*\.model\.norm",
        ),
        (f"{PREFIX}.1.mlp.experts.gate_up_proj", "fully trained experts"),
        ("base_model.model.model.norm.modules_to_save.weight", "is a copy that PEFT does not load again"),
    ],
)
def test_trained_tensors_that_peft_would_ignore(key: str, words: str, base: Path, tmp_path: Path) -> None:
    folder = adapter_of(load(base), tmp_path / "a", target_modules=["o_proj"])
    before = PeftModel.from_pretrained(load(base), folder).merge_and_unload().state_dict()
    edit_tensors(folder / WEIGHTS, lambda t: t.update({key: torch.zeros(48, 45)}))
    if "experts" not in key:
        after = PeftModel.from_pretrained(load(base), folder).merge_and_unload().state_dict()
        assert all(torch.equal(after[k], before[k]) for k in before)
    with pytest.raises(InputError, match=f"'{key}' .*{words}"):
        opened(folder, base)


def test_trained_tensors_of_another_shape_or_dtype(base: Path, tmp_path: Path) -> None:
    model = load(base)
    model.resize_token_embeddings(101)
    folder = adapter_of(model, tmp_path / "a", save=True, target_modules=["o_proj"])
    with pytest.raises(InputError, match=r"is \(101, 48\), but 'lm_head\.weight' .* \(97, 48\): .*_embeddings\(101\)"):
        opened(folder, base)
    folder = adapter_of(load(base), tmp_path / "b", target_modules=["o_proj"], modules_to_save=["model.norm"])
    norm = "base_model.model.model.norm.weight"
    edit_tensors(folder / WEIGHTS, lambda t: t.update({norm: torch.ones(47)}))
    with pytest.raises(
        InputError, match=r"norm\.weight' is \(47,\), but .* \(48,\): was the adapter trained on another"
    ):
        opened(folder, base)
    edit_tensors(folder / WEIGHTS, lambda t: t.update({norm: torch.ones(48, dtype=torch.int64)}))
    with pytest.raises(InputError, match=r"norm\.weight' is I64; an adapter in "):
        opened(folder, base)
    edit_tensors(folder / WEIGHTS, lambda t: t.update({norm: torch.full((48,), torch.nan)}))
    with pytest.raises(InputError, match=r"norm\.weight' holds NaN"):
        opened(folder, base).check_finite()


def test_layers_that_transformers_does_not_load(base: Path, tmp_path: Path) -> None:
    """The norms and biases of an MTP layer are not in the model: the file need not hold them and must not."""
    folder = adapter_of(load(base), tmp_path / "a", target_modules=["kv_b_proj"], modules_to_save=["norm"], bias="all")
    arch = architecture(json.loads((base / "config.json").read_text()))
    keys = Checkpoint.open(base).tensors
    mtp = {k.replace("layers.1", "layers.2"): ref for k, ref in keys.items() if "layers.1" in k}
    mtp |= {"model.mtp.norm.weight": keys["model.norm.weight"]}
    assert len(open_adapter(folder, arch, keys | mtp).saved) == 9 + 6
    extra = f"{PREFIX}.2.input_layernorm.weight"
    edit_tensors(folder / WEIGHTS, lambda t: t.update({extra: torch.ones(48)}))
    with pytest.raises(InputError, match=rf"'{extra}' belongs to a layer that transformers does not load"):
        open_adapter(folder, arch, keys | mtp)


@pytest.mark.parametrize(
    "modules, keys",
    [
        (["lm_head"], {"lm_head.weight"}),
        (["embed_tokens"], {"model.embed_tokens.weight"}),
        (["lm_head", "embed_tokens"], {"lm_head.weight", "model.embed_tokens.weight"}),
    ],
)
def test_tied_embeddings_keep_the_keys_of_the_file(modules: list[str], keys: set[str], tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "minicpm3")
    assert "lm_head.weight" not in load_file(base / "model.safetensors")
    folder = adapter_of(load(base), tmp_path / "a", target_modules=["kv_b_proj"], modules_to_save=modules)
    assert {s.key for s in opened(folder, base).saved} == keys
    edit_tensors(folder / WEIGHTS, lambda t: t.pop(f"base_model.model.{min(keys)}"))
    with pytest.raises(InputError, match=f"but the trained '{min(keys)}' is not in the file"):
        opened(folder, base)


PER_EXPERT: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": [*MLP, "o_proj"]},
    "rslora": {"target_modules": MLP, "use_rslora": True},
    "dora": {"target_modules": MLP, "use_dora": True},
    "some experts": {"target_modules": r".*experts\.[02]\.(up|down)_proj"},
    "patterns": {
        "target_modules": MLP,
        "rank_pattern": {r"experts\.1\.gate_proj": 2, r"experts\.\d\.up_proj": 4, "shared_experts.up_proj": 6},
        "alpha_pattern": {r"experts\.[13]\.down_proj": 2, "up_proj": 11},
    },
}


@pytest.mark.parametrize("kind", PER_EXPERT)
def test_adapters_of_single_experts(kind: str, base: Path, tmp_path: Path) -> None:
    folder = adapter_of(Tree(base), tmp_path / "a", **PER_EXPERT[kind])
    adapter = opened(folder, base)
    expected = PeftModel.from_pretrained(Tree(base), folder).merge_and_unload().state_dict()
    merged = numpy_merge(adapter, base)
    assert any(".experts.2.down_proj" in k for k in expected)
    for key, tensor in expected.items():
        np.testing.assert_allclose(merged[key], tensor.double().numpy(), **CLOSE, err_msg=key)
    assert sorted(r.key for r in adapter.refs()) == sorted(load_file(folder / WEIGHTS)), "every key is used once"
    experts = [d for d in adapter.deltas if d.expert is not None]
    places = [(d.site.path, d.expert, d.rows or (0, 0)) for d in experts]
    sites = [site.path for site in architecture(json.loads((base / "config.json").read_text())).sites]
    assert experts
    assert places == sorted(places, key=lambda place: (sites.index(place[0]), *place[1:]))


def test_gate_comes_before_up_in_any_order_of_the_file(base: Path, tmp_path: Path) -> None:
    folder = adapter_of(Tree(base), tmp_path / "a", target_modules=MLP)
    edit_tensors(folder / WEIGHTS, lambda t: t.update({k: v.half() for k, v in t.items() if "gate_proj" in k}))
    deltas = [d for d in opened(folder, base).deltas if d.rows is not None]
    assert [(d.expert, d.rows) for d in deltas] == [(e, r) for e in range(4) for r in ((0, 40), (40, 80))]


def test_factors_of_identity_experts(tmp_path: Path) -> None:
    """LongCat-Flash has 4 experts and 2 identity experts; transformers allocates gate_up_proj for all 6."""
    base = make_base(tmp_path / "base", "longcat_flash")
    both = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    folder = adapter_of(load(base), tmp_path / "a", target_parameters=both, target_modules=["kv_b_proj"])
    adapter = assert_is_pefts_merge(folder, base, tmp_path, unread=("experts.4.", "experts.5."))
    assert [d.experts for d in adapter.deltas if d.site.is_experts] == [6, 4] * 2


def test_how_peft_loads_adapters_of_single_experts(base: Path, tmp_path: Path) -> None:
    """PEFT agrees with us on LoRA of routed experts, but it scales rsLoRA on gate_up by √2 too much and drops dense and
    shared MLPs of the same file.  This is why mla-tune maps factors by the names in the keys."""
    only = {"target_modules": rf".*layers\.1\.mlp\.experts\.\d\.({'|'.join(MLP)})"}
    for rslora in (False, True):
        folder = adapter_of(Tree(base), tmp_path / f"a{rslora}", use_rslora=rslora, **only)
        edit_json(folder / "adapter_config.json", target_modules=MLP)
        PeftModel.from_pretrained(load(base), folder).merge_and_unload().save_pretrained(tmp_path / "oracle")
        peft, before = load_file(tmp_path / "oracle" / "model.safetensors"), load_file(base / "model.safetensors")
        ours = numpy_merge(opened(folder, base), base)
        for leaf in MLP:
            key = f"model.layers.1.mlp.experts.3.{leaf}.weight"
            ratio = np.linalg.norm((peft[key] - before[key]).numpy()) / np.linalg.norm(ours[key] - before[key].numpy())
            assert ratio == pytest.approx(2**0.5 if rslora and leaf != "down_proj" else 1, rel=1e-4)
    folder = adapter_of(Tree(base), tmp_path / "all", target_modules=MLP)
    after = PeftModel.from_pretrained(load(base), folder).merge_and_unload().state_dict()
    for key in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.shared_experts.up_proj.weight"):
        assert torch.equal(after[key], before[key])
        assert key in changed(opened(folder, base), base)


def test_adapters_of_single_experts_and_of_all_at_once_are_refused(base: Path, tmp_path: Path) -> None:
    both = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    folder = adapter_of(load(base), tmp_path / "a", target_parameters=both)
    one = {
        f"{PREFIX}.1.mlp.experts.2.up_proj.lora_{p}.weight": torch.zeros(s) for p, s in (("A", (3, 48)), ("B", (40, 3)))
    }
    edit_tensors(folder / WEIGHTS, lambda t: t.update(one))
    with pytest.raises(
        InputError, match=r"experts\.2\.up_proj\.lora_A\.weight' and .* both adapt .*experts\.gate_up_proj"
    ):
        opened(folder, base)


def test_wrong_shapes_and_missing_parts_of_single_experts(base: Path, tmp_path: Path) -> None:
    folder = adapter_of(Tree(base), tmp_path / "a", target_modules=MLP)
    key = f"{PREFIX}.1.mlp.experts.2.up_proj.lora_B.weight"
    edit_tensors(folder / WEIGHTS, lambda t: t.update({key: torch.zeros(80, 3)}))
    with pytest.raises(InputError, match=rf"'{key}' is \(80, 3\), but \(40, 3\) was expected"):
        opened(folder, base)
    edit_tensors(folder / WEIGHTS, lambda t: t.pop(key))
    with pytest.raises(InputError, match=r"experts\.2\.up_proj' lacks lora_B\.weight"):
        opened(folder, base)
