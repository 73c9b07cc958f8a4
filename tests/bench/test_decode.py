"""`bench decode`: bytes of cache, transient memory and weights; its JSON, table and errors.  No time is tested."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mla_tune.arch.build import architecture
from mla_tune.bench import decode as bench
from mla_tune.bench import decode_cases, decode_rounds, meter
from mla_tune.bench.meter import copy_bandwidth, transient_bytes
from mla_tune.checkpoint.atomic_files import write_json
from mla_tune.errors import InputError, WorkError
from mla_tune.inference.absorb import is_absorbed
from mla_tune.model.load import Loaded
from tests.helpers.merging import FAMILIES
from tests.helpers.tiny_families import tiny

CPU = torch.device("cpu")
CONFIG: dict[str, Any] = FAMILIES["deepseek_v3"] | {"model_type": "deepseek_v3"}


def loaded(dtype: str = "float32", **changes: Any) -> Loaded:
    torch.manual_seed(0)
    config = CONFIG | changes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=getattr(torch, dtype)).eval()
    return Loaded(model, architecture(config), None, CPU, dtype)


def measured(given: Loaded, contexts: tuple[int, ...] = (8, 64), batch: int = 1, adapters: int = 0, runs: int = 1):
    return bench.measure(
        given, "tiny", contexts=contexts, batch=batch, adapters=adapters, runs=runs, progress=lambda line: None
    )


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "_MIN_CALLS", 1)
    monkeypatch.setattr(meter, "_SECONDS", 0.0)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1e10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on disk."""
    path = tmp_path_factory.mktemp("model")
    given = loaded()
    given.model.save_pretrained(path)
    write_json(path / "config.json", CONFIG)
    return path


# Counts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, itemsize", [("float32", 4), ("bfloat16", 2)])
def test_cache_is_counted_to_the_byte(dtype: str, itemsize: int) -> None:
    given = loaded(dtype)
    layers, C, R = (CONFIG[key] for key in ("num_hidden_layers", "kv_lora_rank", "qk_rope_head_dim"))
    cache = decode_cases.random_cache(given.model, 3, 17, CPU)
    assert decode_cases.cache_bytes(cache) == layers * 3 * 17 * (C + R) * itemsize
    assert [layer.keys.shape for layer in cache.layers] == [(3, 1, 17, C)] * layers
    found = measured(given, batch=3)
    assert found.formula_cache_bytes_per_token == layers * (C + R) * itemsize
    assert {t.cache_bytes_per_token for at in found.contexts for t in at.ways} == {layers * (C + R) * itemsize}
    assert found.cache_agrees


def test_a_cache_of_another_size_than_the_formula_is_reported() -> None:
    found = measured(loaded())
    odd = dataclasses.replace(found, formula_cache_bytes_per_token=found.formula_cache_bytes_per_token - 1)
    assert not odd.cache_agrees
    assert odd.to_json()["cache_agrees"] is False


def test_a_step_sees_exactly_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    given, lengths = loaded(), []
    attention = given.model.model.layers[0].self_attn
    attention.register_forward_hook(
        lambda module, args, kwargs, output: lengths.append(kwargs["past_key_values"].get_seq_length(0)),
        with_kwargs=True,
    )
    measured(given, contexts=(33,))
    prompt, steps = lengths[0], set(lengths)
    assert prompt == 33
    assert steps == {33}


