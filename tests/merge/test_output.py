"""What a merge writes: shards, index, other files, absorbed tensors, report; and what it leaves as it was."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mla_tune.adapter.merge_options import MergeOptions
from mla_tune.arch.build import architecture
from mla_tune.checkpoint.index import Checkpoint
from mla_tune.merge.run import merge_absorb
from mla_tune.resources import EMBEDDED_MODEL
from tests.helpers.merging import (
    edit_json,
    edit_tensors,
    load,
    logits_of,
    make_adapter,
    make_base,
    names,
    peft_merge,
)

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MTP = "model.layers.3"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded base with an MTP layer, other files, and weights in other formats that a merge must not carry."""
    folder = make_base(tmp_path_factory.mktemp("models") / "base", shard="90KB")
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    mtp = {f"{MTP}.self_attn.kv_b_proj.weight": torch.randn(75, 28), f"{MTP}.eh_proj.weight": torch.randn(48, 96)}
    save_file(mtp, folder / "model-mtp.safetensors", metadata={"format": "pt", "part": "mtp"})
    index["weight_map"] |= dict.fromkeys(mtp, "model-mtp.safetensors")
    index["metadata"]["total_parameters"] = 12345
    index_file.write_text(json.dumps(index))
    edit_json(folder / "config.json", num_nextn_predict_layers=1)
    for name in ("tokenizer.json", "chat_template.jinja", "modeling_x.py", "merges.txt", ".gitattributes"):
        (folder / name).write_text(f"the base's {name}")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "model.gguf", "pytorch_model.bin.index.json"):
        (folder / name).write_text("unmerged weights")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("tools")
    (folder / "runs").mkdir()
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Layer 1's MLP and everything of layer 2 stay out, so that some shards are copied whole.
    targets = [f"layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("kv_b_proj", "o_proj")]
    return make_adapter(
        tmp_path_factory.mktemp("adapters") / "adapter",
        base,
        target_modules=targets,
        target_parameters=["layers.1.mlp.experts.gate_up_proj"],
    )


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    result: dict[str, torch.Tensor] = {}
    for file in folder.glob("model*.safetensors"):
        result |= load_file(file)
    return result


def test_sharded_output(base: Path, adapter: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    report = merge_absorb(adapter, base, tmp_path / "out", progress=lambda *args: seen.append(args))
    out = tmp_path / "out"
    before, after = Checkpoint.open(base), Checkpoint.open(out)
    assert list(after.tensors) == list(before.tensors)
    assert len(after.shards) > 3
    for a, b in zip(before.shards, after.shards, strict=True):
        assert a.file.name == b.file.name
        assert list(a.tensors) == list(b.tensors)
        assert a.metadata == b.metadata
    old, new = tensors_of(base), tensors_of(out)
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    experts = {f"model.layers.1.mlp.experts.{e}.{x}_proj.weight" for e in range(4) for x in ("gate", "up")}
    assert changed == experts | {
        f"model.layers.{i}.self_attn.{name}.weight" for i in (0, 1) for name in ("kv_b_proj", "o_proj")
    }
    assert (out / "model-mtp.safetensors").read_bytes() == (base / "model-mtp.safetensors").read_bytes()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    size = sum(t.numel() * t.element_size() for t in old.values())
    assert index["metadata"] == {"total_size": size, "total_parameters": 12345}
    assert index["weight_map"] == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    assert (logits_of(out) - peft_merge(base, adapter)[0]).abs().max() <= 1e-4
    for stage in ("merge", "check"):
        steps = [(done, total) for name, done, total in seen if name == stage]
        assert steps[-1] == (size, size)
    assert (report.tensors, report.tensors_changed, report.bytes) == (len(old), 12, size)
    assert report.proof["recomputed"] == 12
    assert report.proof["unchanged"] == len(old) - 12
    assert report.proof["absorbed"] == 3


def test_other_files_are_carried_and_stale_weights_are_not(base: Path, adapter: Path, tmp_path: Path) -> None:
    report = merge_absorb(adapter, base, tmp_path / "out")
    carried = ["additional_chat_templates/tools.jinja", "chat_template.jinja", "config.json", "generation_config.json"]
    carried += ["merges.txt", "modeling_x.py", "tokenizer.json"]
    assert report.carried == carried
    for name in carried:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert set(report.left_behind) == {
        *(".gitattributes", "runs/", "pytorch_model.bin", "consolidated.safetensors", "model.gguf"),
        "pytorch_model.bin.index.json",
    }
    shards = [shard.file.name for shard in Checkpoint.open(base).shards]
    written = [
        "absorbed.safetensors",
        "merge_report.json",
        "mla_tune_manifest.json",
        "model.safetensors.index.json",
        *shards,
    ]
    assert names(tmp_path / "out") == sorted([*carried, *written, "additional_chat_templates"])
    assert names(tmp_path) == sorted(["out", *(f"out/{name}" for name in names(tmp_path / "out"))])


def test_the_report_is_in_the_output(base: Path, adapter: Path, tmp_path: Path) -> None:
    report = merge_absorb(adapter, base, tmp_path / "out")
    document = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert document == json.loads(json.dumps(report.to_json()))
    assert document["base"] == str(base)
    assert document["adapters"] == [{"path": str(adapter), "weight": 1.0, "method": "lora"}]
    assert document["output"] == str(tmp_path / "out")
    assert (document["model_type"], document["dtype"]) == ("deepseek_v3", "float32")
    rows = {row["role"]: row for row in document["roles"]}
    assert {role: (row["matrices"], row["tensors"]) for role, row in rows.items()} == {
        "W_UKV": (2, 2),
        "W_O": (2, 2),
        "experts_gate_up": (8, 8),
    }
    assert rows["W_O"]["bytes"] == 2 * 48 * 45 * 4
    old, new = tensors_of(base), tensors_of(tmp_path / "out")
    keys = [f"model.layers.{i}.self_attn.o_proj.weight" for i in (0, 1)]
    delta = torch.cat([(new[k] - old[k]).double().flatten() for k in keys])
    weight = torch.cat([old[k].double().flatten() for k in keys])
    assert rows["W_O"]["relative"] == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-5)
    absorbed = document["absorbed"]
    assert (absorbed["mode"], absorbed["files"], absorbed["modules"]) == ("split", ["absorbed.safetensors"], 3)
    assert absorbed["bytes"] == 3 * 75 * 28 * 4
    key = "model.layers.1.self_attn.o_proj.weight"
    assert set(document["retention"]) == changed_keys(base, tmp_path / "out")
    assert document["retention"][key][1] == pytest.approx(1, abs=1e-3)


def changed_keys(base: Path, out: Path) -> set[str]:
    old, new = tensors_of(base), tensors_of(out)
    return {key for key in old if not torch.equal(old[key], new[key])}


def test_the_manifest_says_what_it_was_made_of(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge_absorb(adapter, base, tmp_path / "out")
    out = tmp_path / "out"
    manifest = json.loads((out / "mla_tune_manifest.json").read_text())
    assert manifest["base"] == str(base)
    (made_of,) = manifest["adapters"]
    assert made_of["path"] == str(adapter)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert made_of[name] == hashlib.sha256((adapter / name).read_bytes()).hexdigest()
    assert manifest["roles"] == ["W_O", "W_UKV", "experts_gate_up"]
    assert manifest["dtypes"] == {"F32": len(tensors_of(base))}
    assert manifest["absorbed"]["layout"] == "W_UK (H, C, P), W_UV (H, V, C)"
    files = {p.relative_to(out).as_posix(): p for p in out.rglob("*") if p.is_file()}
    for name in ("merge_report.json", "mla_tune_manifest.json"):
        del files[name]
    assert manifest["files"].keys() == files.keys()
    for name, entry in manifest["files"].items():
        same = files[name].stat().st_ino == (base / name).stat().st_ino if (base / name).exists() else False
        assert entry["linked"] == same, name
        assert entry["bytes"] == files[name].stat().st_size
        digest = hashlib.sha256(files[name].read_bytes()).hexdigest()
        assert entry["sha256"] == (None if same else digest), name
    assert any(entry["linked"] for entry in manifest["files"].values())


@pytest.mark.parametrize("link", [True, False])
def test_files_that_do_not_change_are_shared_or_copied(link: bool, base: Path, adapter: Path, tmp_path: Path) -> None:
    report = merge_absorb(adapter, base, tmp_path / "out", options=MergeOptions(link=link), verify=False)
    same = [
        p.name for p in base.glob("model-*.safetensors") if p.read_bytes() == (tmp_path / "out" / p.name).read_bytes()
    ]
    assert "model-mtp.safetensors" in same
    shared = [name for name in same if (base / name).stat().st_ino == (tmp_path / "out" / name).stat().st_ino]
    assert shared == (same if link else [])
    assert report.files_linked == len(shared)


def test_absorbed_tensors_are_the_split_of_what_was_written(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge_absorb(adapter, base, tmp_path / "out")
    absorbed, merged = load_file(tmp_path / "out" / "absorbed.safetensors"), tensors_of(tmp_path / "out")
    with safe_open(tmp_path / "out" / "absorbed.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["layout"] == "W_UK (H, C, P), W_UV (H, V, C)"
    digests = json.loads(metadata["source_sha256"])
    paths = [f"model.layers.{i}.self_attn" for i in range(3)]  # the MTP layer is not one that decodes
    assert set(absorbed) == {f"{path}.{name}" for path in paths for name in ("W_UK", "W_UV")}
    for path in paths:
        weight = merged[f"{path}.kv_b_proj.weight"]
        assert digests[f"{path}.kv_b_proj.weight"] == hashlib.sha256(weight.numpy().tobytes()).hexdigest()
        W_UK, W_UV = absorbed[f"{path}.W_UK"], absorbed[f"{path}.W_UV"]
        assert (W_UK.shape, W_UV.shape) == ((3, 28, 10), (3, 15, 28))
        rebuilt = torch.stack([torch.cat((W_UK[h].T, W_UV[h])) for h in range(3)]).reshape(75, 28)
        assert torch.equal(rebuilt, weight)


def test_a_single_file_gets_an_index_beside_an_absorbed_file_only(tmp_path: Path) -> None:
    """vLLM and SGLang load every *.safetensors file of a folder that has no index."""
    base = make_base(tmp_path / "base", "minicpm3")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["kv_b_proj"])
    split = merge_absorb(adapter, base, tmp_path / "split")
    index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    assert index["metadata"]["total_size"] == split.bytes
    plain = merge_absorb(adapter, base, tmp_path / "plain", options=MergeOptions(absorb="none"))
    assert plain.absorbed is None
    assert plain.proof["absorbed"] == 0
    assert names(tmp_path / "plain") == [
        *("config.json", "generation_config.json", "merge_report.json", "mla_tune_manifest.json", "model.safetensors"),
    ]
    assert torch.equal(logits_of(tmp_path / "split"), logits_of(tmp_path / "plain"))
    # What was merged can be the base of another merge, and its leftovers don't come along.
    again = merge_absorb(adapter, tmp_path / "split", tmp_path / "again", options=MergeOptions(absorb="none"))
    assert again.left_behind == ["absorbed.safetensors", "merge_report.json", "mla_tune_manifest.json"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(dtype: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype="bfloat16" if dtype == "float32" else "float32")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["kv_b_proj"], target_parameters=EXPERTS)
    report = merge_absorb(adapter, base, tmp_path / "out", options=MergeOptions(dtype=dtype))
    assert report.dtype == dtype
    assert report.proof["unchanged"] == 2, "the two routing biases stay as they are"
    wanted, old = getattr(torch, dtype), tensors_of(base)
    for key, tensor in tensors_of(tmp_path / "out").items():
        assert tensor.dtype == (old[key].dtype if key.endswith("e_score_correction_bias") else wanted), key
        if "kv_b_proj" not in key and ".experts." not in key:
            assert torch.equal(tensor, old[key].to(tensor.dtype)), key
    assert {t.dtype for t in load_file(tmp_path / "out" / "absorbed.safetensors").values()} == {wanted}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    merged = load(tmp_path / "out").state_dict()
    _, expected = peft_merge(base, adapter)
    # The result is rounded once to 8 (bfloat16), 11 (float16) or 24 bits; PEFT's is rounded to the base's dtype.
    step = 2.0 ** -{"bfloat16": 8, "float16": 11, "float32": 8}[dtype]
    for key, tensor in expected.items():
        assert (merged[key].float() - tensor.float()).abs().max() <= 1.01 * step * tensor.float().abs().max(), key


def test_a_delta_that_rounding_erases_is_reported(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "minicpm3", dtype="bfloat16")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["kv_b_proj", "o_proj"], lora_alpha=1e-3)
    rows = merge_absorb(adapter, base, tmp_path / "out").roles
    for row in rows:
        assert row.relative is not None
        assert row.relative < 1e-3
        assert row.cosine is not None
        assert row.cosine < 0.7
    exact = merge_absorb(adapter, base, tmp_path / "exact", options=MergeOptions(dtype="float32")).roles
    assert all(row.cosine is not None and row.cosine > 0.999 for row in exact)


def test_an_adapter_that_was_never_trained_gives_the_base(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "minicpm3")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["kv_b_proj"])

    def zero_B(tensors: dict[str, torch.Tensor]) -> None:
        for key in tensors:
            if ".lora_B." in key:
                tensors[key].zero_()

    edit_tensors(adapter / "adapter_model.safetensors", zero_B)
    report = merge_absorb(adapter, base, tmp_path / "out")
    row = report.roles[0]
    assert (row.relative, row.retained, row.cosine) == (0, None, None)
    old, new = tensors_of(base), tensors_of(tmp_path / "out")
    assert all(torch.equal(old[key], new[key]) for key in old)


def test_fused_experts_on_disk(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that saves its experts fused: one tensor (E, out, in) equals the per-expert tensors stacked."""
    adapter = make_adapter(tmp_path / "adapter", base, target_parameters=EXPERTS)
    merge_absorb(adapter, base, tmp_path / "apart", verify=False)
    old, new = tensors_of(base), tensors_of(tmp_path / "apart")
    config = json.loads((base / "config.json").read_text())
    arch = architecture(config)
    sites = [s for s in arch.sites if s.is_experts]
    stacks = [
        {s.path: torch.cat([t[key] for key in s.disk_keys()]).view(s.count, *s.shape) for s in sites}
        for t in (old, new)
    ]
    loose = {key for s in sites for key in s.disk_keys()}
    fused = tmp_path / "fused"
    fused.mkdir()
    (fused / "config.json").write_bytes((base / "config.json").read_bytes())
    save_file({k: t for k, t in old.items() if k not in loose} | stacks[0], fused / "model.safetensors")
    fused_arch = replace(arch, sites=tuple(replace(s, disk="fused") if s.is_experts else s for s in arch.sites))
    monkeypatch.setattr("mla_tune.runs.merge_inputs.architecture", lambda *_: fused_arch)
    report = merge_absorb(adapter, fused, tmp_path / "out", verify=False)
    assert {row.role: (row.tensors, row.matrices) for row in report.roles} == {
        "experts_gate_up": (2, 8),
        "experts_down": (2, 8),
    }
    out = tensors_of(tmp_path / "out")
    for path, stack in stacks[1].items():
        assert not torch.equal(out[path], stacks[0][path])
        torch.testing.assert_close(out[path], stack, rtol=1e-6, atol=1e-7)


def run_folder(folder: Path, base: Path, base_path: str) -> Path:
    make_adapter(folder / "adapter", base, target_modules=["kv_b_proj"])
    (folder / "run.json").write_text(json.dumps({"base_path": base_path}))
    (folder / "recipe.yaml").write_text("")
    return folder


def test_a_run_names_its_base_and_gets_the_output(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "minicpm3")
    run = run_folder(tmp_path / "run", base, str(base))
    edit_json(run / "adapter" / "adapter_config.json", base_model_name_or_path="elsewhere")
    assert merge_absorb(run).output == str(run / "merged")
    assert merge_absorb(run / "adapter", overwrite=True).output == str(run / "merged")
    checkpoint = run / "checkpoints" / "checkpoint-10"
    checkpoint.parent.mkdir()
    (run / "adapter").rename(checkpoint)
    report = merge_absorb(checkpoint)
    assert (report.output, report.base) == (str(checkpoint / "merged"), str(base))


def test_from_inside_the_adapter_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base", "minicpm3")
    run = run_folder(tmp_path / "run", base, str(base))
    monkeypatch.chdir(run / "adapter")
    assert merge_absorb(Path()).output == str(run / "merged")


def test_an_adapter_alone_names_its_base(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "minicpm3")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["kv_b_proj"])
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    report = merge_absorb(adapter)
    assert (report.output, report.base) == (str(adapter / "merged"), str(base))
    assert merge_absorb(tmp_path).output == str(tmp_path / "merged"), "named by the folder that holds adapter/"


@pytest.mark.skipif(not (EMBEDDED_MODEL / "model.safetensors").is_file(), reason="needs the embedded model")
@pytest.mark.parametrize("named", ["embedded", None])
def test_the_embedded_model_by_its_word(named: str | None, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", EMBEDDED_MODEL, "embedded")
    report = merge_absorb(run, named)
    assert report.base == str(EMBEDDED_MODEL)
    assert (run / "merged" / "tokenizer.json").is_file()


def test_overwrite_replaces_an_earlier_output_whole(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge_absorb(adapter, base, tmp_path / "out")
    (tmp_path / "out" / "leftover").write_text("")
    merge_absorb(adapter, base, tmp_path / "out", options=MergeOptions(absorb="none"), overwrite=True)
    assert not (tmp_path / "out" / "leftover").exists()
    assert not (tmp_path / "out" / "absorbed.safetensors").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_a_fine_place(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    merge_absorb(adapter, base, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_merging_loads_no_torch(base: Path, adapter: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mla_tune.merge.run import merge_absorb\n"
        f"merge_absorb(Path({str(adapter)!r}), Path({str(base)!r}), Path({str(tmp_path / 'out')!r}), verify=False)\n"
        "print([name for name in ('torch', 'transformers', 'peft', 'accelerate') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
