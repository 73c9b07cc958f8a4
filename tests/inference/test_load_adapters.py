"""Several adapters with different placements in one model.

The oracle is each adapter alone, as PEFT loads and merges it; that all of them are what their files say is compared
with the files.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import mla_tune
from mla_tune.adapter.deltas import Adapter
from mla_tune.adapter.files import open_adapter
from mla_tune.adapter.placement import place
from mla_tune.arch.build import architecture
from mla_tune.checkpoint.index import Checkpoint
from mla_tune.errors import InputError
from mla_tune.inference.load_adapters import has_modules_to_save, load_adapters, modules_to_save_disabled
from mla_tune.inference.lora_tensors import BASE
from mla_tune.model.attach import attach, attached_loras
from mla_tune.recipe.load import load_recipe
from mla_tune.recipe.schema import AdapterSection
from tests.helpers.marks import fast_cases
from tests.helpers.merging import TOKENS, edit_json, load, make_adapter, make_base

WEIGHTS = "adapter_model.safetensors"
#: What the shipped recipes and some of a user's own put where; `experts.…` with ranks of its own has patterns.
PLACEMENTS: dict[str, dict[str, Any]] = {
    **{
        name: load_recipe(name).adapter.model_dump(exclude_unset=True)
        for name in ("safe", "all-linear", "W_UKV-priority", "attention-only", "bottleneck")
    },
    "safe with experts": {"targets": "safe", "experts": True, "rank": 5, "alpha": 9},
    "experts, gate and up": {"targets": ["experts_gate_up"], "rank": 3, "alpha": 7},
    "experts, down": {"targets": ["experts_down", "W_O"], "rank": 4, "alpha": 7, "method": "rslora"},
    "ranks of their own": {
        "targets": ["mlp", "experts"], "rank": 4, "alpha": 8, "roles": {"experts_down": {"rank": 2, "alpha": 3}},
    },
    "dora": {"targets": "attention-only", "method": "dora", "rank": 4, "alpha": 8},
    "dropout": {"targets": ["W_O"], "dropout": 0.1, "rank": 4, "alpha": 8},
}  # fmt: skip
FAMILIES = ["deepseek_v3", "longcat_flash"]


def base_of(folder: Path, family: str) -> Path:
    return make_base(folder / family, family)


def trained(base: Path, folder: Path, placement: dict[str, Any]) -> Path:
    """An adapter for a recipe's targets on `base`, with random weights, saved by PEFT."""
    arch = architecture(json.loads((base / "config.json").read_text()))
    section = AdapterSection.model_validate({"rank": 6, "alpha": 10} | placement)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = attach(load(base), arch, place(arch, section), seed=0)
    for key, p in model.named_parameters():
        if "lora_" in key:
            p.data += 0.1 * torch.randn_like(p)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def opened(base: Path, folder: Path) -> Adapter:
    arch = architecture(json.loads((base / "config.json").read_text()))
    return open_adapter(folder, arch, Checkpoint.open(base).tensors)


def together(base: Path, folders: dict[str, Path]) -> Any:
    """Load the adapters; their names in PEFT are `adapter_NAME`."""
    net, lost = with_loss(base, folders)
    assert lost == ""
    return net


def with_loss(base: Path, folders: dict[str, Path]) -> tuple[Any, str]:
    adapters = {name: opened(base, folder) for name, folder in folders.items()}
    return load_adapters(load(base), adapters, {name: f"adapter_{name}" for name in folders}, "the base")


def digest(folder: Path) -> str:
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(folder.iterdir()))).hexdigest()


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor = TOKENS, **kwargs: Any) -> torch.Tensor:
    return model(input_ids=tokens, **kwargs).logits


def alone(base: Path, folder: Path) -> Any:
    """Logits of an adapter that PEFT has loaded alone and merged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(load(base), str(folder)).merge_and_unload().eval()


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


# Any combination ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(base, folder of an adapter for each placement, logits of each adapter loaded alone)."""
    folder = tmp_path_factory.mktemp("side-by-side")
    base = base_of(folder, request.param)
    torch.manual_seed(5)
    folders = {name: trained(base, folder / name.replace(" ", "-"), p) for name, p in PLACEMENTS.items()}
    return base, folders, {name: logits(alone(base, path)) for name, path in folders.items()}


@fast_cases("deepseek_v3-False")
@pytest.mark.parametrize("turned", [False, True])
def test_all_placements_in_one_model(made: Any, turned: bool) -> None:
    """Adapters load in both orders, without warnings, and no file is written."""
    base, folders, right = made
    before = {name: digest(path) for name, path in folders.items()}
    names = list(folders)[::-1] if turned else list(folders)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        net = together(base, {name: folders[name] for name in names})
    plain = logits(load(base))
    assert net.active_adapters == [f"adapter_{names[0]}"]
    for name in names:
        net.set_adapter(f"adapter_{name}")
        assert near(logits(net), right[name]), name
        assert not near(right[name], plain)
    with net.disable_adapter():
        assert near(logits(net), plain)
    with mla_tune.absorb(net):
        for name in names:
            net.set_adapter(f"adapter_{name}")
            assert near(logits(net), right[name]), name
        rows = [*names, None]
        mixed = [BASE if name is None else f"adapter_{name}" for name in rows]
        found = logits(net, TOKENS[:1].expand(len(rows), -1), adapter_names=mixed)
        assert near(found, torch.cat([(plain if name is None else right[name])[:1] for name in rows]))
    assert {name: digest(path) for name, path in folders.items()} == before


