"""Writing shards, and files that appear whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mla_tune.checkpoint.files import replacing, write_json
from mla_tune.checkpoint.index import TensorRef, read_shard
from mla_tune.checkpoint.shards import read_raw, read_tensor, same_bits, write_index, write_shard
from mla_tune.errors import FileError

# Not in the order in which the safetensors library would write them.
TENSORS = {
    "z": torch.randn(3, 5).bfloat16(),
    "a": torch.randn(2, 7),
    "m": torch.randn(4).half(),
    "b": torch.randn(1, 2, 3).double(),
}
LAYOUT = {
    "z": ("BF16", (3, 5)),
    "codes": ("F8_E4M3", (2, 2)),
    "a": ("F32", (2, 7)),
    "m": ("F16", (4,)),
    "b": ("F64", (1, 2, 3)),
}


@pytest.fixture
def codes(tmp_path: Path) -> TensorRef:
    save_file({"codes": torch.tensor([[1.0, 2], [3, 4]]).to(torch.float8_e4m3fn)}, tmp_path / "codes.safetensors")
    return read_shard(tmp_path / "codes.safetensors").tensors["codes"]


def test_round_trip_through_the_safetensors_library(tmp_path: Path, codes: TensorRef) -> None:
    file = tmp_path / "out.safetensors"
    sizes: list[int] = []
    tensors = (codes if key == "codes" else TENSORS[key] for key in LAYOUT)
    write_shard(file, LAYOUT, tensors, {"format": "pt", "note": "ü"}, sizes.append)
    loaded = load_file(file)
    for key, tensor in TENSORS.items():
        assert same_bits(loaded[key], tensor), key
    assert loaded["codes"].float().tolist() == [[1, 2], [3, 4]]
    with safe_open(file, "pt") as reader:
        assert reader.metadata() == {"format": "pt", "note": "ü"}
    shard = read_shard(file)
    assert list(shard.tensors) == list(LAYOUT), "the order of the data is that of the layout"
    assert shard.tensors["z"].begin % 8 == 0
    assert sizes == [30, 4, 56, 8, 48]
    assert same_bits(read_tensor(shard.tensors["b"]), TENSORS["b"])


def test_a_tensor_that_is_not_contiguous_is_written_row_major(tmp_path: Path) -> None:
    tensor = torch.randn(3, 4).T
    write_shard(tmp_path / "t.safetensors", {"t": ("F32", (4, 3))}, [tensor], {})
    assert torch.equal(load_file(tmp_path / "t.safetensors")["t"], tensor)
    assert read_shard(tmp_path / "t.safetensors").metadata == {}


def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "out.safetensors"
    file.write_text("old")

    def broken() -> Iterator[torch.Tensor]:
        yield TENSORS["z"]
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        write_shard(file, {"z": LAYOUT["z"], "a": LAYOUT["a"]}, broken(), {})
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.safetensors"]


def test_a_tensor_too_few_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shorter"):
        write_shard(tmp_path / "out.safetensors", LAYOUT, [TENSORS["z"]], {})
    assert not list(tmp_path.iterdir())


def test_replacing_swaps_whole_files(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"old")
    with replacing(file) as stream:
        stream.write(b"new")
        assert file.read_bytes() == b"old"
    assert file.read_bytes() == b"new"


def test_json_without_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "r.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_index_counts_bytes_and_keeps_what_else_it_said(tmp_path: Path) -> None:
    old = {"metadata": {"total_size": 3, "total_parameters": 30}, "weight_map": {"x": "y"}, "other": 1}
    write_index(tmp_path, {"b": "1.safetensors", "a": "2.safetensors"}, 60, old)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 60, "total_parameters": 30},
        "weight_map": {"b": "1.safetensors", "a": "2.safetensors"},
        "other": 1,
    }
    assert list(index["weight_map"]) == ["b", "a"]


def test_files_that_change_while_they_are_read_are_noticed(codes: TensorRef) -> None:
    codes.file.write_bytes(codes.file.read_bytes()[:-1])
    with pytest.raises(FileError, match="ends within 'codes'"):
        list(read_raw(codes))
    with pytest.raises(FileError, match="can't be read"):
        read_tensor(codes)
    save_file({"codes": torch.zeros(9)}, codes.file)
    with pytest.raises(FileError, match=r"is now \(9,\), it was \(2, 2\)"):
        read_tensor(codes)


def test_same_bits() -> None:
    nan = torch.tensor([float("nan")])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2).bfloat16())
    assert not same_bits(torch.zeros(2, 1), torch.zeros(1, 2))
