"""Absorbed files: torch and stock transformers as oracles, for split and fold, with FP8, shards and refusals."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mla_tune.absorption.split import split_kv_b
from mla_tune.arch.build import architecture
from mla_tune.arch.dims import MLADims
from mla_tune.arch.site import Architecture, Attention
from mla_tune.checkpoint.index import Checkpoint
from mla_tune.checkpoint.quantized.config import quantized_tensors
from mla_tune.errors import CheckError, InputError
from mla_tune.merge import absorb as absorb_module
from mla_tune.merge.absorb import write_absorbed
from mla_tune.merge.absorb_plan import plan_absorbed
from tests.helpers import merging as merge_helpers
from tests.helpers.merging import MLA, MOE, TOKENS, edit_json, edit_tensors, make_base

TINY = merge_helpers.FAMILIES | {"glm4_moe_lite": MLA | MOE}
FAMILIES = sorted(TINY)
ATTENTION = "model.layers.0.self_attn"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """A cache of tiny models by family and dtype; see `base_of`."""
    return {("", ""): tmp_path_factory.mktemp("bases")}


@pytest.fixture
def base_of(bases: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(merge_helpers, "FAMILIES", TINY)

    def make(family: str = "deepseek_v3", dtype: str = "bfloat16") -> Path:
        if (family, dtype) not in bases:
            bases[family, dtype] = make_base(bases["", ""] / f"{family}-{dtype}", family, dtype)
        return bases[family, dtype]

    return make


def opened(folder: Path) -> tuple[Architecture, Checkpoint]:
    checkpoint = Checkpoint.open(folder)
    return architecture(checkpoint.config), checkpoint


def weights(folder: Path, path: str, dims: MLADims) -> dict[str, torch.Tensor]:
    """The three matrices of one attention module in float64, by the safetensors library."""
    tensors = load_file(folder / "model.safetensors")
    query = "q_proj" if dims.L is None else "q_b_proj"
    return {n: tensors[f"{path}.{n}.weight"].double() for n in (query, "kv_b_proj", "o_proj")}


def products(folder: Path, path: str, d: MLADims) -> dict[str, torch.Tensor]:
    """W_QK and W_VO in float64."""
    query, kv_b, o = weights(folder, path, d).values()
    W_UK, W_UV = split_kv_b(kv_b, d)
    return {
        "W_QK": torch.einsum("hpq,hcp->hqc", query.view(d.H, d.P + d.R, -1)[:, : d.P], W_UK),
        "W_VO": torch.einsum("dhv,hvc->hdc", o.view(d.D, d.H, d.V), W_UV),
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_split_moves_bits(base_of: Any, tmp_path: Path, family: str, dtype: str) -> None:
    arch, merged = opened(base_of(family, dtype))
    report = write_absorbed(arch, merged, tmp_path, "split")
    absorbed, model = load_file(tmp_path / "absorbed.safetensors"), load_file(merged.folder / "model.safetensors")
    assert len(absorbed) == 2 * len(arch.attention_paths) == 2 * report.modules
    for path in arch.attention_paths:
        expected = split_kv_b(model[f"{path}.kv_b_proj.weight"], arch.dims)
        for name, half in zip(("W_UK", "W_UV"), expected, strict=True):
            assert absorbed[f"{path}.{name}"].dtype == getattr(torch, dtype)
            assert torch.equal(absorbed[f"{path}.{name}"], half)
    assert report.rounding == {}
    assert report.files == ["absorbed.safetensors"]
    assert report.bytes == sum(t.nbytes for t in absorbed.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_fold_is_the_product_rounded_once(base_of: Any, tmp_path: Path, family: str) -> None:
    arch, merged = opened(base_of(family))
    report = write_absorbed(arch, merged, tmp_path, "fold")
    absorbed = load_file(tmp_path / "absorbed.safetensors")
    measured = dict.fromkeys(("W_QK", "W_VO"), 0.0)
    for i, path in enumerate(arch.attention_paths):
        for name, exact in products(merged.folder, path, arch.dims).items():
            found = absorbed[f"{path}.{name}"]
            assert found.dtype == torch.bfloat16
            # Half a unit in the last of 8 bits, and of float32 sums the error of as many terms.
            allowed = 2**-8 * exact.abs() + 2**-20 * exact.abs().amax()
            assert int(((found.double() - exact).abs() > allowed).sum()) == 0
            # What float64 says, rounded: nearly everywhere the very same number.
            assert (found == exact.to(torch.bfloat16)).double().mean() > 0.995
            h, rows = i % arch.dims.H, slice(32 if name == "W_VO" else None)
            error = (found.double() - exact)[h, rows].norm() / exact[h, rows].norm()
            measured[name] = max(measured[name], float(error))
    # 8 bits cost 2⁻⁸ at most, and about 0.43 of that in the mean of squares.
    assert report.rounding == pytest.approx(measured, rel=1e-6)
    assert all(0.0014 < error < 2**-9 for error in measured.values())


@pytest.mark.parametrize("family, dtype", [("deepseek_v3", "float32"), ("deepseek_v2", "float32")])
def test_fold_of_float32_weights_is_multiplied_in_float64(
    base_of: Any, tmp_path: Path, family: str, dtype: str
) -> None:
    arch, merged = opened(base_of(family, dtype))
    write_absorbed(arch, merged, tmp_path, "fold")
    absorbed = load_file(tmp_path / "absorbed.safetensors")
    for path in arch.attention_paths:
        for name, exact in products(merged.folder, path, arch.dims).items():
            assert (absorbed[f"{path}.{name}"] == exact.float()).double().mean() > 0.9999


def test_exact_multiplies_in_float64(base_of: Any, tmp_path: Path) -> None:
    """The first and the last term are large and cancel: a sum in float32 loses the last bits of those between."""
    folder = copied(base_of(), tmp_path / "model")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        query, kv_b = (tensors[f"{ATTENTION}.{name}.weight"] for name in ("q_b_proj", "kv_b_proj"))
        query[[0, P - 1]], kv_b[0], kv_b[P - 1] = 256.0, 256.0, -256.0

    arch, _ = opened(folder)
    P = arch.dims.P
    edit_tensors(folder / "model.safetensors", change)
    arch, merged = opened(folder)
    exact = products(folder, ATTENTION, arch.dims)["W_QK"][0]
    wrong = {}
    for option in (False, True):
        write_absorbed(arch, merged, tmp_path, "fold", exact=option)
        found = load_file(tmp_path / "absorbed.safetensors")[f"{ATTENTION}.W_QK"][0]
        wrong[option] = float((found != exact.bfloat16()).double().mean())
    assert wrong[False] > 0.1
    assert wrong[True] == 0


@pytest.mark.parametrize("mode", ["split", "fold"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_runs_on_the_absorbed_tensors_alone(base_of: Any, tmp_path: Path, family: str, mode: str) -> None:
    """Stock transformers against the same model without kv_b_proj (and, folded, without o_proj and the nope rows of the
    query): everything in float64, so that only the algebra is compared."""
    arch, merged = opened(base_of(family, "float64"))
    write_absorbed(arch, merged, tmp_path, mode)
    # Eager attention takes the softmax in float32; grouped experts know no float64.
    how: dict[str, Any] = {"dtype": torch.float64, "attn_implementation": "sdpa", "experts_implementation": "eager"}
    stock, model = (AutoModelForCausalLM.from_pretrained(merged.folder, **how).eval() for _ in range(2))
    run_absorbed(model, arch, tmp_path)
    with torch.no_grad():
        expected, found = stock(TOKENS, use_cache=False).logits, model(TOKENS, use_cache=False).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def run_absorbed(model: Any, arch: Architecture, folder: Path) -> None:
    """Let `model` compute attention from absorbed.safetensors; what it replaces is filled with NaN."""
    d = arch.dims
    absorbed = load_file(folder / "absorbed.safetensors")
    with safe_open(folder / "absorbed.safetensors", "pt") as file:
        about = file.metadata()
    scale = json.loads(about.get("latent_scales", "{}")).get("query", 1.0)
    rows = torch.arange(d.H * (d.P + d.R)).view(d.H, -1)[:, : d.P].flatten()

    def attention(module: Any, query: Any, latent: Any, k_rot: Any, mask: Any, scaling: float, **_: Any) -> Any:
        path, latent, k_rot = module.path, latent[:, 0], k_rot[:, 0]
        W = {name: absorbed[f"{path}.{name}"].to(query.dtype) for name in module.names}
        if about["mode"] == "split":
            q = torch.einsum("bhtp,hcp->bhtc", query[..., : d.P], W["W_UK"])
        else:
            q = scale * torch.einsum("btq,hqc->bhtc", module.c_q, W["W_QK"])
        scores = torch.einsum("bhtc,bsc->bhts", q, latent)
        scores = (scores + torch.einsum("bhtr,bsr->bhts", query[..., d.P :], k_rot)) * scaling + mask
        o = torch.einsum("bhts,bsc->bthc", scores.softmax(-1), latent)
        return (torch.einsum("bthc,hvc->bthv", o, W["W_UV"]) if about["mode"] == "split" else o), None

    class Output(nn.Module):
        """Σ_h W_VO[h] õ[h] in place of o_proj."""

        def __init__(self, W_VO: torch.Tensor, bias: torch.Tensor | None) -> None:
            super().__init__()
            self.W_VO, self.bias = W_VO, bias

        def forward(self, o: torch.Tensor) -> torch.Tensor:
            out = torch.einsum("bthc,hdc->btd", o.unflatten(-1, (d.H, d.C)), self.W_VO.to(o.dtype))
            return out if self.bias is None else out + self.bias

    ALL_ATTENTION_FUNCTIONS.register("absorbed_oracle", attention)
    AttentionMaskInterface.register("absorbed_oracle", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model.config._attn_implementation = "absorbed_oracle"
    for path in arch.attention_paths:
        module = model.get_submodule(path)
        module.path, module.names = path, [k.rpartition(".")[2] for k in absorbed if k.rpartition(".")[0] == path]
        module.expand_kv = lambda latent, k_rot: (latent, k_rot)
        module.kv_b_proj.weight.data.fill_(torch.nan)
        if about["mode"] == "fold":
            query = module.q_proj if d.L is None else module.q_b_proj
            query.weight.data[rows] = torch.nan

            def keep(_: Any, args: Any, module: Any = module) -> None:
                module.c_q = args[0]

            query.register_forward_pre_hook(keep)
            module.o_proj = Output(absorbed[f"{path}.W_VO"], module.o_proj.bias)


@pytest.mark.parametrize("mode", ["split", "fold"])
def test_workers_give_the_same_file(base_of: Any, tmp_path: Path, mode: str) -> None:
    arch, merged = opened(base_of())
    alone = write_absorbed(arch, merged, tmp_path, mode)
    expected = (tmp_path / "absorbed.safetensors").read_bytes()
    told: list[int] = []
    assert write_absorbed(arch, merged, tmp_path, mode, workers=4, progress=told.append) == alone
    assert (tmp_path / "absorbed.safetensors").read_bytes() == expected
    assert sum(told) == alone.bytes


@pytest.mark.parametrize("mode", ["split", "fold"])
@pytest.mark.parametrize("codes", [(), ("kv_b_proj", "q_b_proj", "o_proj")], ids=["bf16", "fp8"])
def test_small_blocks_give_the_same_bits(
    base_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, codes: tuple[str, ...]
) -> None:
    quantize(base_of(), tmp_path / "model", codes)
    arch, merged = opened(tmp_path / "model")
    written = []
    for block in (1 << 22, 700, 1):
        monkeypatch.setattr(absorb_module, "_BLOCK", block)
        write_absorbed(arch, merged, tmp_path, mode, quantized=quantized_tensors(merged) if codes else None)
        written.append((tmp_path / "absorbed.safetensors").read_bytes())
    # Sums in another order differ by float32's last bits, which bfloat16 seldom shows.
    if mode == "split":
        assert written[0] == written[1] == written[2]
    else:
        first, *others = (np.frombuffer(raw, np.uint8) for raw in written)
        assert all(np.mean(first != other) < 0.002 for other in others)


# --- FP8 -------------------------------------------------------------------------------------------------------------


def quantize(folder: Path, target: Path, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The model with FP8 codes for these matrices of each attention module, in blocks of 4 × 8: heads of 25 rows lie
    across them, the last ones are ragged.  Returns their true values in float64."""
    target.mkdir()
    tensors, truth = load_file(folder / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(5)
    for key in [key for key in tensors if any(key.endswith(f"self_attn.{name}.weight") for name in names)]:
        rows, columns = tensors[key].shape
        scale = torch.rand(-(-rows // 4), -(-columns // 8), generator=generator) + 0.01
        codes = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
        tensors |= {key: codes, f"{key}_scale_inv": scale}
        by_element = torch.empty(rows, columns, dtype=torch.float64)
        for i in range(rows):
            for j in range(columns):
                by_element[i, j] = scale[i // 4, j // 8].double()
        truth[key] = codes.double() * by_element
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((folder / "config.json").read_text())
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [4, 8]}
    if names:
        edit_json(target / "config.json", quantization_config=fp8)
    return truth


def test_fp8_is_dequantized_and_then_split(base_of: Any, tmp_path: Path) -> None:
    truth = quantize(base_of(), tmp_path / "fp8", ("kv_b_proj",))
    arch, merged = opened(tmp_path / "fp8")
    report = write_absorbed(arch, merged, tmp_path, "split", quantized=quantized_tensors(merged))
    absorbed = load_file(tmp_path / "absorbed.safetensors")
    for path in arch.attention_paths:
        expected = split_kv_b(truth[f"{path}.kv_b_proj.weight"].float().bfloat16(), arch.dims)
        assert torch.equal(absorbed[f"{path}.W_UK"], expected[0])
        assert torch.equal(absorbed[f"{path}.W_UV"], expected[1])
    assert set(report.rounding) == {"W_UK", "W_UV"}
    assert all(0.0005 < error < 2**-9 for error in report.rounding.values())
    with safe_open(tmp_path / "absorbed.safetensors", "pt") as file:
        digests = json.loads(file.metadata()["source_sha256"])
    assert f"{ATTENTION}.kv_b_proj.weight_scale_inv" in digests
    with pytest.raises(InputError, match=r"'model.layers.0.self_attn.kv_b_proj.weight' is F8_E4M3, and how"):
        write_absorbed(arch, merged, tmp_path, "split")


@pytest.mark.parametrize("names", [("kv_b_proj", "q_b_proj", "o_proj"), ("o_proj",)])
def test_fp8_is_dequantized_and_then_folded(base_of: Any, tmp_path: Path, names: tuple[str, ...]) -> None:
    truth = quantize(base_of(), tmp_path / "fp8", names)
    arch, merged = opened(tmp_path / "fp8")
    write_absorbed(arch, merged, tmp_path, "fold", quantized=quantized_tensors(merged))
    absorbed, d = load_file(tmp_path / "absorbed.safetensors"), arch.dims
    for path in arch.attention_paths:
        matrix = weights(base_of(), path, d) | {n: truth[f"{path}.{n}.weight"] for n in names}
        W_UK, W_UV = split_kv_b(matrix["kv_b_proj"], d)
        query = matrix["q_b_proj"].view(d.H, d.P + d.R, d.L or 0)[:, : d.P]
        exact = torch.einsum("hpq,hcp->hqc", query, W_UK)
        assert (absorbed[f"{path}.W_QK"] == exact.bfloat16()).double().mean() > 0.995
        exact = torch.einsum("dhv,hvc->hdc", matrix["o_proj"].view(d.D, d.H, d.V), W_UV)
        assert (absorbed[f"{path}.W_VO"] == exact.bfloat16()).double().mean() > 0.995


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["split", "fold"])
def test_shards_of_a_large_result(base_of: Any, tmp_path: Path, mode: str) -> None:
    arch, merged = opened(base_of())
    (tmp_path / "one").mkdir()
    whole = write_absorbed(arch, merged, tmp_path / "one", mode)
    expected = load_file(tmp_path / "one" / "absorbed.safetensors")
    largest = max(t.nbytes for t in expected.values())
    limit = 2 * largest
    told: list[int] = []
    report = write_absorbed(arch, merged, tmp_path, mode, max_shard_bytes=limit, progress=told.append)
    n = len(report.files)
    assert n > 2
    assert report.files == [f"absorbed-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    assert sum(told) == report.bytes == whole.bytes
    index = json.loads((tmp_path / "absorbed.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.bytes
    assert set(index["weight_map"]) == set(expected)
    found: dict[str, torch.Tensor] = {}
    for name in report.files:
        shard = load_file(tmp_path / name)
        assert sum(t.nbytes for t in shard.values()) <= limit
        assert {index["weight_map"][key] for key in shard} == {name}
        found |= shard
    sizes = [sum(t.nbytes for t in load_file(tmp_path / name).values()) for name in report.files]
    assert all(a + b > limit for a, b in pairwise(sizes)), "files that could have been one"
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    # A later run with room for all leaves nothing of this one.
    write_absorbed(arch, merged, tmp_path, mode)
    assert sorted(p.name for p in tmp_path.glob(".*") if p.is_file()) == []
    assert sorted(p.name for p in tmp_path.glob("*") if p.is_file()) == ["absorbed.safetensors"]


def test_a_tensor_larger_than_a_shard_gets_its_own(base_of: Any, tmp_path: Path) -> None:
    arch, merged = opened(base_of())
    report = write_absorbed(arch, merged, tmp_path, "fold", max_shard_bytes=1)
    assert len(report.files) == 2 * report.modules


@pytest.mark.parametrize("mode", ["split", "fold"])
def test_the_plan_is_what_is_written(base_of: Any, tmp_path: Path, mode: str) -> None:
    arch, merged = opened(base_of("longcat_flash"))
    headers = {key: (ref.dtype, ref.shape) for key, ref in merged.tensors.items()}
    plan = plan_absorbed(arch, headers, mode, max_shard_bytes=9000)
    report = write_absorbed(arch, merged, tmp_path, mode, max_shard_bytes=9000)
    assert list(plan.shards) == report.files
    assert plan.bytes == report.bytes
    for name, keys in plan.shards.items():
        found = load_file(tmp_path / name)
        assert sorted(found) == sorted(keys)
        assert {key: tuple(t.shape) for key, t in found.items()} == {key: plan.layout[key][1] for key in keys}


def test_the_metadata_tells_what_it_was_made_from(base_of: Any, tmp_path: Path) -> None:
    arch, merged = opened(base_of("longcat_flash"))
    tensors = load_file(merged.folder / "model.safetensors")
    for mode, names in (("split", ("kv_b_proj",)), ("fold", ("q_b_proj", "kv_b_proj", "o_proj"))):
        write_absorbed(arch, merged, tmp_path, mode)
        with safe_open(tmp_path / "absorbed.safetensors", "pt") as file:
            about = file.metadata()
        assert about["mode"] == mode
        assert json.loads(about["dims"])["C"] == arch.dims.C
        digests = json.loads(about["source_sha256"])
        assert digests == {
            key: hashlib.sha256(tensors[key].view(torch.uint8).numpy().tobytes()).hexdigest()
            for path in arch.attention_paths
            for key in (f"{path}.{name}.weight" for name in names)
        }
    assert "rope rows" in about["stays"]
    assert set(json.loads(about["latent_scales"])) == {"query", "latent"}


def test_the_report_is_json_with_the_cost_of_all_modules(base_of: Any, tmp_path: Path) -> None:
    arch, merged = opened(base_of())
    report = json.loads(json.dumps(write_absorbed(arch, merged, tmp_path, "fold", context=100).to_json()))
    assert report["context"] == 100
    assert [form["name"] for form in report["cost"]] == ["expanded", "re-expanded", "split", "fold"]
    # 3 modules, 2 bytes a number: what is written is what is counted.
    assert 2 * (report["cost"][3]["query_params"] + report["cost"][3]["output_params"]) == report["bytes"]
    assert report["cost"][3]["flops"] == 3 * report["cost_module"][3]["flops"]


def test_memory_does_not_follow_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(absorb_module, "_BLOCK", 1 << 14)
    monkeypatch.setattr("mla_tune.checkpoint.tensor_io._CHUNK", 1 << 14)
    d = MLADims(H=4, P=32, R=8, V=32, C=64, L=64, D=4096)
    arch = replace(opened_tiny(), dims=d)
    shapes = {"q_b_proj": (d.H * 40, 64), "kv_b_proj": (d.H * 64, d.C), "o_proj": (d.D, d.H * d.V)}
    arch = replace(
        arch,
        attention=(Attention(ATTENTION, 0, d),),
        sites=tuple(
            replace(s, shape=shapes[s.path.rpartition(".")[2]])
            for s in arch.sites
            if s.layer == 0 and s.path.rpartition(".")[2] in shapes
        ),
    )
    tensors = {f"{ATTENTION}.{name}.weight": torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    merged = Checkpoint.open(tmp_path)
    write_absorbed(arch, merged, tmp_path, "fold")  # modules are imported, caches filled
    tracemalloc.start()
    report = write_absorbed(arch, merged, tmp_path, "fold")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert report.bytes > 2_000_000
    assert peak < report.bytes / 4


def opened_tiny() -> Architecture:
    return architecture(MLA | MOE | {"model_type": "deepseek_v3"})


def test_it_needs_no_torch() -> None:
    code = "import sys, mla_tune.merge.absorb; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, size, message",
    [
        ("q_b_proj.bias", 48, "a bias on the query"),
        ("g_proj.weight", 48, "an output gate stands between W_UV and W_O"),
        ("q_norm.weight", 16, "a norm stands between W_UQ and W_UK"),
        ("indexer.wk.weight", 16, "is not known"),
    ],
)
def test_fold_refuses_what_is_not_exact(base_of: Any, tmp_path: Path, name: str, size: int, message: str) -> None:
    folder = copied(base_of(), tmp_path / "model")
    edit_tensors(
        folder / "model.safetensors", lambda t: t.update({f"model.layers.1.self_attn.{name}": torch.ones(size)})
    )
    arch, merged = opened(folder)
    with pytest.raises(InputError, match=f"'model.layers.1.self_attn.{name}': .*{message}.* Use --absorb split"):
        write_absorbed(arch, merged, tmp_path, "fold")
    assert not list(tmp_path.glob("*absorbed*"))
    write_absorbed(arch, merged, tmp_path, "split")


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize("mode", ["split", "fold"])
def test_what_no_mode_can_do(base_of: Any, mode: str) -> None:
    arch, merged = opened(base_of())
    headers = {key: (ref.dtype, ref.shape) for key, ref in merged.tensors.items()}
    kv_b = f"{ATTENTION}.kv_b_proj.weight"

    def refused(changed: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            plan_absorbed(arch, changed, mode)

    refused(headers | {f"{ATTENTION}.kv_b_proj.bias": ("BF16", (75,))}, "kv_b_proj.bias")
    refused(headers | {kv_b: ("BF16", (75, 27))}, r"is \(75, 27\), but config.json describes \(75, 28\)")
    refused(
        headers | {kv_b: ("I32", (75, 28))},
        "is I32, and how it was quantized is not known; F64, F32, F16, BF16 can be absorbed",
    )
    refused({k: v for k, v in headers.items() if k != kv_b}, f"has no tensor '{kv_b}'; did you mean")


def test_other_families_and_modes_are_refused(base_of: Any) -> None:
    arch, merged = opened(base_of())
    headers = {key: (ref.dtype, ref.shape) for key, ref in merged.tensors.items()}
    other = replace(arch, model_type="hy_v4", family=replace(arch.family, model_type="hy_v4", fold=None))
    with pytest.raises(InputError, match="exact for model_type 'hy_v4' is not known; known for axk1"):
        plan_absorbed(other, headers, "fold")
    assert plan_absorbed(other, headers, "split").bytes > 0
    unknown = architecture(merged.config | {"model_type": "deepseek_v9"})
    with pytest.raises(InputError, match="exact for model_type 'deepseek_v9' is not known"):
        plan_absorbed(unknown, headers, "fold")
    with pytest.raises(InputError, match="--absorb melt: allowed are split, fold and none"):
        plan_absorbed(arch, headers, "melt")


def test_a_product_too_large_for_float16(base_of: Any, tmp_path: Path) -> None:
    folder = copied(base_of("deepseek_v3", "float16"), tmp_path / "model")
    edit_tensors(folder / "model.safetensors", lambda t: t[f"{ATTENTION}.o_proj.weight"].fill_(6e4))
    arch, merged = opened(folder)
    with pytest.raises(CheckError, match=r"self_attn.W_VO has numbers that F16 can't hold.* use --absorb split"):
        write_absorbed(arch, merged, tmp_path, "fold")
    assert not [p for p in tmp_path.iterdir() if "absorbed" in p.name]


def test_mixed_dtypes_get_one_that_holds_all(base_of: Any, tmp_path: Path) -> None:
    arch, merged = opened(base_of())
    headers = {key: (ref.dtype, ref.shape) for key, ref in merged.tensors.items()}

    def dtypes(**changed: str) -> set[str]:
        edited = {k: (changed.get(k.split(".")[-2], dtype), shape) for k, (dtype, shape) in headers.items()}
        coded = [key for key, (dtype, _) in edited.items() if dtype == "F8_E4M3"]
        return {dtype for dtype, _ in plan_absorbed(arch, edited, "fold", quantized=coded).layout.values()}

    assert dtypes() == {"BF16"}
    assert dtypes(o_proj="F8_E4M3") == {"BF16"}
    assert dtypes(o_proj="F16") == {"F32"}
    assert dtypes(kv_b_proj="F64") == {"F64"}


def test_numpy_and_torch_agree_on_the_layout(base_of: Any, tmp_path: Path) -> None:
    """The file says H, C, P: element by element against rows of kv_b_proj."""
    arch, merged = opened(base_of("deepseek_v3", "float32"))
    write_absorbed(arch, merged, tmp_path, "split")
    d = arch.dims
    kv_b = load_file(merged.folder / "model.safetensors")[f"{ATTENTION}.kv_b_proj.weight"].numpy()
    W_UK = load_file(tmp_path / "absorbed.safetensors")[f"{ATTENTION}.W_UK"].numpy()
    W_UV = load_file(tmp_path / "absorbed.safetensors")[f"{ATTENTION}.W_UV"].numpy()
    for h, c, p in np.ndindex(d.H, d.C, d.P):
        assert W_UK[h, c, p] == kv_b[h * (d.P + d.V) + p, c]
    for h, v, c in np.ndindex(d.H, d.V, d.C):
        assert W_UV[h, v, c] == kv_b[h * (d.P + d.V) + d.P + v, c]
