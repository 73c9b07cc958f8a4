"""Training above quantized weights.  The oracle: the same numbers in a plain model under plain PEFT, in torch."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from mla_tune.adapter.peft_config import peft_config
from mla_tune.adapter.placement import place
from mla_tune.errors import InputError
from mla_tune.model.attach import attach
from mla_tune.model.fp8 import Fp8Weight, ScaleLayout
from mla_tune.model.load import Loaded, load_model
from mla_tune.model.nf4 import Nf4Weight
from mla_tune.model.quantized_linear import QuantizedLinear, QuantizedWeight, linear
from mla_tune.recipe.schema import AdapterSection, ModelSection
from mla_tune.resources import EMBEDDED_MODEL
from mla_tune.training.kernels.lora_linear import use_lora_factors
from mla_tune.training.kernels.mla_checkpointing import enable_mla_checkpointing
from tests.helpers.fp8 import dequantized, make_fp8
from tests.helpers.merging import edit_json
from tests.helpers.tiny_families import tiny, vocabulary

#: Blocks of 16 rows divide neither the 40 rows of an expert's gate nor most other matrices.
FP8: dict[str, dict[str, Any]] = {
    "deepseek": {"block": (16, 12)},
    "block larger than a matrix": {"block": (128, 128)},
    "ue8m0 as codes": {"block": (16, 16), "ue8m0": True, "scale_dtype": "F8_E8M0"},
    "scales bf16": {"block": (16, 16), "scale_dtype": "BF16"},
    "some not quantized": {"block": (16, 16), "skip": ["layers.1.mlp.experts", "layers.0.self_attn.kv_b_proj"]},
    "compressed-tensors": {"block": (16, 16), "style": "compressed-tensors"},
    "a scale a row": {"block": None, "style": "compressed-tensors", "channel": True},
}
ADAPTER = {"targets": "all-linear", "rank": 3, "alpha": 5}


def plain_copy(folder: Path, out: Path, dtype: torch.dtype = torch.float32) -> Path:
    """An FP8 checkpoint's numbers as a plain checkpoint."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {key: t.to(dtype).contiguous() for key, t in dequantized(folder).items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    edit_json(out / "config.json", quantization_config=None, dtype=str(dtype).removeprefix("torch."))
    return out


def fp8_pair(tmp_path: Path, family: str = "deepseek_v3", fmt: str = "deepseek") -> tuple[Path, Path]:
    """(FP8 checkpoint, the same numbers in float32)."""
    tiny(family).save_pretrained(tmp_path / "drawn")
    fp8 = make_fp8(tmp_path / "drawn", tmp_path / "fp8", **FP8[fmt])
    return fp8, plain_copy(fp8, tmp_path / "plain")


def load(folder: Path | str, **keys: Any) -> Loaded:
    return load_model(ModelSection(base=str(folder), device="cpu", **keys), allow_quantized=True)


def adapter_weights(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


def both_adapted(loaded: Loaded, oracle: Any) -> tuple[Any, Any]:
    """The same adapter, away from zero, on the quantized model as train attaches it and on the oracle by plain PEFT."""
    placement = place(loaded.arch, AdapterSection(**ADAPTER))
    ours = attach(loaded.model, loaded.arch, placement, 0)
    theirs: Any = get_peft_model(oracle, peft_config(loaded.arch, placement))
    generator = torch.Generator().manual_seed(1)
    values = adapter_weights(theirs)
    assert adapter_weights(ours).keys() == values.keys()
    with torch.no_grad():
        for name, p in adapter_weights(ours).items():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
            values[name].copy_(p)
    return ours.train(), theirs.train()


def loss_and_gradients(model: Any, family: str, dtype: torch.dtype | None = None) -> tuple[float, dict[str, Any]]:
    ids = torch.randint(3, vocabulary(family), (2, 12), generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in adapter_weights(model).items()}


def assert_same(ours: tuple[float, dict[str, Any]], theirs: tuple[float, dict[str, Any]], within: float) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=within)
    for name, wanted in theirs[1].items():
        assert wanted.abs().max() > 0, name
        assert torch.linalg.norm(ours[1][name] - wanted) <= within * torch.linalg.norm(wanted), name


