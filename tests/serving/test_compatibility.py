"""`mla-tune serve-check`: the file of facts, items of checkpoints and adapters, verdicts, exit codes, launch commands.

The engines themselves are not tested here, but that every fact is read correctly and decides something.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from mla_tune.adapter.deltas import Adapter
from mla_tune.adapter.files import open_adapter
from mla_tune.arch.build import architecture
from mla_tune.arch.roles import ADAPTABLE, Role
from mla_tune.checkpoint.index import Checkpoint
from mla_tune.errors import InputError
from mla_tune.serving.compatibility import CompatibilityReport, check_compatibility
from mla_tune.serving.engines import FILE, VERDICTS, Engine, Fact, load_engines
from tests.helpers.fp8 import make_fp8
from tests.helpers.merging import edit_json, edit_tensors, make_adapter, make_base

Cli = Callable[..., Any]
ENGINES = load_engines()
FACTS = [pytest.param(e, f, id=f"{e.id}-{i}") for e in ENGINES.values() for i, f in enumerate(e.facts)]
FAMILIES = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3")
ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"]
MLP = [f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")]
SHARED = [f"shared_experts.{n}_proj.weight" for n in ("gate", "up", "down")]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
#: Keys of DeepSeek-V3's published config.json that transformers does not write.
ROUTER = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def v3(root: Path) -> Path:
    """A DeepSeek-V3 that every engine should accept: bfloat16, router keys, a tokenizer."""
    base = make_base(root / "v3", dtype="bfloat16")
    edit_json(base / "config.json", **ROUTER)
    (base / "tokenizer.json").write_text("{}")
    return base


@pytest.fixture(scope="module")
def minicpm3(root: Path) -> Path:
    base = make_base(root / "minicpm3", "minicpm3", dtype="bfloat16")
    (base / "tokenizer.json").write_text("{}")
    return base


@pytest.fixture(scope="module")
def everything(root: Path, v3: Path) -> Path:
    """An adapter on every adaptable matrix."""
    modules = [*ATTENTION, "kv_b_proj"]
    return make_adapter(root / "run" / "adapter", v3, target_modules=modules, target_parameters=MLP + SHARED + EXPERTS)


@pytest.fixture(scope="module")
def plain(root: Path, v3: Path) -> Path:
    """An adapter without W_UKV and routed experts."""
    return make_adapter(root / "plain", v3, target_modules=ATTENTION, target_parameters=MLP + SHARED)


def judged(engine: str, base: Path, adapter: Path | None = None) -> CompatibilityReport:
    checkpoint = Checkpoint.open(base)
    arch = architecture(checkpoint.config)
    opened: Adapter | None = open_adapter(adapter, arch, checkpoint.tensors) if adapter else None
    return check_compatibility(ENGINES[engine], checkpoint, arch, opened)


def verdicts(judgment: CompatibilityReport) -> dict[str, str]:
    """Subject → verdict; a subject that comes twice must have the same verdict."""
    found: dict[str, str] = {}
    for check in judgment.checks:
        assert found.setdefault(check.item.subject, check.verdict) == check.verdict
    return found


def copied(base: Path, to: Path) -> Path:
    shutil.copytree(base, to)
    return to


# --- the data file ---------------------------------------------------------------------------------------------------


def test_the_engines() -> None:
    assert list(ENGINES) == ["vllm", "sglang", "llama.cpp", "mlx"]


@pytest.mark.parametrize(("engine", "fact"), FACTS)
def test_each_fact_is_told_with_its_source(engine: Engine, fact: Fact) -> None:
    assert fact.says[-1] not in ".!"
    assert len(fact.says) <= 160
    assert fact.source.url.split("/")[2] == "github.com"
    assert date(2024, 1, 1) <= date.fromisoformat(fact.source.date) <= date.today()
    assert any(c.isdigit() for c in fact.source.versions)
    if fact.verdict == "dropped":
        assert fact.instead, "a silent drop needs a way out"


@pytest.mark.parametrize(("engine", "fact"), FACTS)
def test_no_fact_is_shadowed(engine: Engine, fact: Fact) -> None:
    """For each fact there are observations that it matches and no fact before it does."""

    def value(wanted: Any) -> list[Any]:
        return [wanted.get("min", wanted.get("max", 1))] if isinstance(wanted, dict) else wanted

    names = list(fact.when)
    seen: list[dict[str, Any]] = [{}]
    for name in names:
        seen = [{**s, name: v} for s in seen for v in value(fact.when[name])]
    # Other observations have either a value that no fact names (None), or one that another fact names.
    others = {n for f in engine.facts for n in f.when} - set(names)
    for name in others:
        used = [v for f in engine.facts if name in f.when for v in value(f.when[name])]
        seen = [{**s, name: v} for s in seen[:40] for v in [None, *dict.fromkeys(used)]][:4000]
    assert any(engine.fact(fact.topic, subject, s) is fact for subject in fact.subjects for s in seen)


@pytest.mark.parametrize("engine", ENGINES.values(), ids=lambda e: e.id)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("role", (*ADAPTABLE, Role.ROUTER, Role.LM_HEAD))
def test_every_role_has_a_fact_or_an_explicit_unknown(engine: Engine, family: str, role: Role) -> None:
    always = {"family": family, "query_compression": "yes", "partner": "adapted"}
    experts = role in (Role.EXPERTS_GATE_UP, Role.EXPERTS_DOWN)
    if (role == Role.LM_HEAD and family in ("glm4_moe_lite", "minicpm3")) or (family == "minicpm3" and experts):
        return  # the head of these is not looked at; the other has no experts
    if engine.id == "llama.cpp" and family == "longcat_flash":
        assert engine.fact("model", "family", always).verdict == "refused"  # type: ignore[union-attr]
        return
    absent = (Role.ROUTER, Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN)
    if family == "minicpm3" and role in absent:
        return
    for layout in ("fused experts", "single experts") if experts else ("module",):
        assert engine.fact("role", role, {**always, "layout": layout}) is not None, layout


@pytest.mark.parametrize(
    ("engine", "role", "family", "verdict"),
    [
        # The reason why serve-check exists: https://github.com/vllm-project/vllm/issues/48974
        ("vllm", "W_UKV", "deepseek_v3", "dropped"),
        ("vllm", "W_UKV", "deepseek_v2", "dropped"),
        ("vllm", "W_UKV", "glm4_moe_lite", "dropped"),
        ("vllm", "W_UKV", "longcat_flash", "dropped"),
        ("vllm", "W_UKV", "minicpm3", "applied"),
        ("sglang", "W_UKV", "deepseek_v3", "applied"),
        ("llama.cpp", "W_UKV", "deepseek_v3", "refused"),
        ("llama.cpp", "W_UKV", "minicpm3", "dropped"),
        ("llama.cpp", "W_DKV", "deepseek_v2", "dropped"),
        ("llama.cpp", "W_O", "deepseek_v3", "applied"),
        ("mlx", "W_O", "deepseek_v3", "refused"),
    ],
)
def test_facts_that_are_known(engine: str, role: str, family: str, verdict: str) -> None:
    fact = ENGINES[engine].fact("role", role, {"family": family, "layout": "module", "partner": "none"})
    assert fact is not None
    assert fact.verdict == verdict


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("facts"), "'facts' is missing"),
        (lambda d: d["facts"].update(tgi=[]), "facts.tgi: no such engine"),
        (lambda d: d["facts"]["vllm"][0].update(verdict="aplied"), "did you mean 'applied'"),
        (lambda d: d["facts"]["vllm"][0].update(source="hearsay"), "facts.vllm[0].source: 'hearsay'"),
        (lambda d: d["facts"]["vllm"][0].update(when={"famly": ["x"]}), "did you mean 'family'"),
        (lambda d: d["facts"]["vllm"][0].update(when={"family": "x"}), "a list of values"),
        (lambda d: d["facts"]["vllm"][0].update(saying="x"), "unknown key 'saying'"),
        (lambda d: d["facts"]["vllm"][0].update(of=[]), "is empty"),
        (lambda d: d["facts"]["vllm"][0].update(of="family"), "is not a list"),
        (lambda d: d["sources"]["mlx-source"].update(date="autumn"), "sources.mlx-source.date: 'autumn'"),
        (lambda d: d["sources"]["mlx-source"].update(url="a friend"), "does not begin with https://"),
        (lambda d: d["sources"]["mlx-source"].update(how="guessed"), "sources.mlx-source.how: 'guessed'"),
        (lambda d: d["engines"]["vllm"]["launch"].update(model=["vllm serve {modl}"]), "did you mean 'model'"),
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    data = json.loads(FILE.read_text(encoding="utf-8"))
    change(data)
    file = tmp_path / "engines.json"
    file.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"engines\.json") as error:
        load_engines(file)
    assert message in str(error.value)


def test_a_new_engine_and_fact_need_no_code(tmp_path: Path, v3: Path, plain: Path) -> None:
    data = json.loads(FILE.read_text(encoding="utf-8"))
    data["engines"]["tgi"] = {"title": "TGI", "launch": {"adapter": ["tgi {base} {adapter}"], "model": ["tgi {model}"]}}
    fact = {"about": "role", "of": ["W_O"], "verdict": "dropped", "says": "test", "source": "mlx-source"}
    data["facts"]["tgi"] = [fact]
    file = tmp_path / "engines.json"
    file.write_text(json.dumps(data))
    checkpoint = Checkpoint.open(v3)
    arch = architecture(checkpoint.config)
    found = check_compatibility(
        load_engines(file)["tgi"], checkpoint, arch, open_adapter(plain, arch, checkpoint.tensors)
    )
    assert verdicts(found)["W_O"] == "dropped"
    assert verdicts(found)["W_DQ"] == "unknown"
    assert found.verdict == "dropped"


# --- adapters --------------------------------------------------------------------------------------------------------


def test_vllm_drops_w_ukv_and_refuses_fused_experts(v3: Path, everything: Path) -> None:
    found = judged("vllm", v3, everything)
    assert found.subjects_with("dropped") == ["W_UKV"]
    assert found.subjects_with("refused") == ["experts_gate_up", "experts_down"]
    assert found.verdict == "dropped"
    counts = {c.item.subject: c.item.count for c in found.adapter if c.item.topic == "role"}
    # 3 layers, the first dense; 4 routed experts in each of the others.
    assert counts == dict.fromkeys(("W_DQ", "W_UQ", "W_DKV", "W_UKV", "W_O"), 3) | dict.fromkeys(
        ("gate", "up", "down"), 1
    ) | dict.fromkeys(("shared_gate", "shared_up", "shared_down"), 2) | {"experts_gate_up": 8, "experts_down": 8}
    assert found.merge is not None
    assert found.launch == ("vllm serve merged",)


def test_vllm_serves_the_rest(v3: Path, plain: Path) -> None:
    found = judged("vllm", v3, plain)
    assert not found.subjects_with("dropped")
    assert not found.subjects_with("refused")
    assert found.merge is None
    # vLLM accepts certain highest ranks only: 3 becomes 8.
    assert found.launch == (f"vllm serve {v3} --enable-lora --max-lora-rank 8 --lora-modules plain={plain}",)


def test_sglang_serves_w_ukv_and_names_the_modules(root: Path, v3: Path) -> None:
    adapter = make_adapter(root / "ukv", v3, target_modules=["kv_b_proj", "q_b_proj"], r=16)
    found = judged("sglang", v3, adapter)
    assert (verdicts(found)["W_UKV"], found.merge) == ("applied", None)
    assert "--lora-target-modules kv_b_proj q_b_proj " in found.launch[0]
    assert "--max-lora-rank 16 " in found.launch[0]


@pytest.mark.parametrize(
    ("modules", "verdict"), [(["q_a_proj"], "refused"), (["q_a_proj", "kv_a_proj_with_mqa"], "applied")]
)
def test_sglang_wants_both_halves_of_a_fused_layer(root: Path, v3: Path, modules: list[str], verdict: str) -> None:
    adapter = make_adapter(root / "-".join(modules), v3, target_modules=modules)
    assert verdicts(judged("sglang", v3, adapter))["W_DQ"] == verdict
    assert verdicts(judged("vllm", v3, adapter))["W_DQ"] == "applied"


def test_sglang_refuses_models_without_query_compression(root: Path) -> None:
    base = make_base(root / "v2", "deepseek_v2", dtype="bfloat16")
    adapter = make_adapter(root / "on-v2", base, target_modules=["q_proj", "kv_a_proj_with_mqa"])
    found = verdicts(judged("sglang", base, adapter))
    assert (found["W_Q"], found["W_DKV"]) == ("refused", "refused")
    assert verdicts(judged("vllm", base, adapter))["W_Q"] == "applied"


@pytest.mark.parametrize(
    ("settings", "subject", "expected"),
    [
        ({"use_rslora": True}, "rslora", ("applied", "dropped", "dropped", "refused")),
        ({"use_dora": True}, "dora", ("refused", "refused", "refused", "refused")),
        ({"rank_pattern": {"o_proj": 5}}, "rank_pattern", ("applied", "refused", "applied", "refused")),
        ({"alpha_pattern": {"o_proj": 2}}, "alpha_pattern", ("applied", "dropped", "dropped", "refused")),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save", ("refused", "dropped", "unknown", "refused")),
    ],
)
def test_settings(v3: Path, settings: dict[str, Any], subject: str, expected: tuple[str, ...], tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", v3, **{"target_modules": ["o_proj"], **settings})
    assert tuple(verdicts(judged(engine, v3, adapter))[subject] for engine in ENGINES) == expected


def test_target_modules_as_a_pattern(v3: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", v3, target_modules=["o_proj"])
    edit_json(adapter / "adapter_config.json", target_modules=r".*\.o_proj")
    found = [verdicts(judged(engine, v3, adapter))["target_modules"] for engine in ENGINES]
    assert found == ["applied", "refused", "applied", "refused"]


def test_a_pattern_that_changes_nothing_is_no_pattern(v3: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rank_pattern": {"o_proj": 3}, "alpha_pattern": {"o_proj": 7}}
    adapter = make_adapter(tmp_path / "a", v3, target_modules=["o_proj"], **settings)
    assert not verdicts(judged("sglang", v3, adapter)).keys() & {"rank_pattern", "alpha_pattern"}


def test_ranks_above_what_vllm_takes(v3: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", v3, target_modules=["o_proj"], r=513)
    assert verdicts(judged("vllm", v3, adapter))["rank"] == "refused"


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_no_engine_refuses_a_good_checkpoint(engine: str, v3: Path) -> None:
    found = judged(engine, v3)
    assert found.verdict in ("applied", "unknown")
    assert found.launch[-1].split()[0] in ("vllm", "python", "llama-server", "mlx_lm.server")


def test_router_keys(v3: Path, tmp_path: Path) -> None:
    base = copied(v3, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in ROUTER}))
    found = {engine: verdicts(judged(engine, base)) for engine in ENGINES}
    assert [found[e]["topk_method"] for e in ENGINES] == ["refused", "refused", "unknown", "applied"]
    assert [found[e]["scoring_func"] for e in ENGINES] == ["dropped", "refused", "dropped", "applied"]


@pytest.mark.parametrize(
    ("sizes", "verdict", "word"),
    [
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, "applied", "latent cache: 576"),
        ({"kv_lora_rank": 256, "qk_rope_head_dim": 64}, "applied", "latent cache: MLA backends"),
        ({"qk_nope_head_dim": 58, "qk_rope_head_dim": 6}, "unknown", "MLA backends name"),
        ({"qk_nope_head_dim": 59, "qk_rope_head_dim": 6}, "unknown", "neither"),
    ],
)
def test_head_sizes_of_vllm(v3: Path, sizes: dict[str, int], verdict: str, word: str) -> None:
    checkpoint = Checkpoint.open(v3)
    arch = architecture(checkpoint.config | sizes)
    check = next(
        c for c in check_compatibility(ENGINES["vllm"], checkpoint, arch).model if c.item.subject == "attention"
    )
    assert check.verdict == verdict
    assert check.says.startswith(word)


def test_an_absorbed_file_beside_a_single_file_without_an_index(v3: Path, tmp_path: Path) -> None:
    base = copied(v3, tmp_path / "base")
    shutil.copy(base / "model.safetensors", base / "absorbed.safetensors")
    found = {engine: verdicts(judged(engine, base))["other files"] for engine in ENGINES}
    assert found == {"vllm": "refused", "sglang": "applied", "llama.cpp": "applied", "mlx": "applied"}
    keys = Checkpoint.open(base).tensors
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, "model.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert {verdicts(judged(engine, base))["other files"] for engine in ENGINES} == {"applied"}


def test_a_missing_kv_b_proj(v3: Path, tmp_path: Path) -> None:
    base = copied(v3, tmp_path / "base")
    edit_tensors(base / "model.safetensors", lambda t: t.pop("model.layers.1.self_attn.kv_b_proj.weight"))
    check = next(c for c in judged("mlx", base).model if c.item.subject == "kv_b_proj")
    assert (check.verdict, check.item.count) == ("refused", 2)


def test_mtp_layers(v3: Path, tmp_path: Path) -> None:
    base = copied(v3, tmp_path / "base")
    # transformers writes num_nextn_predict_layers: 1 for every DeepSeek-V3, but no weights of such a layer.
    assert {verdicts(judged(engine, base))["MTP layers"] for engine in ENGINES} == {"applied"}
    edit_tensors(
        base / "model.safetensors", lambda t: t.update({"model.layers.3.eh_proj.weight": t["lm_head.weight"].clone()})
    )
    found = {engine: verdicts(judged(engine, base))["MTP layers"] for engine in ENGINES}
    assert found == {"vllm": "applied", "sglang": "applied", "llama.cpp": "applied", "mlx": "refused"}


def test_what_may_be_missing(v3: Path, tmp_path: Path) -> None:
    base = copied(v3, tmp_path / "base")
    edit_json(base / "config.json", architectures=None)
    (base / "tokenizer.json").unlink()
    found = verdicts(judged("vllm", base))
    assert (found["architectures"], found["tokenizer"]) == ("unknown", "unknown")


def test_float32_is_told(root: Path) -> None:
    base = make_base(root / "f32", "minicpm3")
    check = next(c for c in judged("vllm", base).model if c.item.subject == "dtype")
    assert "--dtype float32" in check.says


def test_keys_that_the_index_does_not_list(v3: Path, tmp_path: Path) -> None:
    base = copied(v3, tmp_path / "base")
    keys = list(Checkpoint.open(base).tensors)
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys[1:], "model.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    check = next(c for c in judged("llama.cpp", base).model if c.item.subject == "unlisted keys")
    assert (check.verdict, check.item.count) == ("refused", 1)


def test_minicpm3_is_its_own_case(root: Path, minicpm3: Path) -> None:
    adapter = make_adapter(root / "on-minicpm3", minicpm3, target_modules=["kv_b_proj", "q_a_proj"])
    found = {engine: verdicts(judged(engine, minicpm3, adapter))["W_UKV"] for engine in ENGINES}
    assert found == {"vllm": "applied", "sglang": "unknown", "llama.cpp": "dropped", "mlx": "refused"}


def test_fp8(v3: Path, tmp_path: Path) -> None:
    whole = make_fp8(v3, tmp_path / "whole")
    found = verdicts(judged("vllm", whole))
    assert (found["quantization"], found["fused layers"]) == ("unknown", "applied")  # blocks of 4 x 4
    assert "plain weights" not in found
    mixed = make_fp8(v3, tmp_path / "mixed", skip=("q_a_proj",))
    assert verdicts(judged("vllm", mixed))["fused layers"] == "refused"
    assert verdicts(judged("sglang", mixed))["fused layers"] == "refused"
    edit_json(mixed / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [4, 4]})
    assert verdicts(judged("vllm", mixed))["plain weights"] == "unknown"
    ragged = make_fp8(v3, tmp_path / "ragged", block=(16, 16))  # q_lora_rank is 36
    assert verdicts(judged("vllm", ragged))["quantization"] == "refused"


# --- the command -----------------------------------------------------------------------------------------------------


def run(*args: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from mla_tune.cli.app import main; main()", "serve-check", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


def test_a_silent_drop_exits_with_1(v3: Path, everything: Path) -> None:
    result = run(everything.parent, "--engine", "vllm", "--base", v3, COLUMNS="80")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: {everything.parent}: vLLM can't serve it as it is.")
    assert "silently dropped: W_UKV; refused: experts_gate_up, experts_down" in result.stderr
    assert "issues/48974" in result.stdout
    assert f"mla-tune merge-absorb {everything} --base {v3} --out {everything.parent / 'merged'}" in result.stdout
    table = result.stdout.split("[1] vLLM")[0].splitlines()[1:]
    assert max(map(len, table)) <= 80
    assert any("W_UKV" in line and " dropped " in line for line in table)


def test_what_is_applied_exits_with_0(v3: Path, plain: Path) -> None:
    result = run(plain, "--engine", "vllm", "--base", v3)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"vllm serve {v3} --enable-lora" in result.stdout


def test_a_refusal_exits_with_1(cli: Cli, v3: Path, plain: Path) -> None:
    result = cli("serve-check", plain, "--engine", "mlx", "--base", v3)
    assert result.code == 1
    assert "refused: PEFT adapter" in result.err
    assert "silently dropped" not in result.err


@pytest.mark.parametrize("width", ["80", "120"])
@pytest.mark.parametrize("engine", ENGINES)
def test_tables_fit(
    monkeypatch: pytest.MonkeyPatch, cli: Cli, engine: str, width: str, v3: Path, everything: Path
) -> None:
    from rich.console import Console

    monkeypatch.setattr("mla_tune.console.out", Console(highlight=False, width=int(width)))
    result = cli("serve-check", everything, "--engine", engine, "--base", v3)
    table = result.out.split("\n[1] ")[0].splitlines()[1:]
    assert len(table) > 10
    assert max(map(len, table)) <= int(width)
    assert not any("…" in line for line in table), "cut"


@pytest.mark.parametrize("engine", ENGINES)
def test_one_json_document(cli: Cli, engine: str, v3: Path, everything: Path) -> None:
    result = cli("serve-check", everything, "--engine", engine, "--base", v3, "--json")
    document = json.loads(result.out)
    assert document["kind"] == "adapter"
    assert document["engine"] == engine
    checks = document["model_checks"] + document["adapter_checks"]
    assert document["verdict"] == min((c["verdict"] for c in checks), key=VERDICTS.index)
    assert all(c["source"].startswith("https://") for c in checks if c["verdict"] != "unknown")
    assert result.code == (1 if document["verdict"] in ("dropped", "refused") else 0)


def test_the_embedded_model(cli: Cli) -> None:
    result = cli("serve-check", "embedded", "--engine", "vllm", "--json")
    assert (result.code, json.loads(result.out)["kind"]) == (0, "model")


def test_wrong_input_exits_with_2(cli: Cli, v3: Path, plain: Path, tmp_path: Path) -> None:
    for args, message in (
        ((v3, "--engine", "vlm"), "unknown engine 'vlm'; did you mean 'vllm'?"),
        ((tmp_path, "--engine", "vllm"), "holds neither config.json nor adapter_config.json"),
        ((tmp_path / "gone", "--engine", "vllm"), "no such folder"),
        ((v3, "--engine", "vllm", "--base", v3), "is a model, not an adapter"),
        ((plain, "--engine", "vllm", "--base", tmp_path / "gone"), "there is no such folder on this computer"),
    ):
        result = cli("serve-check", *args)
        assert (result.code, result.out) == (2, ""), args
        assert message in result.err
    both = copied(v3, tmp_path / "both")
    shutil.copy(plain / "adapter_config.json", both)
    assert "holds both config.json and adapter_config.json" in cli("serve-check", both, "--engine", "vllm").err


def test_it_starts_without_torch() -> None:
    code = (
        "import sys; sys.argv = ['mla-tune', 'serve-check', 'embedded', '--engine', 'vllm']\n"
        "from mla_tune.cli.app import main\n"
        "main_error = None\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
