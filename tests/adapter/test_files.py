"""Opening an adapter folder: sites, ranks and scales compared with the model that PEFT loads, and every refusal."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from mla_tune.adapter import deltas
from mla_tune.adapter.deltas import Adapter
from mla_tune.adapter.files import adapter_folder, open_adapter
from mla_tune.adapter.settings import ALLOWED_VALUES, ANY_VALUE, AdapterSettings
from mla_tune.arch.build import architecture
from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.index import Checkpoint
from mla_tune.checkpoint.pickles import convert_command
from mla_tune.errors import FileError, InputError
from mla_tune.sockets import ADAPTER_METHODS
from tests.helpers.marks import fast_cases
from tests.helpers.merging import edit_json, edit_tensors, load, make_adapter, make_base

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


def opened(folder: Path, base: Path) -> Adapter:
    return open_adapter(folder, arch(base), Checkpoint.open(base).tensors)


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
    found = opened(folder, base)
    model = PeftModel.from_pretrained(load(base), folder).base_model.model
    seen: dict[str, tuple[int, float]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            parameter = getattr(module, "parameter_name", "weight")
            path = name.replace(".base_layer", "") + ("" if parameter == "weight" else f".{parameter}")
            seen[path] = (module.r["default"], module.scaling["default"])
    assert {d.site.path: (d.rank, d.scale) for d in found.deltas} == seen
    assert len({scale for _, scale in seen.values()}) == 6
    assert sorted(ref.key for ref in found.refs()) == sorted(load_file(weights(folder))), "every key is used once"
    order = [s.path for s in arch(base).sites]
    assert [d.site.path for d in found.deltas] == [p for p in order if p in seen]
    assert found.method.name == "rslora"


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
    names = AdapterSettings(Path("adapter_config.json"), {"r": 1, "rank_pattern": table})
    assert names.number("r", "rank_pattern", name) == table.get(get_pattern_key(patterns, name), 1)


def test_dora_needs_its_magnitude_and_takes_it_with_or_without_weight(base: Path, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", base, target_modules=["kv_b_proj"], use_dora=True)
    key = f"{PREFIX}.lora_magnitude_vector"
    assert key in load_file(weights(folder))
    before = opened(folder, base)
    assert before.method.name == "dora"
    edit_tensors(weights(folder), lambda t: t.update({f"{key}.weight": t.pop(key)}))
    after = opened(folder, base)
    assert [d.site for d in after.deltas] == [d.site for d in before.deltas]
    edit_tensors(weights(folder), lambda t: t.update({key: t[f"{key}.weight"].clone()}))
    with pytest.raises(InputError, match=r"is there twice, with and without '\.weight'"):
        opened(folder, base)
    edit_tensors(weights(folder), lambda t: [t.pop(k) for k in (key, f"{key}.weight")])
    with pytest.raises(InputError, match="lacks lora_magnitude_vector: the adapter is not complete"):
        opened(folder, base)


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
    "bias": "some",
    "modules_to_save": "lm_head",
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
        opened(settings(adapter, **{name: REFUSED[name]}), base)
    assert repr(REFUSED[name]) in str(error.value)


def test_all_refused_settings_are_named_at_once(adapter: Path, base: Path) -> None:
    with pytest.raises(InputError, match=r"not supported: .*bias: 'x'.*; use_dora with lora_bias\. Supported"):
        opened(settings(adapter, bias="x", lora_bias=True, use_dora=True), base)


def test_every_setting_of_pefts_lora_is_allowed_or_refused() -> None:
    """A field that a later PEFT adds makes this test fail; at run time it is refused until this list knows it."""
    refused_unless_unset = {
        *("fan_in_fan_out", "megatron_config", "trainable_token_indices", "velora_config", "alora_invocation_tokens"),
        *("use_qalora", "monteclora_config", "layer_replication", "use_bdlora", "arrow_config", "kasa_config"),
    }
    assert not ANY_VALUE & ALLOWED_VALUES.keys()
    switches = {switch for method in ADAPTER_METHODS.values() for switch in method.switches}
    assert {f.name for f in fields(LoraConfig)} == ANY_VALUE | switches | ALLOWED_VALUES.keys() | refused_unless_unset


def test_settings_that_peft_writes_by_default_are_taken(adapter: Path, base: Path) -> None:
    written = json.loads((adapter / "adapter_config.json").read_text())
    assert {f.name for f in fields(LoraConfig)} - written.keys() <= {"runtime_config"}, "PEFT writes every field"
    assert len(opened(adapter, base).deltas) == 3


@pytest.mark.parametrize("value", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_initializations_that_leave_the_base_alone_are_plain_lora(value: Any, adapter: Path, base: Path) -> None:
    assert len(opened(settings(adapter, init_lora_weights=value), base).deltas) == 3


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
        opened(settings(adapter, **changes), base)


def test_keys_that_fit_nothing(adapter: Path, base: Path) -> None:
    def refused(key: str, words: str) -> None:
        copy = adapter.parent / "copy"
        copy.mkdir(exist_ok=True)
        for file in adapter.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        edit_tensors(weights(copy), lambda t: t.update({key: torch.zeros(3, 4)}))
        with pytest.raises(InputError, match=words) as error:
            opened(copy, base)
        assert f"'{key}' fits no weight of the base model" in str(error.value)

    near = PREFIX.replace("kv_b_proj", "kv_b_porj") + ".lora_A.weight"
    refused(near, rf"did you mean '{PREFIX}\.lora_A\.weight'\?")
    refused(f"{PREFIX}.lora_A.default.weight", "holds the adapter's name 'default'; .*save_pretrained")
    refused(f"{PREFIX}.lora_magnitude_vector.my-run", "holds the adapter's name 'my-run'")
    refused(PREFIX.replace("layers.0", "layers.7") + ".lora_A.weight", "did you mean")
    refused("model.layers.0.self_attn.kv_b_proj.lora_A.weight", r"begin with 'base_model\.model\.'")
    refused("transformer.layers.0.attn.to_q.lora_A.weight", r"begin with 'base_model\.model\.'")
    refused("base_model.model.model.layers.1.mlp.experts.4.up_proj.lora_A.weight", "mlp.experts' are 0 to 3")
    refused("base_model.model.model.layers.0.mlp.experts.2.up_proj.lora_A.weight", "fits no weight")
    refused("base_model.model.model.layers.1.mlp.experts.lora_A.weight", "target_parameters .* does not say which")
    refused("base_model.model.model.embed_tokens.lora_embedding_A", "a LoRA on the embedding is not supported")


def test_parts_that_are_missing_or_too_many(adapter: Path, base: Path) -> None:
    edit_tensors(weights(adapter), lambda t: t.update({f"{PREFIX}.lora_magnitude_vector": torch.ones(75)}))
    with pytest.raises(InputError, match="has lora_magnitude_vector, but use_dora is not set"):
        opened(adapter, base)
    edit_tensors(
        weights(adapter), lambda t: [t.pop(f"{PREFIX}.{p}") for p in ("lora_magnitude_vector", "lora_B.weight")]
    )
    with pytest.raises(
        InputError, match=r"layers\.0\.self_attn\.kv_b_proj' lacks lora_B\.weight: the adapter is not complete"
    ):
        opened(adapter, base)
    edit_tensors(weights(adapter), lambda t: [t.pop(k) for k in list(t)])
    with pytest.raises(InputError, match="holds no tensor"):
        opened(adapter, base)


def test_shapes_are_checked_for_experts_too(base: Path, tmp_path: Path) -> None:
    both = make_adapter(tmp_path / "both", base, target_parameters=EXPERTS)
    # The settings say gate_up alone, but the file holds down's factors under the key of the only parameter.
    with pytest.raises(InputError, match=r"experts\.base_layer\.lora_A\.weight' fits no weight"):
        opened(settings(both, target_parameters=EXPERTS[:1]), base)
    down = make_adapter(tmp_path / "down", base, target_parameters=EXPERTS[1:])
    with pytest.raises(
        InputError, match=r"is \(12, 40\), but \(12, 48\) was expected: .*gate_up_proj .* is \(80, 48\) in each of 4"
    ):
        opened(settings(down, target_parameters=EXPERTS[:1]), base)


def test_numbers_that_are_not_floats(adapter: Path, base: Path) -> None:
    edit_tensors(weights(adapter), lambda t: t.update({k: v.to(torch.int32) for k, v in t.items()}))
    with pytest.raises(InputError, match="is I32; an adapter in F64, F32, F16, BF16 was expected"):
        opened(adapter, base)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_named(value: float, adapter: Path, base: Path) -> None:
    def put(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{PREFIX}.lora_B.weight"][3, 1] = value

    edit_tensors(weights(adapter), put)
    found = opened(adapter, base)
    with pytest.raises(InputError, match=rf"'{PREFIX}\.lora_B\.weight' holds NaN or infinity"):
        found.check_finite()


def test_nan_is_found_beyond_the_first_block(adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deltas, "_BLOCK", 40)
    found = opened(adapter, base)
    found.check_finite()
    edit_tensors(weights(adapter), lambda t: t[f"{PREFIX}.lora_B.weight"][-1].fill_(float("inf")))
    with pytest.raises(InputError, match=r"lora_B\.weight' holds NaN"):
        found.check_finite()


def test_files_that_are_missing(adapter: Path, base: Path) -> None:
    weights(adapter).unlink()
    with pytest.raises(FileError, match=r"adapter_model\.safetensors: no such file: the adapter's weights are missing"):
        opened(adapter, base)


@fast_cases("adapter_model.bin")
@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickle_is_refused_with_the_command_that_converts_it(name: str, adapter: Path, base: Path) -> None:
    folder = adapter.rename(adapter.with_name("it's mine"))
    tensors = load_file(weights(folder))
    before = [(d.site, d.scale) for d in opened(folder, base).deltas]
    weights(folder).unlink()
    first = next(iter(tensors))
    torch.save(tensors | {first: tensors[first].T.contiguous().T}, folder / name)
    with pytest.raises(InputError, match=rf"{name}: a pickle can run any code when it is read") as error:
        opened(folder, base)
    command = str(error.value).splitlines()[-1].replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(command, shell=True, check=True)
    after = load_file(weights(folder))
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[k], tensors[k]) for k in tensors)
    assert [(d.site, d.scale) for d in opened(folder, base).deltas] == before


def test_the_command_runs_no_code_of_the_pickle(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "harm"), "w")

    torch.save({"a": Harm()}, tmp_path / "adapter_model.bin")
    command = convert_command(tmp_path / "adapter_model.bin", tmp_path / "out.safetensors")
    done = subprocess.run(command.replace("python", shlex.quote(sys.executable), 1), shell=True, capture_output=True)
    assert done.returncode != 0
    assert [p.name for p in tmp_path.iterdir()] == ["adapter_model.bin"]
    with pytest.raises(AttributeError):  # what it would have done: a file is no table of tensors
        torch.load(tmp_path / "adapter_model.bin", weights_only=False)["a"].contiguous()
    assert (tmp_path / "harm").exists()


def test_reading_an_adapter_imports_no_torch() -> None:
    code = "import sys, mla_tune.adapter.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
