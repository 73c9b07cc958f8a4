"""The merge against PEFT's own, against unmerged logits, and against exact sums in numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mla_tune.merge.run import merge_absorb
from tests.helpers.marks import fast_cases
from tests.helpers.merge_cases import ATTENTION, CASES, EXPERTS
from tests.helpers.merging import edit_tensors, load, logits_of, make_adapter, make_base, peft_merge


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {f: make_base(root / f, f) for f in ("deepseek_v3", "deepseek_v2", "minicpm3", "longcat_flash")}


@fast_cases("rslora", "dora", "patterns", "longcat")
@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge_and_the_unmerged_logits(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    family, settings = CASES[case]
    base = bases[family]
    adapter = make_adapter(tmp_path / "adapter", base, **settings)
    report = merge_absorb(adapter, base, tmp_path / "out")
    logits, expected = peft_merge(base, adapter)
    before, merged = load(base).state_dict(), load(tmp_path / "out").state_dict()
    assert merged.keys() == expected.keys()
    for key, tensor in expected.items():
        # LongCat-Flash's identity experts have rows in gate_up_proj that nothing reads: PEFT adds a delta to them too.
        real = slice(4) if family == "longcat_flash" and key.endswith("gate_up_proj") else slice(None)
        # Both add in float32; a matmul in another order differs in the last bits of the delta.
        assert (merged[key][real] - tensor[real]).abs().max() <= 1e-6 * tensor.abs().max(), key
    changed = {key for key in merged if not torch.equal(merged[key], before[key])}
    assert changed == {key for key in expected if not torch.equal(expected[key], before[key])}
    assert changed
    assert (logits - logits_of(base)).abs().max() > 1e-2, "the adapter does nothing: the test would prove nothing"
    assert (logits - logits_of(tmp_path / "out")).abs().max() <= 1e-4
    # float32 keeps a delta of this size but for its last bits.
    assert all(row.retained == pytest.approx(1, abs=1e-3) and row.cosine > 0.999 for row in report.roles)


@pytest.mark.parametrize("case", ["lora", "patterns", "dora", "v2"])
def test_bfloat16_differs_from_peft_by_one_rounding(case: str, tmp_path: Path) -> None:
    """PEFT rounds the delta of a parameter to bfloat16 before adding it (`ParamWrapper.get_delta_weight`) and computes
    DoRA's norms in bfloat16; here everything is float32 and rounded once.  So the two differ by at most the rounding of
    the delta plus that of the sum, and for DoRA by the rounding of the row's scale too."""
    family, settings = CASES[case]
    base = make_base(tmp_path / "base", family, "bfloat16")
    adapter = make_adapter(tmp_path / "adapter", base, **settings)
    merge_absorb(adapter, base, tmp_path / "out")
    _, expected = peft_merge(base, adapter)
    before, merged = load(base).state_dict(), load(tmp_path / "out").state_dict()
    allowed = 3 if settings.get("use_dora") else 1
    for key, tensor in expected.items():
        assert merged[key].dtype == tensor.dtype, key
        W, ours, theirs = before[key].double(), merged[key].double(), tensor.double()
        largest = torch.stack((W.abs(), ours.abs(), theirs.abs(), (ours - W).abs())).amax(0)
        assert ((ours - theirs).abs() <= allowed * bfloat16_step(largest)).all(), key


def bfloat16_step(x: torch.Tensor) -> torch.Tensor:
    """The unit in the last place of bfloat16 (8 bits of significand) at |x|."""
    return torch.exp2(torch.floor(torch.log2(x.clamp_min(1e-30))) - 7)


def test_bfloat16_is_the_exact_sum_rounded_once(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "deepseek_v3", "bfloat16")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["kv_b_proj"], target_parameters=EXPERTS)
    merge_absorb(adapter, base, tmp_path / "out")
    W, out, factors = (
        {k: v.double().numpy() for k, v in load_file(file).items()}
        for file in (
            base / "model.safetensors",
            tmp_path / "out" / "model.safetensors",
            adapter / "adapter_model.safetensors",
        )
    )
    scale, r, E = 7 / 3, 3, 4
    path = "model.layers.1.self_attn.kv_b_proj"
    A, B = (factors[f"base_model.model.{path}.lora_{x}.weight"] for x in "AB")
    exact = {f"{path}.weight": W[f"{path}.weight"] + scale * B @ A}
    for e in range(E):
        gate_up = np.zeros((80, 48))
        down = np.zeros((48, 40))
        for i in range(r):  # by hand: row e·r + i of A, column i·E + e of B
            for delta, wrapper in ((gate_up, "experts.base_layer"), (down, "experts")):
                A, B = (factors[f"base_model.model.model.layers.2.mlp.{wrapper}.lora_{x}.weight"] for x in "AB")
                delta += scale * np.outer(B[:, i * E + e], A[e * r + i])
        for name, delta in (("gate_proj", gate_up[:40]), ("up_proj", gate_up[40:]), ("down_proj", down)):
            key = f"model.layers.2.mlp.experts.{e}.{name}.weight"
            exact[key] = W[key] + delta
    for key, value in exact.items():
        half_step = bfloat16_step(torch.from_numpy(np.maximum(np.abs(out[key]), np.abs(value)))).numpy() / 2
        # The float32 sum before the rounding can move a tie by its own error.
        assert (np.abs(out[key] - value) <= half_step * (1 + 1e-4)).all(), key


def test_a_saved_adapter_of_another_dtype_merges_in_float32(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", bases["minicpm3"], target_modules=ATTENTION)

    def to_bfloat16(tensors: dict[str, torch.Tensor]) -> None:
        for key in tensors:
            tensors[key] = tensors[key].bfloat16()

    edit_tensors(adapter / "adapter_model.safetensors", to_bfloat16)
    merge_absorb(adapter, bases["minicpm3"], tmp_path / "out")
    _, expected = peft_merge(bases["minicpm3"], adapter)
    for key, tensor in load(tmp_path / "out").state_dict().items():
        assert (tensor - expected[key]).abs().max() <= 1e-6 * tensor.abs().max(), key
