"""Wrong outputs that an earlier proof accepted, and right outputs that it refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from mla_tune.adapter.files import open_adapter
from mla_tune.adapter.merge_options import MergeOptions
from mla_tune.arch.build import architecture
from mla_tune.checkpoint.index import Checkpoint
from mla_tune.merge.run import merge_absorb
from mla_tune.verification.weights import prove
from tests.helpers.fp8 import make_fp8
from tests.helpers.marks import fast_cases
from tests.helpers.merging import load, make_adapter, make_base

KEY = "model.layers.1.self_attn.o_proj.weight"


def failures(base: Path, adapters: list[Path], out: Path, **rules: Any) -> dict[str, str]:
    """Return the failures, by key."""
    checkpoint = Checkpoint.open(base)
    arch = architecture(checkpoint.config)
    opened = [(open_adapter(a, arch, checkpoint.tensors), 1.0) for a in adapters]
    report, _ = prove(checkpoint, arch, opened, Checkpoint.open(out), **rules)
    return {failure.key: failure.what for failure in report.failures}


def edit(folder: Path, key: str, change: Any) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if key in tensors:
            tensors[key] = change(tensors[key])
            file.unlink()  # it may be a hard link to the base
            save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("strict", [True, False])
def test_codes_of_zero_under_a_huge_scale(strict: bool, tmp_path: Path) -> None:
    """With such a scale, half the distance between two codes is larger than every weight."""
    base = make_fp8(make_base(tmp_path / "plain", dtype="bfloat16"), tmp_path / "base")
    plain = make_adapter(tmp_path / "adapter", tmp_path / "plain", target_modules=["o_proj"])
    merge_absorb(plain, base, tmp_path / "out", options=MergeOptions(quantized="keep", absorb="none"), verify=False)
    assert not failures(base, [plain], tmp_path / "out", strict=strict)
    edit(tmp_path / "out", KEY, lambda t: torch.zeros_like(t.float()).to(t.dtype))
    edit(tmp_path / "out", f"{KEY}_scale_inv", lambda t: torch.full_like(t, 1e6))
    assert "scales are too large" in failures(base, [plain], tmp_path / "out", strict=strict)[KEY]


def test_truncation_is_not_stochastic_rounding(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype="bfloat16")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["o_proj"])
    options = MergeOptions(dtype="float32", absorb="none")
    merge_absorb(adapter, base, tmp_path / "sums", options=options, verify=False)
    merge_absorb(adapter, base, tmp_path / "out", options=MergeOptions(round="stochastic", absorb="none"), verify=False)
    assert not failures(base, [adapter], tmp_path / "out", strict=True, rounding="stochastic")
    sums = {k: t for f in (tmp_path / "sums").glob("*.safetensors") for k, t in load_file(f).items()}
    cut = (sums[KEY].view(torch.int32) & -65536).view(torch.float32).bfloat16()
    edit(tmp_path / "out", KEY, lambda _: cut)
    found = failures(base, [adapter], tmp_path / "out", strict=True, rounding="stochastic")
    assert "in one direction: not rounded stochastically" in found[KEY]


def test_a_cast_is_exact_whoever_made_it(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["kv_b_proj"])
    merge_absorb(adapter, base, tmp_path / "out", options=MergeOptions(dtype="bfloat16", absorb="none"), verify=False)
    assert not failures(base, [adapter], tmp_path / "out", strict=False)

    def one_ulp(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(torch.int16).view(-1)[5] += 1
        return tensor

    edit(tmp_path / "out", KEY, one_ulp)
    assert "1 of 2,160 numbers is wrong" in failures(base, [adapter], tmp_path / "out", strict=False)[KEY]


@fast_cases("bfloat16-0")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_two_adapters_that_peft_merges_one_after_the_other(dtype: str, seed: int, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=dtype)
    targets = ["q_a_proj", "q_b_proj", "kv_b_proj", "o_proj"]
    adapters = [
        make_adapter(tmp_path / name, base, target_modules=targets, r=3 + seed, lora_alpha=alpha)
        for name, alpha in (("a", 0.3 * 4**seed), ("b", 7))
    ]
    model: Any = PeftModel.from_pretrained(load(base), adapters[0], adapter_name="a")
    model.load_adapter(adapters[1], adapter_name="b")
    model.merge_and_unload(adapter_names=["a", "b"]).save_pretrained(tmp_path / "out")
    assert not failures(base, adapters, tmp_path / "out", strict=False)
    model = PeftModel.from_pretrained(load(base), adapters[1])
    model.merge_and_unload().save_pretrained(tmp_path / "one")
    assert failures(base, adapters, tmp_path / "one", strict=False), "the first adapter is missing"