@fast_cases("deepseek_v3")
def test_placement_is_that_of_the_files(made: Any) -> None:
    """Matrices, ranks and scales are as in a model with that adapter alone; weights equal those in the file."""
    base, folders, _ = made
    net = together(base, folders)
    for name, folder in folders.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own = attached_loras(PeftModel.from_pretrained(load(base), str(folder)))
        found = attached_loras(net, f"adapter_{name}")
        assert {(a.parameter, a.rank, a.scale) for a in found} == {(a.parameter, a.rank, a.scale) for a in own}
        held = sorted(
            float(t.double().sum()) for key, t in net.state_dict().items() if f".adapter_{name}." in f"{key}."
        )
        assert held == sorted(float(t.double().sum()) for t in load_file(folder / WEIGHTS).values())
        settings = json.loads((folder / "adapter_config.json").read_text())
        assert set(net.peft_config[f"adapter_{name}"].target_parameters or ()) == set(
            settings["target_parameters"] or ()
        )
    assert not [key for key, _ in net.named_parameters() if "frame" in key]
    assert "frame" not in net.peft_config


def test_one_parameter_beside_the_other(tmp_path: Path) -> None:
    """Both files have the key `experts.lora_A`, but for different parameters."""
    base = make_base(tmp_path / "base")
    folders = {
        name: make_adapter(tmp_path / name, base, target_parameters=[f"mlp.experts.{name}"])
        for name in ("gate_up_proj", "down_proj")
    }
    keys = [set(load_file(folder / WEIGHTS)) for folder in folders.values()]
    assert keys[0] == keys[1]
    net = together(base, folders)
    for name, folder in folders.items():
        net.set_adapter(f"adapter_{name}")
        assert near(logits(net), logits(alone(base, folder))), name


def old_file(folder: Path, base: Path, *more: str, **settings: Any) -> Path:
    """One LoRA for each expert's gate, up and down, as transformers before 5 had them, and for `more` matrices."""
    make_adapter(folder, base, target_modules=["o_proj"])
    weights, tensors = load_file(base / "model.safetensors"), {}
    for key, W in weights.items():
        path = key.removesuffix(".weight")
        if ".mlp.experts." in key or path in more:
            for x, shape in (("A", (3, W.shape[1])), ("B", (W.shape[0], 3))):
                tensors[f"base_model.model.{path}.lora_{x}.weight"] = 0.1 * torch.randn(shape)
    save_file(tensors, folder / WEIGHTS)
    edit_json(folder / "adapter_config.json", target_modules=["gate_proj", "up_proj", "down_proj"], **settings)
    return folder


def test_a_file_of_single_experts(tmp_path: Path) -> None:
    """PEFT stacks the experts' LoRAs, beside another adapter; the oracle adds each expert's delta itself."""
    torch.manual_seed(3)
    base = make_base(tmp_path / "base")
    old = old_file(tmp_path / "old", base)
    new = make_adapter(tmp_path / "new", base, target_parameters=["mlp.experts.down_proj"])
    net = together(base, {"new": new, "old": old})
    net.set_adapter("adapter_old")
    weights, factors = load_file(base / "model.safetensors"), load_file(old / WEIGHTS)
    for key in weights:
        stem = f"base_model.model.{key.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in factors:
            weights[key] += (7 / 3) * factors[f"{stem}.lora_B.weight"] @ factors[f"{stem}.lora_A.weight"]
    (tmp_path / "by-hand").mkdir()
    save_file(weights, tmp_path / "by-hand" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "by-hand" / "config.json").write_text((base / "config.json").read_text())
    assert near(logits(net), logits(load(tmp_path / "by-hand")))


# Named errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, settings, words",
    [
        (["model.layers.0.mlp.up_proj"], {}, r"not loaded: model\.layers\.0\.mlp\.up_proj\.weight"),
        ([], {"use_rslora": True}, r"gate_up_proj: rank 6, scale 4\.04145 in the file; 6, 5\.71548 in PEFT"),
    ],
)
def test_adapters_that_peft_misloads_are_refused(tmp_path: Path, more: list[str], settings: Any, words: str) -> None:
    """PEFT itself would load them without a warning."""
    base = make_base(tmp_path / "base")
    old = old_file(tmp_path / "old", base, *more, **settings)
    with pytest.raises(
        InputError, match=rf"old: PEFT loads this adapter differently from what its file holds \(.*{words}"
    ):
        together(base, {"old": old})


