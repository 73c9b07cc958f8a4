"""Every adapter kind, several adapters at once, and every way of computing, against PEFT, numpy and plain sums."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mla_tune.adapter.merge_options import MergeOptions
from mla_tune.errors import InputError
from mla_tune.merge.run import merge_absorb
from tests.helpers.merging import (
    FAMILIES,
    TOKENS,
    edit_json,
    edit_tensors,
    load,
    logits_of,
    make_adapter,
    make_base,
    save_trained,
)

ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
QUICK: dict[str, Any] = {"verify": False}


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("kinds") / "v3", shard="60KB")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("kinds") / "tied", "minicpm3")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    files = [p for p in folder.glob("*.safetensors") if not p.name.startswith("absorbed")]
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(load(base), adapter).eval()(TOKENS).logits


# Several adapters -----------------------------------------------------------------------------------------------------


def test_weighted_adapters_are_pefts_weighted_sum(v3: Path, tmp_path: Path) -> None:
    first = make_adapter(tmp_path / "first", v3, target_modules=["kv_b_proj", "o_proj"])
    second = make_adapter(tmp_path / "second", v3, r=5, target_modules=["kv_b_proj", "q_b_proj"], use_rslora=True)
    merge_absorb([(first, 0.7), (second, -0.3)], v3, tmp_path / "out", **QUICK)
    model: Any = PeftModel.from_pretrained(load(v3), first, adapter_name="first")
    model.load_adapter(second, adapter_name="second")
    for module in model.modules():
        for name, weight in (("first", 0.7), ("second", -0.3)):
            if isinstance(getattr(module, "scaling", None), dict) and name in module.scaling:
                module.scaling[name] *= weight
    model.base_model.set_adapter(["first", "second"])
    expected = model.merge_and_unload().state_dict()
    merged = load(tmp_path / "out").state_dict()
    for key, tensor in expected.items():
        assert (merged[key] - tensor).abs().max() <= 1e-6 * tensor.abs().max(), key


def test_weighted_adapters_on_the_experts(v3: Path, tmp_path: Path) -> None:
    """PEFT can't activate two adapters on one parameter: the oracle adds the changes of two merges."""
    folders = [
        make_adapter(tmp_path / name, v3, r=r, target_parameters=targets)
        for name, r, targets in (("a", 2, EXPERTS), ("b", 4, EXPERTS[1:]))
    ]
    base = load(v3).state_dict()
    alone = [PeftModel.from_pretrained(load(v3), f).merge_and_unload().state_dict() for f in folders]
    merge_absorb([(folders[0], 0.5), (folders[1], 2.0)], v3, tmp_path / "out", **QUICK)
    for key, tensor in load(tmp_path / "out").state_dict().items():
        wanted = base[key] + 0.5 * (alone[0][key] - base[key]) + 2.0 * (alone[1][key] - base[key])
        assert (tensor - wanted).abs().max() <= 4e-6 * wanted.abs().max().clamp_min(1e-30), key


def test_what_is_not_a_sum_is_merged_alone(v3: Path, tmp_path: Path) -> None:
    dora = make_adapter(tmp_path / "dora", v3, target_modules=["kv_b_proj"], use_dora=True)
    lora = make_adapter(tmp_path / "lora", v3, target_modules=["kv_b_proj"])
    for adapters in ([(dora, 0.5)], [(dora, 1.0), (lora, 1.0)]):
        with pytest.raises(InputError, match="dora: is a DoRA: it can be merged alone and with the weight 1 only"):
            merge_absorb(adapters, v3, tmp_path / "out", **QUICK)
    saved = make_adapter(tmp_path / "saved", v3, target_modules=["kv_b_proj"], modules_to_save=["norm"])
    with pytest.raises(InputError, match="saved: holds whole tensors"):
        merge_absorb([(lora, 1.0), (saved, 1.0)], v3, tmp_path / "out", **QUICK)
    with pytest.raises(InputError, match="the same adapter is named twice"):
        merge_absorb([(lora, 1.0), (lora, 0.5)], v3, tmp_path / "out", **QUICK)


