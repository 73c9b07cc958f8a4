"""Bases and an adapter for the tests of the proof."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers.fp8 import make_fp8
from tests.helpers.merging import edit_tensors, make_adapter, make_base
from tests.helpers.proof import ATTENTION, EXPERTS


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("proof")


@pytest.fixture(scope="module")
def base(root: Path) -> Path:
    return make_base(root / "base", dtype="bfloat16", shard="60KB")


@pytest.fixture(scope="module")
def adapter(root: Path, base: Path) -> Path:
    return make_adapter(root / "adapter", base, target_modules=ATTENTION, target_parameters=EXPERTS)


@pytest.fixture(scope="module")
def even(root: Path, base: Path) -> Path:
    """A base with all weights between 0.13 and 0.24, whose ulp is 2⁻¹⁰, so that no weight shows a smaller change."""
    shutil.copytree(base, root / "even")
    generator = torch.Generator().manual_seed(0)

    def draw(tensors: dict[str, torch.Tensor]) -> None:
        for key, tensor in tensors.items():
            size = 0.13 + 0.11 * torch.rand(tensor.shape, generator=generator)
            tensors[key] = (torch.where(tensor < 0, -size, size)).to(tensor.dtype)

    for file in (root / "even").glob("*.safetensors"):
        edit_tensors(file, draw)
    return root / "even"


@pytest.fixture(scope="module")
def fp8(root: Path, base: Path) -> Path:
    """Blocks of 8 rows: 34 rows of kv_a_proj_with_mqa have 5 rows of scales, which fit blocks of 7 as well."""
    return make_fp8(base, root / "fp8", (8, 16))
