"""What a merge refuses, and what it leaves behind when it fails: nothing."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mla_tune.merge.run as run_module
from mla_tune.adapter.merge_options import MergeOptions
from mla_tune.errors import CheckError, FileError, InputError, NotMLAError, WorkError
from mla_tune.merge.run import merge_absorb
from tests.helpers.marks import fast_cases
from tests.helpers.merging import edit_json, edit_tensors, make_adapter, make_base, names

KEY = "model.layers.0.self_attn.kv_b_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    base = make_base(root / "base", "minicpm3")
    make_adapter(root / "adapter", base, target_modules=["kv_b_proj"])
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A folder with `base` and `adapter` of its own, to be damaged."""
    for name in ("base", "adapter"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def refused(place: Path, error: type[BaseException], words: str, **options: Any) -> str:
    """The merge raises `error` with `words`, and no file appears or changes."""

    def state() -> dict[str, bytes]:
        return {name: (place / name).read_bytes() for name in names(place) if (place / name).is_file()}

    before = state(), names(place)
    with pytest.raises(error, match=words or None) as caught:
        merge_absorb(**({"adapter": place / "adapter", "base": place / "base", "out": place / "out"} | options))
    assert (state(), names(place)) == before
    return str(caught.value)


def edit_base(place: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    edit_tensors(place / "base" / "model.safetensors", change)


def test_a_base_of_other_shapes(place: Path) -> None:
    edit_json(place / "base" / "config.json", kv_lora_rank=27)
    words = r"kv_b_proj\.lora_A\.weight' is \(3, 28\), but \(3, 27\) was expected: .*another base model\?"
    refused(place, InputError, words)


def test_weights_that_differ_from_their_configuration(place: Path) -> None:
    edit_base(place, lambda t: t.update({KEY: torch.zeros(75, 27)}))
    words = r"kv_b_proj\.weight' is \(75, 27\), but .*config\.json describes \(75, 28\)"
    refused(place, InputError, words)
    edit_base(place, lambda t: t.update({KEY: torch.zeros(75, 28, dtype=torch.int32)}))
    refused(place, InputError, "is I32; only F64, F32, F16, BF16 can be merged into")
    edit_base(place, lambda t: t.update({"model.layers.0.self_attn.kv_b_porj.weight": t.pop(KEY)}))
    refused(place, InputError, rf"no tensor '{KEY}'; did you mean '.*kv_b_p")


def test_kv_b_is_checked_for_absorption_where_the_adapter_leaves_it_alone(place: Path) -> None:
    shutil.rmtree(place / "adapter")
    make_adapter(place / "adapter", place / "base", target_modules=["o_proj"])
    edit_base(place, lambda t: t.pop(KEY))
    refused(place, InputError, f"no tensor '{KEY}'")
    merge_absorb(place / "adapter", place / "base", place / "out", options=MergeOptions(absorb="none"), logits=False)


def test_quantized_bases_that_cannot_be_read_for_certain(place: Path) -> None:
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    edit_json(place / "base" / "config.json", quantization_config=fp8)
    refused(place, InputError, "says that the weights are quantized, but no tensor is F8_E4M3")
    edit_json(place / "base" / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    refused(place, InputError, "gptq")
    edit_json(place / "base" / "config.json", quantization_config=None)
    edit_base(place, lambda t: t.update({KEY: t[KEY].to(torch.float8_e4m3fn)}))
    refused(place, InputError, rf"'{KEY}' is FP8, but .*config\.json has no quantization_config")


def test_other_attention_is_refused(place: Path) -> None:
    edit_json(place / "base" / "config.json", kv_lora_rank=None)
    refused(place, NotMLAError, "no 'kv_lora_rank'")


def test_an_adapter_on_a_tied_head_is_refused(place: Path) -> None:
    shutil.rmtree(place / "adapter")
    make_adapter(place / "adapter", place / "base", target_modules=["lm_head"])
    refused(place, InputError, r"adapts lm_head \(tied to the embedding.*would not be the model that was trained")


def test_an_adapter_on_a_router_that_is_only_read_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "longcat_flash")
    make_adapter(tmp_path / "adapter", base, target_modules=["classifier"])
    refused(tmp_path, InputError, r"router\.classifier \(router: its weight is read directly.*would not be the model")


def test_a_damaged_base_and_a_missing_one(place: Path) -> None:
    file = place / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    refused(place, FileError, r"model\.safetensors: damaged or incomplete")
    file.rename(place / "base" / "pytorch_model.bin")
    refused(place, InputError, r"holds pytorch_model\.bin but no model\.safetensors.*can run code")
    refused(place, FileError, "--base: the base model is '.*gone', and there is no such folder", base=place / "gone")


@fast_cases("1")
@pytest.mark.parametrize("shards", [1, 3])
def test_a_pickled_base_names_the_command_that_converts_it(shards: int, place: Path) -> None:
    base, tensors = place / "base", load_file(place / "base" / "model.safetensors")
    (base / "model.safetensors").unlink()
    names_of = (
        [f"pytorch_model-{i:05d}-of-{shards:05d}.bin" for i in range(shards)] if shards > 1 else ["pytorch_model.bin"]
    )
    weight_map = {key: names_of[i % shards] for i, key in enumerate(tensors)}
    for name in names_of:
        torch.save({key: tensors[key] for key in tensors if weight_map[key] == name}, base / name)
    if shards > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    text = refused(place, InputError, "without running code from it, by")
    run = text[text.index("python -c") :].replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(run, shell=True, check=True)
    report = merge_absorb(place / "adapter", base, place / "out", verify=False)
    assert report.tensors == len(tensors)


def test_where_the_base_was_recorded_and_is_gone(place: Path) -> None:
    config = place / "adapter" / "adapter_config.json"
    edit_json(config, base_model_name_or_path=None)
    refused(
        place, InputError, r"adapter_config\.json: does not say which base .* name its folder with --base", base=None
    )
    edit_json(config, base_model_name_or_path="somebody/no-such-model")
    words = r"adapter_config\.json: the base model is 'somebody/no-such-model', and there is no such folder"
    refused(place, FileError, words, base=None)
    (place / "run.json").write_text(json.dumps({"base_path": "/moved/away"}))
    refused(place, FileError, r"run\.json: the base model is '/moved/away'.*with --base", base=None)
    (place / "run.json").write_text("{")
    refused(place, FileError, r"run\.json: the record of the run is not valid JSON", base=None)


def test_adapters_that_are_not_supported_or_damaged(place: Path) -> None:
    refused(place, FileError, "no such folder: give a PEFT adapter folder", adapter=place / "nothing")
    edit_json(place / "adapter" / "adapter_config.json", peft_type="IA3")
    refused(place, InputError, "not supported.*IA3")
    edit_json(place / "adapter" / "adapter_config.json", peft_type="LORA", fan_in_fan_out=True)
    refused(place, InputError, "fan_in_fan_out")
    edit_json(place / "adapter" / "adapter_config.json", fan_in_fan_out=False)

    def put_nan(tensors: dict[str, torch.Tensor]) -> None:
        tensors[next(iter(tensors))][0, 0] = float("nan")

    edit_tensors(place / "adapter" / "adapter_model.safetensors", put_nan)
    refused(place, InputError, "holds NaN or infinity: the training diverged")


def test_options(place: Path) -> None:
    refused(
        place,
        InputError,
        "--dtype int8: allowed are keep, float32, bfloat16, float16",
        options=MergeOptions(dtype="int8"),
    )
    words = r"--dtype float32 writes every weight in float32: leave out --quantized keep"
    refused(place, InputError, words, options=MergeOptions(dtype="float32", quantized="keep"))


def test_outputs_in_the_way(place: Path) -> None:
    out = place / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    refused(place, FileError, r"out: is not empty: name another folder with --out, or replace it with --overwrite")
    refused(place, FileError, "was not written by merge-absorb .* --overwrite does not delete it", overwrite=True)
    refused(place, FileError, r"thesis\.tex: is a file", out=out / "thesis.tex")


def test_overwrite_never_deletes_what_the_merge_reads(place: Path) -> None:
    for folder in (place, place / "base", place / "adapter"):
        (folder / "merge_report.json").write_text("{}")
    refused(place, InputError, "base: holds .*base, which the merge reads", out=place / "base", overwrite=True)
    refused(place, InputError, "adapter: holds .*adapter, which the merge reads", out=place / "adapter", overwrite=True)
    refused(place, InputError, "holds .*base, which the merge reads", out=place, overwrite=True)


def test_a_full_disk_is_noticed_before(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("mla_tune.merge.export.shutil.disk_usage", lambda _: usage)
    refused(place, FileError, "GB will be written, but only 0.0 GB are free there")


def test_an_interrupt_keeps_the_earlier_output(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge_absorb(place / "adapter", place / "base", place / "out", verify=False)
    before = (place / "out" / "model.safetensors").read_bytes()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "copy_auxiliary_files", stop)
    with pytest.raises(KeyboardInterrupt):
        merge_absorb(place / "adapter", place / "base", place / "out", overwrite=True, verify=False)
    assert (place / "out" / "model.safetensors").read_bytes() == before
    monkeypatch.undo()
    merge_absorb(place / "adapter", place / "base", place / "out", overwrite=True, verify=False)
    assert sorted(p.name for p in place.iterdir()) == ["adapter", "base", "out"]


def test_values_too_large_for_the_dtype(place: Path) -> None:
    edit_base(place, lambda t: t.update({KEY: torch.full((75, 28), 1e5)}))
    words = rf"'{KEY}' would hold NaN or infinity \(too large for F16: take --dtype bfloat16 or float32\)"
    refused(place, WorkError, words, options=MergeOptions(dtype="float16"))
    edit_base(place, lambda t: t.update({KEY: torch.full((75, 28), float("nan"))}))
    refused(place, WorkError, "would hold NaN or infinity .*damaged")


def flip(file: Path, key: str) -> None:
    tensors = load_file(file)
    tensors[key].view(-1)[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def drop(file: Path, key: str) -> None:
    tensors = load_file(file)
    del tensors[key]
    save_file(tensors, file, metadata={"format": "pt"})
    index = file.with_name("model.safetensors.index.json")
    weight_map = json.loads(index.read_text())["weight_map"]
    del weight_map[key]
    edit_json(index, weight_map=weight_map)


#: What is damaged, after which step, how, which key, and what the error says.
COPY = "copy_auxiliary_files"
SABOTAGE: dict[str, tuple[str, str, Callable[[Path, str], None], str, str]] = {
    "a merged tensor": ("model", "copy_auxiliary_files", flip, KEY, "1 of 2,100 numbers is wrong"),
    "an untouched tensor": (
        "model",
        "copy_auxiliary_files",
        flip,
        "model.norm.weight",
        "differs from the base's; no adapter",
    ),
    "a missing tensor": (
        "model",
        "copy_auxiliary_files",
        drop,
        "model.norm.weight",
        "is in the base and missing in the output",
    ),
    "W_UK": ("absorbed", "write_absorbed", flip, "model.layers.0.self_attn.W_UK", "is not the split of kv_b_proj"),
    "W_UV": ("absorbed", "write_absorbed", flip, "model.layers.0.self_attn.W_UV", "is not the split of kv_b_proj"),
}


@pytest.mark.parametrize("case", SABOTAGE)
def test_an_output_that_is_not_as_computed_is_not_published(
    case: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, step, damage, key, words = SABOTAGE[case]
    do = getattr(run_module, step)

    def do_and_damage(*args: Any, **options: Any) -> Any:
        result = do(*args, **options)
        (folder,) = place.glob(".out.partial")
        damage(folder / f"{name}.safetensors", key)
        return result

    monkeypatch.setattr(run_module, step, do_and_damage)
    refused(place, CheckError, rf"nothing was published:\n  {re.escape(key)}: {words}")
