"""The proof accepts right outputs of PEFT, of `merge_absorb`, and of merges by hand that round as tools do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from mla_tune.adapter.merge_options import MergeOptions
from mla_tune.arch.build import architecture
from mla_tune.errors import InputError
from mla_tune.merge.run import merge_absorb
from mla_tune.verification.verify import verify
from tests.helpers.fp8 import FORMATS, dequantized, make_fp8, spread
from tests.helpers.marks import fast_cases
from tests.helpers.merge_cases import CASES
from tests.helpers.merging import edit_json, edit_tensors, load, make_adapter, make_base, save_trained
from tests.helpers.proof import (
    ATTENTION,
    NORM,
    all_bfloat16,
    by_hand,
    changes,
    delta_first,
    dequantized_merge,
    edit,
    holds,
    once,
    scaled,
    tensors_of,
    verified,
    wrong,
)


@pytest.fixture(scope="module")
def bases(root: Path) -> Callable[[str, str], Path]:
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, dtype: str) -> Path:
        if (family, dtype) not in made:
            made[family, dtype] = make_base(root / "bases" / dtype / family, family, dtype)
        return made[family, dtype]

    return get


@fast_cases("rslora-bfloat16", "patterns-float32", "dora-bfloat16")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_merges_of_peft_and_of_mla_tune_hold(
    case: str, dtype: str, bases: Callable[[str, str], Path], tmp_path: Path
) -> None:
    family, settings = CASES[case]
    base = bases(family, dtype)
    adapter = make_adapter(tmp_path / "adapter", base, **settings)
    PeftModel.from_pretrained(load(base), adapter).merge_and_unload().save_pretrained(tmp_path / "peft")
    theirs = holds(tmp_path / "peft", base, adapter).proof
    merge_absorb(adapter, base, tmp_path / "out", verify=False)
    ours = holds(tmp_path / "out", base, adapter).proof
    assert (theirs.strict, ours.strict) == (False, True)
    changed = len([1 for key, t in tensors_of(tmp_path / "out").items() if not torch.equal(t, tensors_of(base)[key])])
    assert ours.recomputed == changed
    assert ours.worst_ulp == 0.5
    assert ours.absorbed == (4 if family == "longcat_flash" else 3 if family != "minicpm3" else 2)


@fast_cases("once-0", "all_bfloat16-1")
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("rule", [once, delta_first, all_bfloat16])
def test_no_tool_is_accused_for_how_it_rounds(
    rule: Callable[..., torch.Tensor], seed: int, base: Path, adapter: Path, tmp_path: Path
) -> None:
    """Changes of 0.03 % to 300 % of the weights (their standard deviation is 0.2)."""
    for size in (3e-4, 1e-3, 1e-2, 0.1, 1, 30):
        this = scaled(adapter, tmp_path / f"adapter-{size}", size * 3, seed)
        holds(by_hand(base, tmp_path / f"out-{size}", changes(base, this), rule), base, this)


def test_no_tool_is_accused_for_dequantizing_to_bfloat16_first(fp8: Path, adapter: Path, tmp_path: Path) -> None:
    values = {key: value.bfloat16() for key, value in dequantized(fp8).items()}
    for size in (1e-3, 1e-2, 0.1, 1):
        for seed in range(5):
            this = scaled(adapter, tmp_path / f"adapter-{seed}-{size}", size, seed)
            holds(dequantized_merge(fp8, tmp_path / f"out-{seed}-{size}", this, values), fp8, this)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [once, all_bfloat16])
def test_no_dora_is_accused_for_how_it_rounds(
    rule: Callable[..., torch.Tensor], root: Path, base: Path, tmp_path: Path
) -> None:
    dora = make_adapter(tmp_path / "dora", base, target_modules=ATTENTION, use_dora=True)
    for seed in range(10):
        for size in (1e-3, 0.1, 1):
            this = scaled(dora, tmp_path / f"adapter-{seed}-{size}", size, seed)
            out = by_hand(base, tmp_path / f"out-{seed}-{size}", changes(base, this), rule)
            holds(out, base, this)


OPTIONS: dict[str, MergeOptions] = {
    "nearest": MergeOptions(),
    "exact": MergeOptions(exact=True),
    "stochastic": MergeOptions(round="stochastic", seed=5),
    "float32": MergeOptions(dtype="float32"),
    "float32 exact": MergeOptions(dtype="float32", exact=True),
    "float16": MergeOptions(dtype="float16"),
    "float16 stochastic": MergeOptions(dtype="float16", round="stochastic"),
    "float32 stochastic": MergeOptions(dtype="float32", round="stochastic"),
    "fold": MergeOptions(absorb="fold"),
    "fold in float32": MergeOptions(absorb="fold", dtype="float32"),
    "copied": MergeOptions(link=False, absorb="none"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_merge_absorb_holds_strictly(name: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    merge_absorb(adapter, base, tmp_path / "out", options=OPTIONS[name], verify=False)
    proof = holds(tmp_path / "out", base).proof
    assert proof.strict
    assert proof.absorbed == (0 if OPTIONS[name].absorb == "none" else 3)
    assert proof.worst_ulp <= (1 if OPTIONS[name].round == "stochastic" else 0.5)
    # Without its manifest, an output counts as an unknown tool's: it holds too, unless it was rounded stochastically.
    if OPTIONS[name].round == "nearest":
        (tmp_path / "out" / "mla_tune_manifest.json").unlink()
        assert not holds(tmp_path / "out", base, adapter).proof.strict


@fast_cases("deepseek-keep exact", "tensor-keep", "channel-bf16")
@pytest.mark.parametrize("how", ["bf16", "keep", "keep exact", "keep stochastic", "float32"])
@pytest.mark.parametrize("name", FORMATS)
def test_merge_absorb_on_fp8_holds_strictly(name: str, how: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    fp8 = make_fp8(base, tmp_path / "fp8", **FORMATS[name])
    rounding = "stochastic" if "stochastic" in how else "nearest"
    options = MergeOptions(
        quantized="keep", exact="exact" in how, round=rounding, absorb="fold" if "exact" in how else "split"
    )
    options = {"bf16": MergeOptions(), "float32": MergeOptions(dtype="float32")}.get(how, options)
    merge_absorb(adapter, fp8, tmp_path / "out", options=options, verify=False)
    assert holds(tmp_path / "out", fp8).proof.strict
    if rounding == "nearest":
        (tmp_path / "out" / "mla_tune_manifest.json").unlink()
        holds(tmp_path / "out", fp8, adapter)


@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens", "norm", "mlp.gate"]])
@pytest.mark.parametrize("dtype", ["keep", "float32"])
def test_whole_tensors_hold(modules: list[str], dtype: str, base: Path, tmp_path: Path) -> None:
    saved = save_trained(tmp_path / "adapter", base, target_modules=["o_proj"], modules_to_save=modules)
    merge_absorb(saved, base, tmp_path / "out", options=MergeOptions(dtype=dtype), verify=False)
    holds(tmp_path / "out", base)
    edit(tmp_path / "out", NORM if "norm" in modules else "lm_head.weight", lambda t: t * 1.5)
    assert set(wrong(tmp_path / "out", base)) >= {NORM if "norm" in modules else "lm_head.weight"}


def test_untied_heads_hold(tmp_path: Path) -> None:
    tied = make_base(tmp_path / "base", "minicpm3", "bfloat16")
    head = make_adapter(tmp_path / "adapter", tied, target_modules=["lm_head", "kv_b_proj"])
    merge_absorb(head, tied, tmp_path / "out", options=MergeOptions(untie_embeddings=True), verify=False)
    holds(tmp_path / "out", tied)
    edit_json(tmp_path / "out" / "config.json", tie_word_embeddings=True)
    assert "still ties it" in wrong(tmp_path / "out", tied)["lm_head.weight"]
    PeftModel.from_pretrained(load(tied), head).merge_and_unload().save_pretrained(tmp_path / "peft")
    found = wrong(tmp_path / "peft", tied, head)
    assert "model.embed_tokens.weight" in found, "PEFT merges into the embedding too"


def test_several_adapters_and_experts_one_by_one(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = scaled(adapter, tmp_path / "other", 1, seed=7)
    merge_absorb([(adapter, 0.7), (other, -0.3)], base, tmp_path / "sum", verify=False)
    holds(tmp_path / "sum", base)
    (tmp_path / "sum" / "mla_tune_manifest.json").unlink()
    assert verify(tmp_path / "sum", base, [(adapter, 0.7), (other, -0.3)], logits=False).holds
    assert not verify(tmp_path / "sum", base, [(adapter, 0.7), (other, 0.3)], logits=False).holds
    generator = torch.Generator().manual_seed(0)
    loose, tensors = tmp_path / "loose", {}
    for layer, expert, name in ((1, 0, "gate_proj"), (1, 3, "up_proj"), (2, 2, "down_proj")):
        path = f"model.layers.{layer}.mlp.experts.{expert}.{name}"
        out, inner = tensors_of(base)[f"{path}.weight"].shape
        for x, shape in (("A", (3, inner)), ("B", (out, 3))):
            tensors[f"base_model.model.{path}.lora_{x}.weight"] = torch.randn(shape, generator=generator)
    shutil.copytree(adapter, loose)
    save_file(tensors, loose / "adapter_model.safetensors")
    edit_json(loose / "adapter_config.json", target_modules=["gate_proj", "up_proj", "down_proj"])
    edit_json(loose / "adapter_config.json", target_parameters=None)
    merge_absorb(loose, base, tmp_path / "loose-out", verify=False)
    assert holds(tmp_path / "loose-out", base).proof.recomputed == 3
    dora = make_adapter(tmp_path / "dora", base, target_modules=["o_proj"], use_dora=True)
    with pytest.raises(InputError, match="a DoRA, which is merged alone"):
        verified(tmp_path / "sum", base, dora, adapter)


def fused(base: Path, out: Path) -> Path:
    """The checkpoint with the experts of a layer as one tensor (E, out, in), as some families save them."""
    tensors = tensors_of(base)
    for layer in (1, 2):
        path = f"model.layers.{layer}.mlp.experts"
        parts = [[tensors.pop(f"{path}.{e}.{x}_proj.weight") for x in ("gate", "up", "down")] for e in range(4)]
        tensors[f"{path}.gate_up_proj"] = torch.stack([torch.cat(p[:2]) for p in parts])
        tensors[f"{path}.down_proj"] = torch.stack([p[2] for p in parts])
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("fp8", ["", "dequantize", "keep"])
def test_fused_experts_on_disk(
    fp8: str, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = architecture(json.loads((base / "config.json").read_text()))
    sites = tuple(replace(site, disk="fused") if site.is_experts else site for site in arch)
    monkeypatch.setattr("mla_tune.runs.merge_inputs.architecture", lambda *_: replace(arch, sites=sites))
    this = fused(base, tmp_path / "fused")
    this = make_fp8(this, tmp_path / "fp8", (8, 16)) if fp8 else this
    merge_absorb(adapter, this, tmp_path / "out", options=MergeOptions(quantized=fp8 or "dequantize"), verify=False)
    holds(tmp_path / "out", this)
    key = "model.layers.2.mlp.experts.gate_up_proj"
    if fp8 == "keep":
        wide = tensors_of(tmp_path / "out")[f"{key}_scale_inv"].clone()
        wide[3] *= 64  # of the last expert alone
        deltas = changes(base, adapter)
        names = [[f"model.layers.2.mlp.experts.{e}.{x}_proj.weight" for x in ("gate", "up")] for e in range(4)]
        delta = torch.stack([torch.cat([deltas[name].delta for name in pair]) for pair in names])
        codes = (dequantized(this)[key] + delta) / spread(wide, delta.shape, (8, 16))
        edit_tensors(
            tmp_path / "out" / "model.safetensors",
            lambda t: t.update({key: codes.to(torch.float8_e4m3fn), f"{key}_scale_inv": wide}),
        )
    else:
        old = dequantized(this)[key].to(torch.bfloat16) if fp8 else tensors_of(this)[key]
        edit_tensors(tmp_path / "out" / "model.safetensors", lambda t: t[key][3].copy_(old[3]))
    found = wrong(tmp_path / "out", this)[key]
    assert fp8 != "keep" or "scales are too large, by up to 64 times" in found