# Whole tensors, biases, tied heads ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "modules", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"], ["norm", "q_a_layernorm"], ["mlp.gate"]]
)
def test_modules_to_save(modules: list[str], v3: Path, tmp_path: Path) -> None:
    adapter = save_trained(tmp_path / "adapter", v3, target_modules=["o_proj"], modules_to_save=modules)
    report = merge_absorb(adapter, v3, tmp_path / "out", **QUICK)
    assert report.replaced
    assert any("whole ones of the adapter" in line for line in report.notes)
    expected = PeftModel.from_pretrained(load(v3), adapter).merge_and_unload().state_dict()
    merged = load(tmp_path / "out").state_dict()
    assert merged.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (merged[key] - tensor).abs().max() <= 1e-6 * tensor.abs().max().clamp_min(1e-30), key
    assert (peft_logits(v3, adapter) - logits_of(tmp_path / "out")).abs().max() <= 1e-4


def test_lora_bias(tmp_path: Path) -> None:
    config = FAMILIES["deepseek_v3"] | {"attention_bias": True}
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_()
    model.save_pretrained(tmp_path / "base")
    adapter = save_trained(
        tmp_path / "adapter", tmp_path / "base", target_modules=["q_a_proj", "o_proj"], lora_bias=True
    )
    merge_absorb(adapter, tmp_path / "base", tmp_path / "out", **QUICK)
    expected = PeftModel.from_pretrained(load(tmp_path / "base"), adapter).merge_and_unload().state_dict()
    merged, before = load(tmp_path / "out").state_dict(), load(tmp_path / "base").state_dict()
    key = "model.layers.1.self_attn.o_proj.bias"
    assert not torch.equal(merged[key], before[key])
    for key, tensor in expected.items():
        assert (merged[key] - tensor).abs().max() <= 1e-6 * tensor.abs().max().clamp_min(1e-30), key


