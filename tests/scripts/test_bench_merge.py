"""scripts/bench_merge.py and its parts: made models are real, costs are real, the fake V3 is the published one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mla_tune.arch.build import architecture
from mla_tune.arch.roles import Role
from tests.helpers.marks import fast_cases

SCRIPTS = Path(__file__).parents[2] / "scripts"
DOCS = SCRIPTS.parent / "docs"
sys.path.insert(0, str(SCRIPTS))

import bench_merge  # noqa: E402
import bench_table  # noqa: E402
import fake_v3  # noqa: E402
import merge_paper  # noqa: E402
import process_cost  # noqa: E402
import synthetic_v3  # noqa: E402

TINY = ["--gb", "0.002", "--hidden", "64", "--experts", "4", "--shard-mb", "1", "--runs", "2"]


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fake") / "v3"
    fake_v3.make(folder)
    return folder


@pytest.fixture(scope="module")
def headers(fake: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Key → (dtype, shape) as the safetensors library reads them."""
    index = json.loads((fake / "model" / "model.safetensors.index.json").read_text())
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in sorted(set(index["weight_map"].values())):
        with safe_open(fake / "model" / name, "pt") as file:
            keys = file.keys()
            assert all(index["weight_map"][key] == name for key in keys)
            for key in keys:
                entry = file.get_slice(key)
                found[key] = entry.get_dtype(), tuple(entry.get_shape())
    assert found.keys() == index["weight_map"].keys()
    return found