def test_keys_that_peft_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT would leave the initial values in such an adapter, without a warning."""
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", base, target_modules=["o_proj"])
    monkeypatch.setattr(
        "mla_tune.inference.load_adapters._key_mapping", lambda *_: {r"\.o_proj\.lora_B": ".o_proj.lora_C"}
    )
    with pytest.raises(InputError, match=r"not loaded: base_model\.model\.model\.layers\.0\.self_attn\.o_proj\.lora_B"):
        together(base, {"a": adapter})


@pytest.mark.parametrize("settings, what", [({"use_dora": True}, "DoRA"), ({"lora_dropout": 0.1}, "dropout")])
@pytest.mark.parametrize("turned", [False, True])
def test_one_matrix_as_a_module_and_as_a_parameter(
    tmp_path: Path, settings: dict[str, Any], what: str, turned: bool
) -> None:
    base = make_base(tmp_path / "base")
    folders = {
        "module": make_adapter(tmp_path / "module", base, target_modules=["o_proj", "q_a_proj"], **settings),
        "parameter": make_adapter(tmp_path / "parameter", base, target_parameters=["o_proj.weight"]),
    }
    folders = dict(reversed(folders.items())) if turned else folders
    words = (
        "module and parameter can't be in one model: both adapt model.layers.0.self_attn.o_proj, parameter as a "
        rf"parameter \(target_parameters\), and there PEFT does not support {what}, which module has. Merge one of them"
    )
    with pytest.raises(InputError, match=words):
        together(base, folders)


def test_one_matrix_as_a_module_and_as_a_parameter_of_plain_lora(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    folders = {
        "module": make_adapter(tmp_path / "module", base, target_modules=["o_proj", "q_a_proj"]),
        "parameter": make_adapter(tmp_path / "parameter", base, target_parameters=["o_proj.weight"]),
    }
    net = together(base, folders)
    for name, folder in folders.items():
        net.set_adapter(f"adapter_{name}")
        assert near(logits(net), logits(alone(base, folder))), name


def test_a_saved_embedding_that_would_overwrite_the_base(tmp_path: Path) -> None:
    """PEFT loads a saved embedding into the base, so it would apply to every other adapter."""
    base = make_base(tmp_path / "base")
    adapter, other = (make_adapter(tmp_path / name, base, target_modules=["o_proj"]) for name in "ab")
    tensors = load_file(adapter / WEIGHTS)
    tensors["base_model.model.model.embed_tokens.weight"] = torch.randn(97, 48)
    save_file(tensors, adapter / WEIGHTS)
    net, lost = with_loss(base, {"a": adapter})
    assert lost == "model.embed_tokens.weight"
    assert near(logits(net), logits(alone(base, adapter)))
    with pytest.raises(InputError, match=r"a holds a model\.embed_tokens\.weight that would replace the base's"):
        together(base, {"b": other, "a": adapter})


def test_a_head_saved_with_its_base_layer(tmp_path: Path) -> None:
    """PEFT saves an adapted head with the base's tensor; loading that tensor changes nothing."""
    base = make_base(tmp_path / "base")
    folders = {name: make_adapter(tmp_path / name, base, target_modules=["lm_head", "o_proj"]) for name in "ab"}
    tensors = load_file(folders["a"] / WEIGHTS)
    head = load_file(base / "model.safetensors")["lm_head.weight"]
    save_file(tensors | {"base_model.model.lm_head.base_layer.weight": head}, folders["a"] / WEIGHTS)
    net = together(base, folders)
    assert not has_modules_to_save(net, "adapter_a")
    right = torch.cat([logits(alone(base, folders[name]))[i : i + 1] for i, name in enumerate("ab")])
    with mla_tune.absorb(net):
        assert near(logits(net, adapter_names=["adapter_a", "adapter_b"]), right)


def test_modules_to_save_beside_a_mixed_batch(tmp_path: Path) -> None:
    """PEFT would look up the module of each row, and raise for a norm and for adapters without the module."""
    base = make_base(tmp_path / "base")
    folders = {
        "a": make_adapter(tmp_path / "a", base, target_modules=["o_proj"]),
        "b": make_adapter(tmp_path / "b", base, target_modules=["kv_b_proj"]),
        "norm": make_adapter(tmp_path / "norm", base, target_modules=["o_proj"], modules_to_save=["model.norm"]),
        "head": make_adapter(tmp_path / "head", base, target_modules=["o_proj"], modules_to_save=["lm_head"]),
    }
    net = together(base, folders)
    assert [name for name in folders if has_modules_to_save(net, f"adapter_{name}")] == ["norm", "head"]
    right = torch.cat([logits(alone(base, folders[name]))[i : i + 1] for i, name in enumerate("ab")])
    names = {"adapter_names": ["adapter_a", "adapter_b"]}
    for before in ("a", "head"):
        net.set_adapter(f"adapter_{before}")
        with mla_tune.absorb(net), modules_to_save_disabled(net):
            assert near(logits(net, **names), right)
        assert near(logits(net), logits(alone(base, folders[before]))), "they act again"