def plain(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """As transformers loads it, with the routed experts one by one where there are any."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("fmt", FP8)
def test_loss_and_gradients_above_fp8_equal_those_above_the_same_numbers(fmt: str, tmp_path: Path) -> None:
    """float32: only the order of sums differs."""
    fp8, full = fp8_pair(tmp_path, fmt=fmt)
    ours, theirs = both_adapted(load(fp8), plain(full))
    assert use_lora_factors(ours) > 0
    assert_same(loss_and_gradients(ours, "deepseek_v3"), loss_and_gradients(theirs, "deepseek_v3"), 2e-5)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v2_q_proj", "glm4_moe_lite", "minicpm3"])
def test_other_families(family: str, tmp_path: Path) -> None:
    """Softmax routers, queries without compression, tied heads and no experts."""
    fp8, full = fp8_pair(tmp_path, family)
    loaded = load(fp8)
    ours, theirs = both_adapted(loaded, plain(full))
    use_lora_factors(ours)
    assert_same(loss_and_gradients(ours, family), loss_and_gradients(theirs, family), 2e-5)


@pytest.mark.parametrize("way", ["PEFT's own forward", "mla", "full"])
def test_ways_of_running_the_layers(way: str, tmp_path: Path) -> None:
    """PEFT adapts parameters by parametrization; recomputation runs the layers twice."""
    fp8, full = fp8_pair(tmp_path)
    ours, theirs = both_adapted(load(fp8), plain(full))
    if way != "PEFT's own forward":
        use_lora_factors(ours)
    if way == "mla":
        enable_mla_checkpointing(ours)
    if way == "full":
        ours.gradient_checkpointing_enable({"use_reentrant": False})
        ours.enable_input_require_grads()
    assert_same(loss_and_gradients(ours, "deepseek_v3"), loss_and_gradients(theirs, "deepseek_v3"), 2e-5)
    with ours.disable_adapter(), theirs.disable_adapter(), torch.no_grad():
        ids = torch.arange(3, 15)[None]
        torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_bfloat16_is_as_near_to_float32_as_a_bfloat16_checkpoint_is(tmp_path: Path) -> None:
    """The issue's oracle: the bf16 checkpoint of the same numbers, trained in bf16 by plain PEFT.  Both are compared
    with float32, because two orders of sums in bf16 differ from each other as much as from the truth."""
    fp8, full = fp8_pair(tmp_path)
    ours, theirs = both_adapted(load(fp8, dtype="bfloat16"), plain(full, torch.bfloat16))
    use_lora_factors(ours)
    truth = loss_and_gradients(both_adapted(load(fp8), plain(full))[1], "deepseek_v3")[1]
    errors = []
    for model in (ours, theirs):
        found = loss_and_gradients(model, "deepseek_v3", torch.bfloat16)[1]
        assert {g.dtype for g in found.values()} == {torch.float32}
        square = sum(((found[n].double() - truth[n].double()) ** 2).sum() for n in truth)
        errors.append(math.sqrt(square / sum((g.double() ** 2).sum() for g in truth.values())))
    assert errors[0] <= 1.1 * errors[1]


def test_one_layer_against_the_formula() -> None:
    """y = x Wᵀ and dx = dy W with W written out element by element; rows of two parts have blocks of their own."""
    generator = torch.Generator().manual_seed(0)
    rows, columns, block = 10, 7, (3, 4)
    codes = torch.randn(2, rows, columns, generator=generator).to(torch.float8_e4m3fn)
    layout = ScaleLayout(block, parts=2)
    assert layout.scales((2, rows, columns)) == (2, 4, 2)
    scales = torch.rand(2, 4, 2, generator=generator)
    matrix = Fp8Weight(codes, scales, layout)
    for expert in (0, 1):
        weight = torch.empty(rows, columns, dtype=torch.float64)
        for i in range(rows):
            for j in range(columns):
                scale = scales[expert, (i // 5) * 2 + (i % 5) // 3, j // 4]
                weight[i, j] = (codes[expert, i, j].float() * scale).double()
        x = torch.randn(2, 3, columns, dtype=torch.float64, generator=generator, requires_grad=True)
        y = linear(x, matrix, expert)
        dy = torch.randn(y.shape, dtype=torch.float64, generator=generator)
        (dx,) = torch.autograd.grad(y, x, dy)
        torch.testing.assert_close(y, x @ weight.T)
        torch.testing.assert_close(dx, dy @ weight)


class Largest(TorchDispatchMode):
    """The largest tensor of more than a byte a number that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.device.type != "meta" and t.element_size() > 1:
                self.numbers = max(self.numbers, t.untyped_storage().nbytes() // t.element_size())
        return out


def owned_bytes(model: torch.nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_memory_is_a_byte_a_weight_and_one_matrix_in_numbers(tmp_path: Path) -> None:
    """Also while the weights are read, and in what the forward pass keeps for the backward pass."""
    tiny("deepseek_v3").save_pretrained(tmp_path / "drawn")
    fp8 = make_fp8(tmp_path / "drawn", tmp_path / "fp8", block=(128, 128))
    largest = Largest()
    with largest:
        loaded = load(fp8)
    matrices = {m: math.prod(m.shape) for m in loaded.model.modules() if isinstance(m, QuantizedWeight)}
    weights = sum(matrices.values())
    assert loaded.quantized == {
        "kind": "fp8",
        "matrices": sum(math.prod(m.shape[:-2]) for m in matrices),
        "weights": weights,
        "bytes": weights + sum(4 * m.scales.numel() for m in matrices),  # type: ignore[union-attr, operator]
    }
    others = {n: p for n, p in loaded.model.named_parameters() if not p.isnan().all()}
    assert not any(n.endswith("_proj.weight") for n in others)
    placeholders = 4 * len(matrices)
    assert owned_bytes(loaded.model) <= loaded.quantized["bytes"] + placeholders + 4 * (
        sum(p.numel() for p in others.values()) + sum(b.numel() for n, b in loaded.model.named_buffers() if "freq" in n)
        + sum(b.numel() for n, b in loaded.model.named_buffers() if n.endswith("correction_bias"))
    )  # fmt: skip
    one = max(math.prod(m.shape[-2:]) for m in matrices)
    table = loaded.model.get_input_embeddings().weight.numel()
    assert largest.numbers <= max(one, table)

    net = attach(loaded.model, loaded.arch, place(loaded.arch, AdapterSection(**ADAPTER)), 0).train()
    use_lora_factors(net)
    shapes = {m.shape[-2:] for m in matrices}
    kept = []
    stack = max(math.prod(m.shape) for m in matrices if len(m.shape) == 3)
    largest.numbers = 0
    with largest, torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        ids = torch.arange(3, 9)[None]
        net(input_ids=ids, labels=ids).loss.backward()
    assert not [t.shape for t in kept if tuple(t.shape) in shapes and t.is_floating_point()]
    assert largest.numbers < stack


def test_a_weight_read_past_its_layer_is_nan(tmp_path: Path) -> None:
    layer: Any = load(fp8_pair(tmp_path)[0]).model.get_submodule("model.layers.0.self_attn.o_proj")
    assert isinstance(layer, QuantizedLinear)
    assert layer.weight.isnan().all()
    assert not layer.weight.requires_grad


# ---------------------------------------------------------------------------------------------------------------- NF4

#: QLoRA (arXiv:2305.14314), appendix E.
NF4_TABLE = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def test_nf4_codes_are_the_nearest_of_the_papers_table() -> None:
    """Read without bitsandbytes: two codes a byte, 64 numbers a scale; the last block is not full."""
    weight = torch.randn(3, 11, 26, generator=torch.Generator().manual_seed(0))
    matrix = Nf4Weight(weight)
    table = torch.tensor(NF4_TABLE)
    for expert in range(3):
        packed = matrix.codes[expert]
        codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[: 11 * 26].long()
        scales = matrix.outer_table[matrix.scales[expert].long()] * matrix.outer[expert, 0] + matrix.mean[expert]
        scale = scales.repeat_interleave(64)[: 11 * 26]
        numbers = table[codes] * scale
        torch.testing.assert_close(matrix.dequantize(torch.float32, expert).flatten(), numbers)
        exact = torch.stack([p.abs().max() for p in weight[expert].flatten().split(64)])
        torch.testing.assert_close(scales, exact, rtol=0.02, atol=0.02)
        unit = weight[expert].flatten() / exact.repeat_interleave(64)[: 11 * 26]
        assert (codes == (unit[:, None] - table).abs().argmin(dim=1)).all()


def test_loss_and_gradients_above_nf4_equal_those_above_the_same_numbers(tmp_path: Path) -> None:
    tiny("deepseek_v3").save_pretrained(tmp_path / "drawn")
    loaded = load(tmp_path / "drawn", quantize="nf4")
    oracle = plain(tmp_path / "drawn")
    quantized = 0
    for name, module in loaded.model.named_modules():
        if isinstance(module, QuantizedWeight):
            weight = oracle.get_parameter(name.removesuffix("_matrix"))
            numbers = [module.dequantize(torch.float32, e) for e in range(len(weight))] if weight.ndim == 3 else None
            weight.data = torch.stack(numbers) if numbers else module.dequantize(torch.float32)
            quantized += weight.numel()
    assert loaded.quantized is not None
    assert loaded.quantized["weights"] == quantized
    assert {n for n, m in loaded.model.named_modules() if type(m) is torch.nn.Linear} == {"lm_head"}
    ours, theirs = both_adapted(loaded, oracle)
    use_lora_factors(ours)
    assert_same(loss_and_gradients(ours, "deepseek_v3"), loss_and_gradients(theirs, "deepseek_v3"), 2e-5)


def test_nf4_takes_half_a_byte_a_weight() -> None:
    """4 bits, 8 for the scale of 64 numbers, 32 for that of 256 scales; two tables a matrix come on top."""
    matrix = Nf4Weight(torch.randn(8, 256, 512))
    tables = matrix.table.nbytes + matrix.outer_table.nbytes + matrix.mean.nbytes
    assert (matrix.nbytes - tables) / (8 * 256 * 512) == 0.5 + 1 / 64 + 4 / (64 * 256)


# -------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    words = ["red", "green", "blue", "one", "two", "three", "stone", "river"]
    path.write_text("".join(json.dumps({"prompt": f"Say {w}.", "completion": f"{w} {w}"}) + "\n" for w in words * 2))
    return path


@pytest.fixture(scope="module")
def embedded_fp8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("embedded")
    fp8 = make_fp8(EMBEDDED_MODEL, folder / "fp8", block=(128, 128))
    return fp8, plain_copy(fp8, folder / "plain")


def options(rows: Path, base: Path | str, out: Path, *sets: str) -> list[str]:
    every = ["train.max_steps=3", "train.batch_size=2", "train.max_length=64", "adapter.targets=all-linear"]
    every += [f"model.base={base}", f"data.path={rows}", "model.device=cpu", "train.save_every=2"]
    return ["train", "--recipe", "safe", "--output", str(out), *(x for s in [*every, *sets] for x in ("--set", s))]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(5, 30)[None]).logits


@pytest.mark.slow
def test_a_run_above_fp8_equals_one_above_its_numbers_and_merges_into_it(
    cli: Callable[..., Any], rows: Path, embedded_fp8: tuple[Path, Path], tmp_path: Path
) -> None:
    fp8, full = embedded_fp8
    sets = ["model.attention=packed", "train.save_every=0"]
    for base, out in ((fp8, "a"), (full, "b")):
        done = cli(*options(rows, base, tmp_path / out, *sets))
        assert done.code == 0, done.err
        if base is fp8:
            assert "base kept in fp8: " in done.err
            assert "bytes a weight" in done.err
    a, b = (json.loads((tmp_path / name / "run.json").read_text()) for name in "ab")
    assert a["quantized"]["kind"] == "fp8"
    assert b["quantized"] is None
    assert a["held_out_loss"] == pytest.approx(b["held_out_loss"], rel=1e-4)
    adapters = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in "ab"]
    assert adapters[0].keys() == adapters[1].keys()

    adapter = tmp_path / "a" / "adapter"
    above_plain = logits(PeftModel.from_pretrained(plain(full), adapter))
    above_fp8 = logits(PeftModel.from_pretrained(load(fp8).model, adapter))
    torch.testing.assert_close(above_fp8, above_plain, rtol=1e-4, atol=1e-4)

    merged = cli("merge-absorb", str(tmp_path / "a"), "--out", str(tmp_path / "merged"))
    assert merged.code == 0, merged.err


def test_a_run_above_nf4_stops_resumes_and_fits_the_unquantized_base(
    cli: Callable[..., Any], rows: Path, tmp_path: Path
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    sets = ["model.quantize=nf4", "model.attention=packed"]
    done = cli(*options(rows, "embedded", whole, *sets))
    assert done.code == 0, done.err
    run = json.loads((whole / "run.json").read_text())
    assert run["quantized"]["kind"] == "nf4"
    assert run["quantized"]["bytes"] < 0.56 * run["quantized"]["weights"]
    shutil.copytree(whole, halves)
    shutil.rmtree(halves / "checkpoints" / "checkpoint-3", ignore_errors=True)
    again = cli(*options(rows, "embedded", halves, *sets), "--resume")
    assert again.code == 0, again.err
    for name, tensor in load_file(whole / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, load_file(halves / "adapter" / "adapter_model.safetensors")[name]), name
    net = PeftModel.from_pretrained(plain(EMBEDDED_MODEL), whole / "adapter")
    before = logits(plain(EMBEDDED_MODEL))
    assert not torch.equal(logits(net), before)


# --------------------------------------------------------------------------------------------------------- bad input

CONTRADICTIONS = [
    (["adapter.method=none"], "adapter.method: none trains the weights themselves"),
    (["model.quantize=nf4"], "model.quantize: nf4 is for plain weights"),
    (
        ["adapter.method=dora", "adapter.targets=attention-only"],
        "adapter.method: dora does not go with a quantized base",
    ),
    (["train.compile=true"], "train.compile does not go with a quantized base"),
    (["model.experts=grouped_mm"], "model.experts: grouped_mm does not go with a quantized base"),
]


@pytest.mark.parametrize("sets, says", CONTRADICTIONS, ids=[c[0][0] for c in CONTRADICTIONS])
def test_what_does_not_go_with_fp8(
    sets: list[str], says: str, cli: Callable[..., Any], rows: Path, embedded_fp8: tuple[Path, Path], tmp_path: Path
) -> None:
    done = cli(*options(rows, embedded_fp8[0], tmp_path / "run", *sets))
    assert done.code == 2
    assert says in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "sets, says",
    [
        (["adapter.method=none"], "model.quantize keeps the weights frozen"),
        (["model.base=null", "model.preset=tiny"], "model.quantize is for a trained base"),
    ],
)
def test_what_does_not_go_with_nf4(
    sets: list[str], says: str, cli: Callable[..., Any], rows: Path, tmp_path: Path
) -> None:
    done = cli(*options(rows, "embedded", tmp_path / "run", "model.quantize=nf4", *sets))
    assert done.code == 2
    assert says in done.err


def test_nf4_without_bitsandbytes_names_the_extra(
    cli: Callable[..., Any], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else found(name))
    done = cli(*options(rows, "embedded", tmp_path / "run", "model.quantize=nf4"))
    assert done.code == 2
    assert "pip install 'mla-tune[quant]'" in done.err


def _int4(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def _no_scale(folder: Path) -> None:
    _edit_tensors(folder, lambda tensors: tensors.pop("model.layers.0.self_attn.o_proj.weight_scale_inv"))


def _bad_scale(folder: Path) -> None:
    _edit_tensors(folder, lambda tensors: tensors["model.layers.0.self_attn.o_proj.weight_scale_inv"].fill_(0))


def _one_expert_plain(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.1.mlp.experts.0.up_proj.weight"
        tensors[name] = tensors[name].float()
        del tensors[f"{name}_scale_inv"]

    _edit_tensors(folder, change)


def _edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage, says",
    [
        (_int4, "quant_method is 'gptq'"),
        (_no_scale, "is FP8 without a scale"),
        (_bad_scale, "where scales are positive numbers"),
        (_one_expert_plain, "in one stack of experts"),
    ],
)
def test_checkpoints_that_are_refused_before_weights_are_read(
    damage: Callable[[Path], None], says: str, tmp_path: Path
) -> None:
    folder = fp8_pair(tmp_path)[0]
    damage(folder)
    with pytest.raises(InputError, match=says):
        load(folder)


def test_experts_with_a_forward_of_their_own_are_refused(tmp_path: Path) -> None:
    """LongCat's, of which some are the identity."""
    fp8 = fp8_pair(tmp_path, "longcat_flash")[0]
    for folder, keys in ((fp8, {}), (tmp_path / "drawn", {"quantize": "nf4"})):
        with pytest.raises(InputError, match="the routed experts of this family have a forward pass of their own"):
            load(folder, **keys)


def test_one_scale_a_tensor_is_refused(tmp_path: Path) -> None:
    tiny("deepseek_v3").save_pretrained(tmp_path / "drawn")
    make_fp8(tmp_path / "drawn", tmp_path / "fp8", block=None)
    with pytest.raises(InputError, match="one scale for the whole weight"):
        load(tmp_path / "fp8")


def test_who_can_not_work_with_quantized_weights_refuses_them(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="which only train works with"):
        load_model(ModelSection(base=str(fp8_pair(tmp_path)[0]), device="cpu"))