# Figures of the published checkpoint, from listings of its files and tensors.
def test_the_fake_v3_has_the_published_totals(fake: Path, headers: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    numbers = sum(torch.Size(shape).numel() for _, shape in headers.values())
    assert (len(headers), numbers) == (91_991, 684_531_386_000)
    total = json.loads((fake / "model" / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    width = {"BF16": 2, "F8_E4M3": 1, "F32": 4}
    assert total == sum(torch.Size(shape).numel() * width[dtype] for dtype, shape in headers.values())
    assert round(total / 2**30, 2) == 641.29


def test_the_fake_v3_has_the_published_tensors(headers: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    published = {
        "model.layers.0.mlp.gate_proj.weight_scale_inv": ("F32", (144, 56)),
        "model.layers.60.self_attn.kv_a_proj_with_mqa.weight": ("F8_E4M3", (576, 7168)),
        "model.layers.60.self_attn.kv_a_proj_with_mqa.weight_scale_inv": ("F32", (5, 56)),
        "model.layers.61.self_attn.kv_b_proj.weight": ("F8_E4M3", (32768, 512)),
        "model.layers.3.self_attn.q_a_layernorm.weight": ("BF16", (1536,)),
        "model.layers.3.mlp.gate.weight": ("BF16", (256, 7168)),
        "model.layers.61.mlp.gate.e_score_correction_bias": ("F32", (256,)),
        "model.layers.61.mlp.experts.255.down_proj.weight_scale_inv": ("F32", (56, 16)),
        "model.layers.61.eh_proj.weight": ("BF16", (7168, 14336)),
        "model.layers.61.shared_head.head.weight": ("BF16", (129280, 7168)),
        "model.layers.61.embed_tokens.weight": ("BF16", (129280, 7168)),
    }
    assert {key: headers.get(key) for key in published} == published
    assert not any(f"model.layers.{i}.mlp.gate.weight" in headers for i in range(3))


def test_the_fake_v3_agrees_with_the_architecture(headers: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    for site in architecture(fake_v3.config()):
        out, inner = site.shape
        parts = 2 if site.role == Role.EXPERTS_GATE_UP else 1
        for key in site.disk_keys():
            assert headers[key][1] == (out // parts, inner)


def test_the_fake_v3_has_the_published_files(fake: Path) -> None:
    files = sorted((fake / "model").glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-{i:05}-of-000163.safetensors" for i in range(1, 164)]
    # `ls -lh` of the published files: 1.3 to 3.0 GiB at the end of each pipeline stage, 4.1 to 6.2 elsewhere.
    small = [i for i, f in enumerate(files, 1) if f.stat().st_size < 3.5 * 2**30]
    assert small == [12, 34, 56, 78, 100, 122, 141]
    assert max(f.stat().st_size for f in files) < 6.5 * 2**30
    on_disk = sum(f.stat().st_blocks * 512 for f in fake.rglob("*"))
    assert on_disk < 100e6


def test_adapters_of_the_fake_v3(fake: Path) -> None:
    with safe_open(fake / "all" / "adapter_model.safetensors", "pt") as file:
        keys = set(file.keys())
        stem = "base_model.model.model.layers.60.mlp.experts"
        assert file.get_slice(f"{stem}.base_layer.lora_A.weight").get_shape() == [256 * 16, 7168]
        assert file.get_slice(f"{stem}.base_layer.lora_B.weight").get_shape() == [4096, 16 * 256]
        assert file.get_slice(f"{stem}.lora_B.weight").get_shape() == [7168, 16 * 256]
    # Attention, MLP (dense or shared) and, in 58 layers, two expert stacks: A and B of each.
    assert len(keys) == 2 * (61 * 5 + 61 * 3 + 58 * 2)
    assert not any("layers.61." in key for key in keys)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    work = tmp_path_factory.mktemp("tiny")
    config = bench_merge.config(0.002, 64, 4)
    shards = synthetic_v3.cut(synthetic_v3.model_tensors(config), 10**6)
    assert len(shards) > 1
    synthetic_v3.write_model(work / "base", config, shards, synthetic_v3.Filler())
    folders = {"base": work / "base"}
    for name, groups in {"attention": ("attention",), "experts": ("experts",), "all": synthetic_v3.GROUPS}.items():
        folders[name] = work / name
        synthetic_v3.write_adapter(work / name, config, work / "base", groups, 3, synthetic_v3.Filler(0.05))
    return folders


def test_the_model_has_the_size_asked_for(tiny: dict[str, Path]) -> None:
    size = sum(f.stat().st_size for f in tiny["base"].glob("*.safetensors"))
    assert size == pytest.approx(2e6, rel=0.05)
    assert all(f.stat().st_size < 1.05e6 for f in tiny["base"].glob("*.safetensors"))


def test_transformers_opens_the_model(tiny: dict[str, Path]) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(tiny["base"], dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    state = model.state_dict()
    assert all(p.isfinite().all() for p in state.values())
    assert state["model.norm.weight"].eq(1).all()
    assert 0.018 < state["model.embed_tokens.weight"].float().std() < 0.022
    experts = state["model.layers.1.mlp.experts.down_proj"]
    assert not experts[0].equal(experts[1])
    assert model(torch.arange(8)[None]).logits.isfinite().all()


@fast_cases("all")
@pytest.mark.parametrize("name", ["attention", "experts", "all"])
def test_peft_loads_the_adapter_and_saves_the_same(tiny: dict[str, Path], name: str, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny["base"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tiny[name])
    loaded = model.load_adapter(tiny[name], "again")
    assert not loaded.unexpected_keys
    assert not [key for key in loaded.missing_keys if "lora_" in key]
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tiny[name], tmp_path))
    assert ours.keys() == theirs.keys()
    assert all(ours[key].equal(theirs[key]) for key in ours)
    assert all(weight.abs().max() > 0 for weight in ours.values())


def test_cost_of_a_command_and_its_children() -> None:
    nap = "import time; x = b'1' * {0}; time.sleep(0.3)"
    parent = f"import subprocess, sys; x = b'1' * 80_000_000; subprocess.run([sys.executable, '-c', {nap!r}])"
    ballast = b"1" * 300_000_000  # of this process: must not be counted
    plain = process_cost.measure([sys.executable, "-c", nap.format(1)])
    cost = process_cost.measure([sys.executable, "-c", parent.format(120_000_000)])
    assert len(ballast) > plain.peak
    assert 0.3 < plain.seconds < cost.seconds < 30
    assert 200e6 < cost.peak - plain.peak < 260e6
    assert 200e6 < cost.anonymous - plain.anonymous < 260e6


def test_pages_of_mapped_files_count_as_memory_but_not_as_anonymous(tmp_path: Path) -> None:
    file = tmp_path / "mapped"
    file.write_bytes(b"1" * 100_000_000)
    code = "import mmap, sys, time; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)"
    command = [sys.executable, "-c", f"{code}; sum(m[::4096]); time.sleep(0.2)", str(file)]
    cost = process_cost.measure(command)
    assert cost.peak > 100e6
    assert cost.anonymous < 50e6


def test_a_command_that_fails_ends_the_benchmark_with_its_words() -> None:
    with pytest.raises(SystemExit, match=r"(?s)exit code 3 of: .*out of luck"):
        process_cost.measure(["sh", "-c", "echo out of luck >&2; exit 3"])


def test_checks_use_the_median_and_both_directions() -> None:
    assert bench_table.Check("", [1.0, 9.0, 2.0], 2.0, True).held
    assert not bench_table.Check("", [1.0, 9.0, 2.5], 2.0, True).held
    assert bench_table.Check("", [1.0, 9.0, 2.5], 2.0, False).held
    assert not bench_table.Check("", [1.0, 9.0, 1.5], 2.0, False).held


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    work = tmp_path_factory.mktemp("work")
    command = [sys.executable, SCRIPTS / "bench_merge.py", *TINY, "--only", "peft,cp,flat", "--flat-gb", "0.001,0.003"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--json", "--work", work], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert not list(work.iterdir()), "the work folder is left behind"
    return json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_the_benchmark_measures_every_command(result: tuple[dict[str, Any], str]) -> None:
    document, text = result
    assert {part: list(document[part]["runs"]) for part in ("peft", "cp", "flat")} == {
        "peft": ["PEFT", "merge-absorb --no-verify", "merge-absorb"],
        "cp": ["cp -r && sync", "merge-absorb --no-verify, all", "merge-absorb --no-verify, attention"],
        "flat": ["merge-absorb --no-verify, 0.001 GB", "merge-absorb --no-verify, 0.003 GB"],
    }
    for part in ("peft", "cp", "flat"):
        for name, runs in document[part]["runs"].items():
            assert len(runs) == 2
            # Copying 2 MB can be over before the first look at the process: no memory is seen then.
            least = 0 if name.startswith("cp") else 20e6
            assert all(run["seconds"] > 0.001 and run["peak"] >= least for run in runs), name
            assert name in text
        assert all(
            check["held"] in (True, False) and min(check["values"]) > 0 for check in document[part]["checks"][:2]
        )
    assert document["peft"]["runs"]["PEFT"][0]["peak"] > 200e6, "torch was not imported"
    assert len(re.findall("held|MISSED", text)) == 4 + 2 + 1


@pytest.mark.slow
def test_the_ratios_are_those_of_each_round(result: tuple[dict[str, Any], str]) -> None:
    document, _ = result
    runs = document["peft"]["runs"]
    pairs = {
        "PEFT / merge-absorb --no-verify, time": ("PEFT", "merge-absorb --no-verify", "seconds"),
        "PEFT / merge-absorb, time": ("PEFT", "merge-absorb", "seconds"),
        "merge-absorb --no-verify / PEFT, memory": ("merge-absorb --no-verify", "PEFT", "peak"),
        "merge-absorb / PEFT, memory": ("merge-absorb", "PEFT", "peak"),
    }
    for check in document["peft"]["checks"]:
        above, below, field = pairs.pop(check["name"])
        expected = [runs[above][i][field] / runs[below][i][field] for i in range(2)]
        assert check["values"] == pytest.approx(expected)
        assert check["median"] == pytest.approx(sum(expected) / 2)
    assert not pairs


def test_a_wrong_part_is_refused() -> None:
    done = subprocess.run([sys.executable, SCRIPTS / "bench_merge.py", "--only", "pft"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "unknown part 'pft'" in done.stderr


def test_the_paper_figures_by_hand() -> None:
    D, attention = 7168, 1536 * 7168 + 24576 * 1536 + 576 * 7168 + 32768 * 512 + 7168 * 16384
    scales = 12 * 56 + 192 * 12 + 5 * 56 + 256 * 4 + 56 * 128
    raised, kept = merge_paper.bill(["attention"], "dequantize"), merge_paper.bill(["attention"], "keep")
    assert raised.written - kept.written == 61 * (attention - 4 * scales)
    assert raised.merged == 61 * 5
    assert raised.flop == 61 * attention * 2 * 16
    assert raised.largest == D * 16384 * 4
    everything, as_fp8 = merge_paper.bill(fake_v3.GROUPS, "dequantize"), merge_paper.bill(fake_v3.GROUPS, "keep")
    assert everything.merged == 61 * 5 + 61 * 3 + 58 * 256 * 3
    mlp = 3 * 3 * 18432 * D + 58 * 257 * 3 * 2048 * D
    blocks = 61 * scales + 3 * 3 * 144 * 56 + 58 * 257 * 3 * 16 * 56
    assert everything.written - as_fp8.written == 61 * attention + mlp - 4 * blocks
    # With codes and scales anew, the output is as large as the base and the absorbed tensors.
    assert as_fp8.output == kept.output == 688_574_839_360 + 61 * 32768 * 512 * 2
    assert as_fp8.touched == 160, "the MTP layer fills the last three files"


@pytest.mark.slow
def test_the_paper_figures_are_those_of_the_dry_run(fake: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    folders = ["--base", str(fake / "model"), "--out", str(tmp_path / "out")]
    ran = cli("merge-absorb", str(fake / "attention"), *folders, "--dry-run", "--json")
    assert ran.code == 0, ran.err
    plan, bill = json.loads(ran.out), merge_paper.bill(["attention"], "dequantize")
    assert len(plan["files_written"]) == bill.touched
    assert plan["tensors_changed"] == bill.merged
    assert (plan["bytes_written"], plan["bytes_total"]) == (bill.written, bill.output)


@pytest.mark.slow
def test_the_docs_have_the_paper_table() -> None:
    assert merge_paper.table() in (DOCS / "merge-cost.md").read_text(encoding="utf-8")