def test_transient_memory() -> None:
    """Stock expands all cached tokens of a layer; absorbed decoding needs less than that, whatever the context."""
    found = measured(loaded(), contexts=(32, 128), batch=2)
    H, P, R, V = (CONFIG[k] for k in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    small, large = ({t.way: t.transient_bytes for t in at.ways} for at in found.contexts)
    for peak, S in ((small, 32), (large, 128)):
        assert peak["stock"] > 2 * S * H * (P + R + V) * 4
    assert large["stock"] > 2 * small["stock"]
    assert large["absorbed"] < large["stock"] / 2


def test_transient_bytes_count_memory_that_is_freed_again() -> None:
    def call(kept: dict[str, torch.Tensor]) -> None:
        kept["x"] = kept["x"] + 1  # 4 MB more until the old one is freed
        temporary = torch.ones(3, 1 << 20)
        del temporary

    found = transient_bytes(call, lambda: {"x": torch.zeros(1 << 20)}, CPU)
    assert found == pytest.approx(12 << 20, rel=0.01)
    assert copy_bandwidth(CPU, size=1 << 16) > 0


def test_count_of_weights_that_a_step_reads() -> None:
    """Equals a count over the parameters of the model without idle experts and the embedding."""
    given = loaded()
    experts = sum(p.numel() for name, p in given.model.named_parameters() if ".experts." in name)
    rest = sum(p.numel() for name, p in given.model.named_parameters() if ".experts." not in name)
    rest -= given.model.get_input_embeddings().weight.numel()
    k, E = CONFIG["num_experts_per_tok"], CONFIG["n_routed_experts"]
    assert 0 < k < E
    assert decode_cases.weights_read(given.arch, 1) == rest + experts * k // E
    assert decode_cases.weights_read(given.arch, E) == rest + experts


# The whole path -------------------------------------------------------------------------------------------------------


def test_a_case_out_of_memory_is_named_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Stock runs out of memory at 64 tokens; absorbed is measured there."""
    from mla_tune.report.bench_decode_table import print_decode
    from mla_tune.report.plots import plot_decode

    real = decode_rounds.transient_bytes

    def scarce(call: Any, setup: Any, device: torch.device) -> int:
        if setup().layers[0].keys.shape[2] == 64 and not is_absorbed(given.model):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(call, setup, device)

    given = loaded()
    monkeypatch.setattr(decode_rounds, "transient_bytes", scarce)
    found = measured(given, contexts=(8, 64))
    small, large = found.contexts
    assert (small.out_of_memory, large.out_of_memory) == ([], ["stock"])
    assert [t.way for t in large.ways] == ["absorbed"]
    assert (large.ways[0].ratios, large.ways[0].ratio_median, large.logits_off) == ([], None, None)
    print_decode(json.loads(json.dumps(found.to_json())))
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines() if "out of memory" in line] == [["stock", "out", "of", "memory"]]
    plot_decode(json.loads(json.dumps(found.to_json())), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_out_of_memory_in_every_case_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> int:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(decode_rounds, "transient_bytes", none)
    with pytest.raises(WorkError, match="out of memory at 8 tokens; lower --contexts"):
        measured(loaded(), contexts=(8,))


def test_logits_difference_is_relative_to_stock() -> None:
    first = {
        name: decode_rounds._FirstStep(0, torch.tensor([[value, 1.0]]))
        for name, value in (("stock", 4.0), ("absorbed", 5.0))
    }
    assert decode_rounds._logits_difference(first) == 0.25


def test_absorbed_logits_are_compared() -> None:
    found = measured(loaded(), contexts=(8,))
    off = found.contexts[0].logits_off
    assert off is not None
    assert 0 < off < 1e-5


def test_adapters_alternate_over_rows_and_leave_the_model_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    given = loaded()
    before = {name: p.clone() for name, p in given.model.named_parameters()}
    found = measured(given, contexts=(8,), adapters=3, runs=2)
    assert found.batch == 3
    assert [t.way for t in found.contexts[0].ways] == ["stock", "absorbed", "3 adapters"]
    assert len(found.contexts[0].adapters_cost) == 2
    assert not is_absorbed(given.model)
    after = dict(given.model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], p) and p.requires_grad for name, p in after.items())


def test_a_step_on_a_shared_copy_leaves_the_cache_as_it_was() -> None:
    """A captured CUDA graph reads the tensors of the cache, so they must stay in place, with their values."""
    given = loaded()
    for kind in bench.CACHES.values():
        cache = decode_cases.random_cache(given.model, 2, 9, CPU, kind)
        before = [(t, t.clone()) for layer in cache.layers for t in (layer.keys, layer.values)]
        with torch.no_grad():
            for _ in range(2):
                other = decode_cases.shared_copy(cache)
                other.crop(-1)
                given.model(input_ids=torch.ones(2, 1, dtype=torch.long), past_key_values=other, use_cache=True)
        after = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        assert all(a is b for a, (b, _) in zip(after, before, strict=True))
        assert cache.get_seq_length() == 9
        assert all(torch.equal(a[..., :8, :], b[..., :8, :]) for a, (_, b) in zip(after, before, strict=True))


def test_every_row_has_its_adapter() -> None:
    """All rows hold the same token, so their logits differ by their adapters only, and all differ from the base's."""
    given = loaded()
    cases = decode_cases.bench_cases(given.model, given.arch, 4, 3, 4)
    ids = torch.full((4, 1), 5)
    with torch.no_grad(), cases[2].prepared() as net:
        rows = net(input_ids=ids).logits[:, 0]
    with torch.no_grad():
        base = given.model(input_ids=ids).logits[:, 0]
    assert torch.allclose(rows[0], rows[3], atol=1e-5)  # four rows, three adapters
    assert not any(torch.allclose(rows[a], rows[b], atol=1e-3) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert not torch.allclose(rows[0], base[0], atol=1e-3)


def test_json_is_one_document(cli, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    done = cli(
        "bench", "decode", folder, "--contexts", "16,8", "--adapters", "2", "--runs", "2", "--out", out, "--json"
    )
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["cache_agrees"] is True
    assert [at["context"] for at in document["contexts"]] == [8, 16]
    assert all(len(t["ms"]) == len(t["ratios"]) == 2 for at in document["contexts"] for t in at["ways"])
    assert document["prefill"]["context"] == 8
    assert json.loads((out / "decode.json").read_text()) == document
    assert (out / "decode.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in out.iterdir()) == ["decode.json", "decode.png"]
    assert "round 2 of 2" in done.err


@pytest.mark.parametrize("factor", [1, 1e-3, 1e3])
def test_table_fits_into_80_columns(capsys: pytest.CaptureFixture[str], factor: float) -> None:
    from mla_tune.report.bench_decode_table import print_decode

    found = measured(loaded(), adapters=2)
    wide = [
        dataclasses.replace(
            at,
            ways=[
                dataclasses.replace(
                    t, ms=[1.23 * factor, 1234 * factor], ms_median=123.4 * factor, ratios=[0.123, 123.0],
                    tokens_per_second=12345 / factor, transient_bytes=round(123e6 * factor),
                    graph_ms=[1.5 * factor], times_floor=12345 * factor,
                )
                for t in at.ways
            ],
        )
        for at in found.contexts
    ]  # fmt: skip
    print_decode(dataclasses.replace(found, contexts=wide).to_json())
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80, [line for line in lines if len(line) > 80]
    assert not any("…" in line for line in lines)
    assert sum(line.startswith("absorbed ") for line in lines) == 2


def test_the_reference_model() -> None:
    given = decode_cases.load("bench", (512,), "bfloat16")
    assert given.arch.kv_bytes("bfloat16")[0] == (256 + 32) * 8 * 2
    assert sum(p.numel() for p in given.model.parameters()) == given.arch.params_total
    assert given.model.dtype == torch.bfloat16


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args, words",
    [
        (["bench", "--contexts", "512,x"], "--contexts"),
        (["bench", "--contexts", ""], "--contexts"),
        (["bench", "--contexts", "1"], "2 or more"),
        (["bench", "--contexts", "512,40000"], "32768"),
        (["embedded", "--contexts", "1000000"], "max_position_embeddings"),
        (["bench", "--batch", "0"], "--batch"),
        (["bench", "--adapters", "-1"], "--adapters"),
        (["bench", "--runs", "0"], "--runs"),
        (["bench", "--layers", "0"], "--layers"),
        (["embedded", "--layers", "2"], "--layers"),
        (["bench", "--cache", "static"], "latent, dynamic"),
        (["bench", "--dtype", "int8"], "bfloat16"),
        (["deepseek-v3"], "without weights"),
        (["nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(cli, args: list[str], words: str) -> None:
    done = cli("bench", "decode", *args)
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert words in done.err
    assert done.err.count("\n") == 1
    assert done.out == ""


def test_out_must_not_be_a_file(cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = cli("bench", "decode", "bench", "--out", tmp_path / "file")
    assert (done.code, done.err.count("\n")) == (2, 1)


@pytest.mark.parametrize("family, words", [("kimi_linear", "another kind"), ("deepseek_v32", "DynamicIndexedLayer")])
def test_models_that_cache_something_else_are_refused(family: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        decode_cases.random_cache(tiny(family), 1, 8, CPU)


def test_adapter_folder_is_refused(cli, tmp_path: Path) -> None:
    write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": "some/base"})
    done = cli("bench", "decode", tmp_path)
    assert done.code == 2
    assert "some/base" in done.err