def test_an_adapter_on_a_tied_head_with_untie(tied: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", tied, target_modules=["lm_head", "kv_b_proj"])
    with pytest.raises(InputError, match=r"adapts lm_head .*--untie-embeddings"):
        merge_absorb(adapter, tied, tmp_path / "out", **QUICK)
    report = merge_absorb(adapter, tied, tmp_path / "out", options=MergeOptions(untie_embeddings=True), **QUICK)
    assert any("tie_word_embeddings is false" in line for line in report.notes)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert (peft_logits(tied, adapter) - logits_of(tmp_path / "out")).abs().max() <= 1e-4
    old, new = tensors_of(tied), tensors_of(tmp_path / "out")
    assert new.keys() - old.keys() == {"lm_head.weight"}
    assert torch.equal(old["model.embed_tokens.weight"], new["model.embed_tokens.weight"])
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["lm_head.weight"] == "model.safetensors"


def test_a_saved_embedding_of_a_tied_model_with_untie(tied: Path, tmp_path: Path) -> None:
    adapter = save_trained(tmp_path / "adapter", tied, target_modules=["kv_b_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(InputError, match=r"one tensor in this model\. With --untie-embeddings"):
        merge_absorb(adapter, tied, tmp_path / "out", **QUICK)
    merge_absorb(adapter, tied, tmp_path / "out", options=MergeOptions(untie_embeddings=True), **QUICK)
    assert (peft_logits(tied, adapter) - logits_of(tmp_path / "out")).abs().max() <= 1e-4


def test_per_expert_names_of_older_versions(v3: Path, tmp_path: Path) -> None:
    """One LoRA for each expert's gate, up and down; the oracle adds them by hand."""
    generator = torch.Generator().manual_seed(0)
    adapter, tensors, wanted = tmp_path / "adapter", {}, tensors_of(v3)
    before = dict(wanted)
    for layer, expert, name in ((1, 0, "gate_proj"), (1, 3, "up_proj"), (2, 2, "down_proj"), (2, 2, "gate_proj")):
        path = f"model.layers.{layer}.mlp.experts.{expert}.{name}"
        out, inner = wanted[f"{path}.weight"].shape
        A, B = (torch.randn(shape, generator=generator) for shape in ((3, inner), (out, 3)))
        tensors |= {f"base_model.model.{path}.lora_{x}.weight": f for x, f in (("A", A), ("B", B))}
        wanted[f"{path}.weight"] = wanted[f"{path}.weight"] + (7 / 3) * B @ A
    make_adapter(adapter, v3, target_modules=["o_proj"])
    save_file(tensors, adapter / "adapter_model.safetensors")
    edit_json(adapter / "adapter_config.json", target_modules=["gate_proj", "up_proj", "down_proj"])
    report = merge_absorb(adapter, v3, tmp_path / "out", **QUICK)
    assert report.tensors_changed == 4
    merged = tensors_of(tmp_path / "out")
    for key, tensor in wanted.items():
        same = torch.equal(tensor, before[key])
        assert torch.equal(merged[key], before[key]) if same else (merged[key] - tensor).abs().max() <= 1e-5, key


# Ways of computing ----------------------------------------------------------------------------------------------------


def exact_sums(base: Path, adapter: Path) -> dict[str, np.ndarray]:
    """W + s·B·A in float64, from PEFT's keys of plain linear layers."""
    factors, result = load_file(adapter / "adapter_model.safetensors"), {}
    for key, W in tensors_of(base).items():
        stem = f"base_model.model.{key.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in factors:
            A, B = (factors[f"{stem}.lora_{x}.weight"].double().numpy() for x in "AB")
            result[key] = W.double().numpy() + (7 / 3) * (B @ A)
    return result


def test_exact_sums_in_float64_and_rounds_once(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype="float32")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=ATTENTION)
    merge_absorb(adapter, base, tmp_path / "out", options=MergeOptions(exact=True), **QUICK)
    merge_absorb(adapter, base, tmp_path / "bf16", options=MergeOptions(exact=True, dtype="bfloat16"), **QUICK)
    out, bf16, sums = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "bf16"), exact_sums(base, adapter)
    for key, value in sums.items():
        # float64 matmuls in another order differ in the last bits: never by more than a tie of the rounding.
        difference = np.abs(out[key].double().numpy() - value)
        assert (difference <= np.spacing(np.abs(value).astype(np.float32)) * 0.5000001).all(), key
        rounded = torch.from_numpy(value).to(torch.bfloat16)
        # torch goes from float64 by float32; both must agree but where the float32 number is a tie.
        assert (bf16[key] != rounded).float().mean() < 1e-3, key


def test_stochastic_rounding_is_seeded_and_right_on_average(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype="bfloat16")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["kv_b_proj"])
    edit_tensors(adapter / "adapter_model.safetensors", lambda t: [x.mul_(0.03) for x in t.values()] and None)

    def run(name: str, seed: int) -> tuple[dict[str, torch.Tensor], Any]:
        options = MergeOptions(round="stochastic", seed=seed, absorb="none")
        report = merge_absorb(adapter, base, tmp_path / name, options=options, **QUICK)
        return tensors_of(tmp_path / name), report

    sums = exact_sums(base, adapter)
    (one, report), (same, _), (two, _) = run("one", 1), run("same", 1), run("two", 2)
    runs = [one, two] + [run(f"more{i}", 10 + i)[0] for i in range(30)]
    for key, value in sums.items():
        assert torch.equal(one[key], same[key])
        assert not torch.equal(one[key], two[key])
        step = torch.exp2(torch.floor(torch.log2(torch.from_numpy(np.abs(value)).clamp_min(1e-30))) - 7).numpy()
        each = np.stack([r[key].double().numpy() for r in runs])
        assert (np.abs(each - value) <= step * 1.001).all(), "one of the two neighbors"
        bias = (each.mean(0) - value) / step
        assert abs(bias.mean()) < 0.01, "no drift"
    nearest = merge_absorb(adapter, base, tmp_path / "nearest", **QUICK)
    assert report.roles[0].retained == pytest.approx(1, abs=0.3)
    assert nearest.roles[0].cosine > report.roles[0].cosine, "nearest is the better direction"


