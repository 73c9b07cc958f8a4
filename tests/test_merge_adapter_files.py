"""Adapter folder → deltas by site, from headers: mapping, ranks and scales against PEFT's model, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from mla_tune.adapter.files import Adapter, _Names, adapter_folder, open_adapter
from mla_tune.arch.registry import architecture
from mla_tune.arch.site import Architecture
from mla_tune.errors import FileError, InputError
from tests.merge_helpers import edit_json, edit_tensors, load, make_adapter, make_base

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PREFIX = "base_model.model.model.layers.0.self_attn.kv_b_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter", base, target_modules=["kv_b_proj"])


def arch(base: Path) -> Architecture:
    return architecture(json.loads((base / "config.json").read_text()))


def weights(adapter: Path) -> Path:
    return adapter / "adapter_model.safetensors"


def settings(adapter: Path, **changes: Any) -> Path:
    edit_json(adapter / "adapter_config.json", **changes)
    return adapter


def test_sites_ranks_and_scales_are_those_of_pefts_model(base: Path, tmp_path: Path) -> None:
    folder = make_adapter(
        tmp_path / "adapter",
        base,
        target_modules=["kv_b_proj", "o_proj"],
        target_parameters=[*EXPERTS, "layers.0.mlp.gate_proj.weight", "shared_experts.down_proj.weight"],
        use_rslora=True,
        rank_pattern={"kv_b_proj": 5, "mlp.experts.gate_up_proj": 2, "layers.0.mlp.gate_proj": 9, "o_pro": 9},
        alpha_pattern={
            r"layers\.[01]\..*o_proj": 2,
            "mlp.experts.down_proj": 3,
            "down_proj.weight": 4,
            ".*kv_b_proj": 8,
        },
    )
    opened = open_adapter(folder, arch(base))
    model = PeftModel.from_pretrained(load(base), folder).base_model.model
    seen: dict[str, tuple[int, float]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            parameter = getattr(module, "parameter_name", "weight")
            path = name.replace(".base_layer", "") + ("" if parameter == "weight" else f".{parameter}")
            seen[path] = (module.r["default"], module.scaling["default"])
    assert {d.site.path: (d.rank, d.scale) for d in opened.deltas} == seen
    assert len({scale for _, scale in seen.values()}) == 6
    tensors = load_file(weights(folder))
    assert {ref.key for d in opened.deltas for ref in d.refs()} == tensors.keys(), "every key is used once"
    order = [s.path for s in arch(base).sites]
    assert [d.site.path for d in opened.deltas] == [p for p in order if p in seen]
    factors = opened.deltas[0].load()
    assert torch.equal(factors.A, tensors[opened.deltas[0].A.key])
    assert opened.method == "rslora"


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.o_proj", "model.layers.11.mlp.gate_proj.weight", "o_proj"])
@pytest.mark.parametrize(
    "patterns",
    [
        ["o_proj"],
        ["proj"],
        [r"layers\.1\..*"],
        ["^model.layers.1.self_attn.o_proj"],
        ["o_proj", ".*"],
        ["gate_proj"],
        [".*"],
    ],
)
def test_patterns_match_as_in_peft(patterns: list[str], name: str) -> None:
    table = {pattern: i + 2 for i, pattern in enumerate(patterns)}
    names = _Names(Path("adapter_config.json"), {"r": 1, "rank_pattern": table})
    assert names.number("r", "rank_pattern", name) == table.get(get_pattern_key(patterns, name), 1)


def test_dora_needs_its_magnitude_and_takes_it_with_or_without_weight(base: Path, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", base, target_modules=["kv_b_proj"], use_dora=True)
    key = f"{PREFIX}.lora_magnitude_vector"
    assert key in load_file(weights(folder))
    before = open_adapter(folder, arch(base))
    assert before.method == "dora"
    edit_tensors(weights(folder), lambda t: t.update({f"{key}.weight": t.pop(key)}))
    after = open_adapter(folder, arch(base))
    assert [d.site for d in after.deltas] == [d.site for d in before.deltas]
    edit_tensors(weights(folder), lambda t: t.update({key: t[f"{key}.weight"].clone()}))
    with pytest.raises(InputError, match=r"is there twice, with and without '\.weight'"):
        open_adapter(folder, arch(base))
    edit_tensors(weights(folder), lambda t: [t.pop(k) for k in (key, f"{key}.weight")])
    with pytest.raises(InputError, match="lacks lora_magnitude_vector: the adapter is not complete"):
        open_adapter(folder, arch(base))


def test_a_run_folder_holds_its_adapter(adapter: Path, tmp_path: Path) -> None:
    assert adapter_folder(tmp_path) == adapter
    assert adapter_folder(adapter) == adapter
    with pytest.raises(FileError, match=r"no such folder: give a PEFT adapter folder or a run folder"):
        adapter_folder(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match=r"holds neither adapter_config\.json nor adapter/adapter_config\.json"):
        adapter_folder(tmp_path / "empty")


REFUSED = {
    "peft_type": "IA3",
    "bias": "all",
    "lora_bias": True,
    "modules_to_save": ["lm_head"],
    "fan_in_fan_out": True,
    "alora_invocation_tokens": [1, 2],
    "trainable_token_indices": [5],
    "layer_replication": [[0, 1]],
    "init_lora_weights": "pissa_niter_4",
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1},
    "velora_config": {"scale": 1},
    "monteclora_config": {"x": 1},
    "megatron_config": {"x": 1},
    "a_setting_of_the_future": 1,
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_are_not_supported_are_refused_by_name(name: str, adapter: Path, base: Path) -> None:
    with pytest.raises(InputError, match=rf"adapter_config\.json: not supported: {name}: ") as error:
        open_adapter(settings(adapter, **{name: REFUSED[name]}), arch(base))
    assert repr(REFUSED[name]) in str(error.value)


def test_all_refused_settings_are_named_at_once(adapter: Path, base: Path) -> None:
    with pytest.raises(
        InputError, match=r"not supported: .*(bias: 'all'.*lora_bias: True|lora_bias: True.*bias: 'all')"
    ):
        open_adapter(settings(adapter, bias="all", lora_bias=True), arch(base))


@pytest.mark.parametrize("value", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base_alone_are_plain_lora(value: Any, adapter: Path, base: Path) -> None:
    assert len(open_adapter(settings(adapter, init_lora_weights=value), arch(base)).deltas) == 3


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"r": 0}, r"r of model\.layers\.0\.self_attn\.kv_b_proj is 0: a positive number"),
        ({"r": None}, "r of .* is None"),
        ({"lora_alpha": "8"}, "lora_alpha of .* is '8'"),
        ({"rank_pattern": {"kv_b_proj": True}}, "r of .* is True"),
        ({"alpha_pattern": {"(": 2}}, r"alpha_pattern: '\(' is not a regular expression"),
        ({"r": 4}, r"lora_A.weight' is \(3, 28\), but \(4, 28\) was expected: .* gives it the rank 4"),
    ],
)
def test_wrong_numbers(changes: dict[str, Any], words: str, adapter: Path, base: Path) -> None:
    with pytest.raises(InputError, match=words):
        open_adapter(settings(adapter, **changes), arch(base))


def test_keys_that_fit_nothing(adapter: Path, base: Path) -> None:
    def refused(key: str, words: str) -> None:
        copy = adapter.parent / "copy"
        copy.mkdir(exist_ok=True)
        for file in adapter.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        edit_tensors(weights(copy), lambda t: t.update({key: torch.zeros(3, 4)}))
        with pytest.raises(InputError, match=words) as error:
            open_adapter(copy, arch(base))
        assert f"'{key}' fits no weight of the base model" in str(error.value)

    near = PREFIX.replace("kv_b_proj", "kv_b_porj") + ".lora_A.weight"
    refused(near, rf"did you mean '{PREFIX}\.lora_A\.weight'\?")
    refused(f"{PREFIX}.lora_A.default.weight", "fits no weight")
    refused(f"{PREFIX}.lora_B.bias", "fits no weight")
    refused(PREFIX.replace("layers.0", "layers.7") + ".lora_A.weight", "did you mean")
    refused("model.layers.0.self_attn.kv_b_proj.lora_A.weight", "did you mean")
    refused("base_model.model.model.layers.1.mlp.experts.2.up_proj.lora_A.weight", "adapter of a single expert")
    refused("base_model.model.model.layers.1.mlp.experts.lora_A.weight", "target_parameters .* does not say which")
    refused("base_model.model.model.embed_tokens.lora_embedding_A", "adapters on the embedding are not supported")
    refused("base_model.model.lm_head.base_layer.weight", "a whole weight saved beside the LoRA")


def test_parts_that_are_missing_or_too_many(adapter: Path, base: Path) -> None:
    edit_tensors(weights(adapter), lambda t: t.update({f"{PREFIX}.lora_magnitude_vector": torch.ones(75)}))
    with pytest.raises(InputError, match="has lora_magnitude_vector, but use_dora is not set"):
        open_adapter(adapter, arch(base))
    edit_tensors(
        weights(adapter), lambda t: [t.pop(f"{PREFIX}.{p}") for p in ("lora_magnitude_vector", "lora_B.weight")]
    )
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.kv_b_proj' lacks lora_B: the adapter is not complete"):
        open_adapter(adapter, arch(base))
    edit_tensors(weights(adapter), lambda t: [t.pop(k) for k in list(t)])
    with pytest.raises(InputError, match="holds no tensor"):
        open_adapter(adapter, arch(base))


def test_shapes_are_checked_for_experts_too(base: Path, tmp_path: Path) -> None:
    both = make_adapter(tmp_path / "both", base, target_parameters=EXPERTS)
    # Said to be gate_up alone, the file holds down's factors under the key of the only parameter.
    with pytest.raises(InputError, match=r"experts\.base_layer\.lora_A\.weight' fits no weight"):
        open_adapter(settings(both, target_parameters=EXPERTS[:1]), arch(base))
    down = make_adapter(tmp_path / "down", base, target_parameters=EXPERTS[1:])
    with pytest.raises(
        InputError, match=r"is \(12, 40\), but \(12, 48\) was expected: .*gate_up_proj .* is \(80, 48\) in each of 4"
    ):
        open_adapter(settings(down, target_parameters=EXPERTS[:1]), arch(base))


def test_numbers_that_are_not_floats(adapter: Path, base: Path) -> None:
    edit_tensors(weights(adapter), lambda t: t.update({k: v.to(torch.int32) for k, v in t.items()}))
    with pytest.raises(InputError, match="is I32; an adapter in F64, F32, F16, BF16 was expected"):
        open_adapter(adapter, arch(base))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_named(value: float, adapter: Path, base: Path) -> None:
    def put(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{PREFIX}.lora_B.weight"][3, 1] = value

    edit_tensors(weights(adapter), put)
    opened: Adapter = open_adapter(adapter, arch(base))
    with pytest.raises(InputError, match=rf"'{PREFIX}\.lora_B\.weight' holds NaN or infinity"):
        opened.check_finite()


def test_files_that_are_missing(adapter: Path, base: Path) -> None:
    weights(adapter).rename(adapter / "adapter_model.bin")
    with pytest.raises(FileError, match=r"adapter_model\.safetensors: no such file \(adapter_model\.bin is not read"):
        open_adapter(adapter, arch(base))
