"""`mla-tune inspect`: the JSON contract, the recipe's marks, and a process that never loads torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mla_tune.adapter.placement import place
from mla_tune.arch.build import architecture
from mla_tune.errors import InputError
from mla_tune.preflight.inspect import inspect_architecture
from mla_tune.recipe.schema import AdapterSection
from tests.helpers.arch_configs import TINY

#: The published contract: top-level keys and keys of an entry of `layers`.  Others may stand beside them.
CONTRACT = {"model_type", "family", "num_layers", "dims", "params_total", "kv_cache", "layers"}
LAYER = {"path", "role", "layer", "shape", "count", "params", "lora_params", "attachable", "reason", "selected"}

MAIN = "from mla_tune.cli.app import main; main()"
HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "matplotlib", "numpy")


def run(*args: str, code: str = MAIN, **env: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with the streams apart."""
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **env},
        timeout=120,
    )


def test_json_is_the_contract_and_alone_on_standard_output() -> None:
    result = run("inspect", "deepseek-v3", "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert set(document) >= CONTRACT
    assert set(document["dims"]) == set("HPRVCLD")
    assert all(set(layer) >= LAYER for layer in document["layers"])
    assert document["model_type"] == document["family"] == "deepseek_v3"
    assert document["num_layers"] == 61
    assert document["dims"] == {"H": 128, "P": 128, "R": 64, "V": 128, "C": 512, "L": 1536, "D": 7168}
    assert document["params_total"] / 1e9 == pytest.approx(671.0, rel=1e-3)
    assert document["kv_cache"] == {
        "dtype": "bfloat16",
        "latent_bytes_per_token": 70_272,
        "expanded_bytes_per_token": 4_997_120,
        "ratio": 71.11,
        "indexer_bytes_per_token": 0,
    }
    assert document["mtp_layers"] == 1
    assert document["quantization"] == "fp8"


def test_the_process_loads_nothing_heavy() -> None:
    code = f"""
import sys
sys.argv = ["mla-tune", "inspect", "deepseek-v3"]
from mla_tune.cli.app import main
try:
    main()
finally:
    print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)
"""
    result = run(code=code)
    assert result.returncode == 0, result.stderr
    assert result.stderr.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize("columns", ["80", "120"])
def test_the_table_fits_the_terminal_and_has_no_color_in_a_pipe(columns: str) -> None:
    result = run("inspect", "deepseek-v3", COLUMNS=columns)
    assert result.returncode == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= int(columns)
    assert "\x1b" not in result.stdout
    assert "W_UKV" in result.stdout
    assert "671.03 B" in result.stdout


def test_a_recipe_marks_what_it_adapts() -> None:
    result = run("inspect", "deepseek-v2-lite", "--recipe", "safe", "--rank", "4", "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    hit = [layer for layer in document["layers"] if layer["selected"]]
    assert {layer["role"] for layer in hit} == {
        "W_O", "gate", "up", "down", "shared_gate", "shared_up", "shared_down",
    }  # fmt: skip
    assert {layer["rank"] for layer in hit} == {4}
    assert document["adapted"]["modules"] == len(hit) == 27 + 3 + 26 * 3
    assert document["adapted"]["lora_params"] == sum(layer["lora_params"] for layer in hit)
    shown = run("inspect", "deepseek-v2-lite", "--recipe", "safe", COLUMNS="80").stdout
    assert "● W_O" in shown
    assert "● W_UKV" not in shown
    assert "adapted by safe" in shown


def test_errors_are_messages_with_exit_code_2(tmp_path: Path) -> None:
    llama = tmp_path / "config.json"
    llama.write_text('{"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8}')
    for args, what in (
        (["deepsek-v3"], "did you mean 'deepseek-v3'? Shipped: a.x-k1, a.x-k2-light, deepseek-v2,"),
        ([str(tmp_path)], "grouped-query attention with 32 query and 8 key/value heads"),
        ([str(tmp_path / "none")], "no such file or folder"),
        (["tiny", "--recipe", "saef"], "did you mean 'safe'"),
        (["tiny", "--rank", "0"], "--rank"),
    ):
        result = run("inspect", *args)
        assert result.returncode == 2, args
        assert what in " ".join(result.stderr.split())
        assert "Traceback" not in result.stderr
        assert result.stdout == ""


@pytest.mark.parametrize("name", TINY)
def test_one_entry_for_each_site(name: str) -> None:
    arch = architecture(TINY[name])
    document = inspect_architecture(arch, rank=3)
    assert [layer["path"] for layer in document["layers"]] == [s.path for s in arch]
    for layer, site in zip(document["layers"], arch, strict=True):
        assert layer["params"] == site.params
        assert layer["lora_params"] == (site.lora_params(3) if site.attachable else 0)
        assert layer["attachable"] is (layer["reason"] == "")
        assert layer["selected"] is None
        assert all(layer[key] for key in ("risk", "note", "cache", "absorption", "nemo"))
    json.dumps(document)


def test_fused_experts_are_one_entry_with_their_count() -> None:
    document = inspect_architecture(architecture(TINY["deepseek_v3"]))
    experts = [layer for layer in document["layers"] if layer["role"].startswith("experts")]
    assert [(e["layer"], e["count"]) for e in experts] == [(1, 6), (1, 6), (2, 6), (2, 6)]


def test_placement_gives_each_entry_its_own_rank() -> None:
    arch = architecture(TINY["deepseek_v3"])
    adapter = AdapterSection.model_validate({"targets": "attention", "rank": 4, "roles": {"W_UKV": {"rank": 8}}})
    placement = place(arch, adapter)
    document = inspect_architecture(arch, rank=99, placement=placement)
    by_role = {layer["role"]: layer for layer in document["layers"]}
    assert (by_role["W_UKV"]["rank"], by_role["W_O"]["rank"]) == (8, 4)
    assert by_role["W_UKV"]["lora_params"] == 8 * sum(by_role["W_UKV"]["shape"])
    assert (by_role["W_O"]["selected"], by_role["gate"]["selected"]) == (True, False)
    adapted = document["adapted"]
    assert adapted["lora_params"] == placement.trainable_params
    assert adapted["share"] == pytest.approx(placement.trainable_params / arch.params_total)
    assert document["rank"] == 4


def test_no_adapter_selects_nothing() -> None:
    arch = architecture(TINY["deepseek_v3"])
    document = inspect_architecture(arch, placement=place(arch, AdapterSection(method="none")))
    assert not any(layer["selected"] for layer in document["layers"])
    assert document["adapted"]["modules"] == 0


def test_mtp_layers_are_noted_and_not_counted() -> None:
    plain = inspect_architecture(architecture(TINY["deepseek_v3"]))
    mtp = inspect_architecture(architecture({**TINY["deepseek_v3"], "num_nextn_predict_layers": 1}))
    assert mtp["params_total"] == plain["params_total"]
    assert any("kept by merge-absorb, not adapted, not counted" in note for note in mtp["notes"])
    assert not any("MTP" in note for note in plain["notes"])


def test_other_cache_dtypes() -> None:
    arch = architecture(TINY["deepseek_v3"])
    half, full = inspect_architecture(arch)["kv_cache"], inspect_architecture(arch, dtype="float32")["kv_cache"]
    assert full["latent_bytes_per_token"] == 2 * half["latent_bytes_per_token"]
    with pytest.raises(InputError, match="int3"):
        inspect_architecture(arch, dtype="int3")