def test_streamed_equals_in_memory_bitwise(v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a few rows give the bits of whole tensors."""
    import mla_tune.merge.apply as apply_module

    adapter = make_adapter(tmp_path / "adapter", v3, target_modules=ATTENTION, target_parameters=EXPERTS)
    merge_absorb(adapter, v3, tmp_path / "whole", options=MergeOptions(dtype="bfloat16"), workers=1, **QUICK)
    monkeypatch.setattr(apply_module, "PIECE_BYTES", 2048)
    monkeypatch.setattr(apply_module, "_BLOCK", 256)
    merge_absorb(adapter, v3, tmp_path / "pieces", options=MergeOptions(dtype="bfloat16"), workers=2, **QUICK)
    whole, pieces = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "pieces")
    assert all(torch.equal(whole[key], pieces[key]) for key in whole)
    in_memory = merged_in_memory(v3, adapter)
    assert all(torch.equal(whole[key], tensor.bfloat16()) for key, tensor in in_memory.items())


def merged_in_memory(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """All attention matrices at once, in numpy float32: W + (s·B)·A."""
    factors, result = load_file(adapter / "adapter_model.safetensors"), {}
    for key, W in tensors_of(base).items():
        stem = f"base_model.model.{key.removesuffix('.weight')}"
        if "self_attn" in key and f"{stem}.lora_A.weight" in factors:
            A, B = (factors[f"{stem}.lora_{x}.weight"].numpy() for x in "AB")
            result[key] = torch.from_numpy(W.numpy() + (B * np.float32(7 / 3)) @ A)
    return result


# Headers that lie, and other faults, end to end -----------------------------------------------------------------------


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def overlap(header: dict[str, Any]) -> None:
    entries = [v for k, v in header.items() if k != "__metadata__"]
    a, b = sorted(entries, key=lambda e: e["data_offsets"][0])[:2]
    size = b["data_offsets"][1] - b["data_offsets"][0]
    b["data_offsets"] = [a["data_offsets"][1] - 4, a["data_offsets"][1] - 4 + size]


def beyond(header: dict[str, Any]) -> None:
    last = max((v for k, v in header.items() if k != "__metadata__"), key=lambda e: e["data_offsets"][1])
    last["data_offsets"] = [x + 1_000_000 for x in last["data_offsets"]]


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda f: f.write_bytes(f.read_bytes()[:-10]), "damaged or incomplete: the header describes"),
    "overlapping": (lambda f: rewrite_header(f, overlap), "overlaps the tensor before it"),
    "out of range": (lambda f: rewrite_header(f, beyond), "damaged or incomplete"),
    "a 2 GB header": (
        lambda f: f.write_bytes((2**31).to_bytes(8, "little") + b"{}"),
        "announce a header of 2,147,483,648",
    ),
    "missing": (lambda f: f.unlink(), "which is missing: the download or copy is not complete"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_shard(fault: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", shard="60KB")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["kv_b_proj"])
    damage, words = FAULTS[fault]
    damage(sorted(base.glob("model-*.safetensors"))[2])
    before = {p: p.read_bytes() for p in base.iterdir()}
    with pytest.raises(Exception, match=words) as caught:
        merge_absorb(adapter, base, tmp_path / "out")
    assert type(caught.value).__name__ == "FileError"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]
    assert {p: p.read_bytes() for p in base.iterdir()} == before


def test_an_index_that_points_outside(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", shard="60KB")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["kv_b_proj"])
    index = json.loads((base / "model.safetensors.index.json").read_text())
    key = next(iter(index["weight_map"]))
    for name in ("../outside.safetensors", "/etc/outside.safetensors"):
        edit_json(base / "model.safetensors.index.json", weight_map=index["weight_map"] | {key: name})
        with pytest.raises(Exception, match="outside the folder"):
            merge_absorb(adapter, base, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_largest_tensor(tmp_path: Path) -> None:
    """A 400 MB embedding is copied, a 130 MB matrix merged, in less memory than either."""
    base = make_base(tmp_path / "base", "minicpm3")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["o_proj"])
    config = {"vocab_size": 100_000, "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16}
    config |= {"v_head_dim": 2048, "num_hidden_layers": 1}
    edit_json(base / "config.json", **config)
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(base / "model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            if ".layers.1." not in key:
                tensors[key] = file.get_tensor(key)
    o_proj = "model.layers.0.self_attn.o_proj.weight"
    tensors["model.embed_tokens.weight"] = torch.zeros(100_000, 1024)
    tensors[o_proj] = torch.ones(1024, 16 * 2048)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    stem = "base_model.model.model.layers.0.self_attn.o_proj"
    save_file(
        {f"{stem}.lora_A.weight": torch.ones(3, 16 * 2048), f"{stem}.lora_B.weight": torch.ones(1024, 3)},
        adapter / "adapter_model.safetensors",
    )
    program = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from mla_tune.adapter.merge_options import MergeOptions\n"
        "from mla_tune.merge.run import merge_absorb\n"
        f"merge_absorb(Path({str(adapter)!r}), Path({str(base)!r}), Path({str(tmp_path / 'out')!r}),"
        " options=MergeOptions(absorb='none'), verify=False, workers=2)\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 110e6
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged[o_proj], torch.full((1024, 16 * 2048), 8.0))
