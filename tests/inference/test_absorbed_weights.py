"""Absorbed attention where `kv_b_proj` has no plain weight: W_UK and W_UV from absorbed.safetensors beside the model.

The oracle is the same model through stock attention, which calls `kv_b_proj` as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import mla_tune
from mla_tune.arch.build import architecture
from mla_tune.checkpoint.index import Checkpoint
from mla_tune.errors import FileError
from mla_tune.inference import attention_interface as attention
from mla_tune.inference.absorb import mla_modules, unsupported_reasons
from mla_tune.inference.lora_tensors import BASE
from mla_tune.merge.absorb import write_absorbed
from tests.helpers.inference import adapt, attention_outputs, build, generate, ids, logits, near

PATH = "model.layers.0.self_attn"


class Coded(nn.Linear):
    """A linear layer whose weight is 8-bit codes, like those of quantized models."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = 0.01
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with absorbed tensors; the weights of its `kv_b_proj` are integers divided by 100."""
    path = tmp_path_factory.mktemp("model")
    model = build()
    with torch.no_grad():
        for module in mla_modules(model):
            module.kv_b_proj.weight.copy_((module.kv_b_proj.weight / 0.01).round() * 0.01)
    model.save_pretrained(path)
    absorb_file(path, "split")
    return path


def absorb_file(path: Path, mode: str) -> None:
    checkpoint = Checkpoint.open(path)
    write_absorbed(architecture(checkpoint.config, str(path)), checkpoint, path, mode)


def coded(path: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for module in mla_modules(model):
        module.kv_b_proj = Coded(module.kv_b_proj)
    return model


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_quantized_kv_b_proj(folder: Path, absorbed_calls: list[int]) -> None:
    model = coded(folder)
    right, tokens = logits(model, ids()), generate(model, ids(), 40)
    with mla_tune.absorb(model):
        assert not unsupported_reasons(model)
        assert torch.equal(generate(model, ids(), 40), tokens)
        assert set(absorbed_calls) == {1}
    with mla_tune.absorb(model, "absorbed"):
        assert near(logits(model, ids()), right)
    assert torch.equal(logits(model, ids()), right)


def test_sixteen_bits(folder: Path) -> None:
    """The file's tensors get the dtype of the activations (whole logits would show flips of the router)."""
    model = coded(folder).to(torch.bfloat16)
    (right,) = attention_outputs(model, ids())
    with mla_tune.absorb(model, "absorbed"):
        (ours,) = attention_outputs(model, ids())
    assert ours.dtype == torch.bfloat16
    assert near(ours.float(), right.float(), 0.02)


def test_an_offloaded_model(folder: Path, absorbed_calls: list[int]) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    right = logits(model, ids())
    cpu_offload(model, torch.device("cpu"))
    assert next(mla_modules(model)).kv_b_proj.weight.is_meta
    with mla_tune.absorb(model, "absorbed"):
        assert not unsupported_reasons(model)
        assert near(logits(model, ids()), right)
    assert absorbed_calls


def test_adapters_above_it(folder: Path) -> None:
    """One unmerged adapter, and one for each row; the oracle is PEFT on stock attention."""
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = adapt(plain, "x", "y", target_modules=["kv_b_proj", "o_proj"])
    for module in mla_modules(model):
        module.kv_b_proj.base_layer = Coded(module.kv_b_proj.base_layer)
    right = logits(model, ids())
    with model.disable_adapter():
        base = logits(model, ids())
    model.set_adapter("y")
    other = logits(model, ids())
    model.set_adapter("x")
    with mla_tune.absorb(model, "absorbed"):
        assert not unsupported_reasons(model)
        assert near(logits(model, ids()), right)
        rows = logits(model, ids(), adapter_names=["y", BASE])
        assert near(rows, torch.stack((other[0], base[1])))
        model.base_model.model.model.layers[0].self_attn.kv_b_proj.merged_adapters.append("x")
        (why,) = unsupported_reasons(model).values()
        assert why == "kv_b_proj is a Coded, and adapters are merged into it"


def test_dora_needs_the_weight(folder: Path) -> None:
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = adapt(plain, "x", target_modules=["kv_b_proj"], use_dora=True)
    for module in mla_modules(model):
        module.kv_b_proj.base_layer = Coded(module.kv_b_proj.base_layer)
    with mla_tune.absorb(model, "absorbed"):
        assert set(unsupported_reasons(model).values()) == {
            "kv_b_proj is a Coded, and a DoRA needs the norms of its rows"
        }


def test_a_weight_that_changes_is_seen(folder: Path) -> None:
    model = coded(folder)
    with mla_tune.absorb(model, "absorbed"):
        before = logits(model, ids())
        weight = next(mla_modules(model)).kv_b_proj.weight
        weight.copy_(weight // 2)
        assert "has changed since absorbed.safetensors was found to match it" in unsupported_reasons(model)[PATH]
        ours = logits(model, ids())
    assert near(ours, logits(model, ids()))
    assert not near(ours, before, 1e-3)


def test_a_plain_weight_is_not_read_from_the_file(folder: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with mla_tune.absorb(model):
        for module in mla_modules(model):
            state = getattr(module, attention.STATE)
            assert state.stored_weights is None
            assert state.up_projections(module.kv_b_proj.weight)[0].data_ptr() == module.kv_b_proj.weight.data_ptr()


def _gone(path: Path) -> None:
    (path / "absorbed.safetensors").unlink()


def _other(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors[f"{PATH}.kv_b_proj.weight"][0, 0] += 0.01
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def _folded(path: Path) -> None:
    absorb_file(path, "fold")


def _torn(path: Path) -> None:
    file = path / "absorbed.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def _silent(path: Path) -> None:
    """A file without the hashes of the tensors that it was made from."""
    save_file(load_file(path / "absorbed.safetensors"), path / "absorbed.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "change, why",
    [
        (_gone, "kv_b_proj is a Coded"),
        (_other, rf"kv_b_proj is a Coded, and .*absorbed.safetensors was made from another kv_b_proj than {PATH} has"),
        (_silent, "was made from another kv_b_proj"),
        (_folded, "absorbed.safetensors has no W_UK and W_UV of"),
        (_torn, "absorbed.safetensors: damaged or incomplete"),
    ],
)
def test_a_file_that_does_not_fit(
    folder: Path,
    tmp_path: Path,
    change: Any,
    why: str,
    absorbed_calls: list[int],
) -> None:
    """The module stays expanded, and the reason is given."""
    path = copied(folder, tmp_path / "model")
    change(path)
    model = coded(path)
    right = logits(model, ids())
    with mla_tune.absorb(model, "absorbed"):
        found = unsupported_reasons(model)
        assert len(found) == len(list(mla_modules(model)))
        with pytest.raises(FileError, match=why):
            raise FileError(found[PATH])
        assert near(logits(model, ids()), right)
    assert not absorbed_calls


def test_control_another_file_is_taken(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the comparison of hashes disabled, another model's file is used, and the logits are wrong."""
    path = copied(folder, tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors[f"{PATH}.kv_b_proj.weight"] = tensors[f"{PATH}.kv_b_proj.weight"].flip(0).contiguous()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(
        "mla_tune.inference.absorbed_weights.sources_of", lambda _: {f"{PATH}.kv_b_proj.weight": "same"}
    )
    monkeypatch.setattr("mla_tune.inference.absorbed_weights.sha256", lambda _: "same")
    monkeypatch.setattr("mla_tune.inference.absorb.find_absorbed_weights", _only_first)
    model = coded(path)
    right = logits(model, ids())
    with mla_tune.absorb(model, "absorbed"):
        assert not near(logits(model, ids()), right, 1e-3)


def _only_first(model: Any, modules: dict[str, Any]) -> Any:
    from mla_tune.inference.absorbed_weights import find_absorbed_weights

    return find_absorbed_weights(model, {PATH: modules[PATH]})
