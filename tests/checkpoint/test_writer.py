"""Writing and reading safetensors files, compared with the safetensors library."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mla_tune.checkpoint.writer as writer_module
from mla_tune.checkpoint.atomic_files import replacing, write_json
from mla_tune.checkpoint.index import read_shard
from mla_tune.checkpoint.tensor_io import read_float, read_raw
from mla_tune.checkpoint.writer import ShardWriter
from mla_tune.errors import FileError

LAYOUT = {"z": ("BF16", (3, 5)), "a": ("F32", (2,)), "scalar": ("F32", ()), "empty": ("F32", (0, 4))}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file with the tensors z, a, scalar and codes, saved by the library."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "z": torch.randn(3, 5, generator=generator).bfloat16(),
        "a": torch.randn(2, generator=generator),
        "scalar": torch.tensor(3.5),
        "codes": torch.arange(12, dtype=torch.uint8).view(3, 4).view(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "source.safetensors")
    return tmp_path / "source.safetensors"


def write_all(file: Path, source: Path) -> None:
    refs = read_shard(source).tensors
    with ShardWriter(file, LAYOUT, {"format": "pt", "note": "ü"}) as writer:
        z = read_raw(refs["z"])
        writer.write("z", z[2:], z[:2].nbytes)  # any order, any part
        writer.write("scalar", read_raw(refs["scalar"]))
        writer.copy("a", refs["a"], refs["a"].nbytes)
        writer.write("z", z[:2])


def test_the_library_reads_what_was_written(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    write_all(out, source)
    written, tensors = load_file(out), load_file(source)
    assert torch.equal(written["z"], tensors["z"])
    assert torch.equal(written["a"], tensors["a"])
    assert written["scalar"] == 3.5
    assert written["empty"].shape == (0, 4)
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "ü"}
    assert list(read_shard(out).tensors)[:2] == ["z", "a"], "the order is that of the layout"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.safetensors", "source.safetensors"]


def test_copies_where_the_kernel_cannot(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    write_all(tmp_path / "kernel.safetensors", source)
    monkeypatch.setattr(writer_module.os, "copy_file_range", refuse, raising=False)
    write_all(tmp_path / "plain.safetensors", source)
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "kernel.safetensors").read_bytes()


def test_a_failure_leaves_the_old_file_and_nothing_beside_it(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"old")

    def fail() -> None:
        with ShardWriter(out, LAYOUT, {}) as writer:
            writer.write("a", np.zeros(2, np.float32))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert out.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.safetensors", "source.safetensors"]


def test_too_many_bytes_are_a_fault_of_the_program(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a: "), ShardWriter(tmp_path / "out.safetensors", LAYOUT, {}) as writer:
        writer.write("a", np.zeros(3, np.float32))


def test_rows_of_a_tensor(source: Path) -> None:
    refs, tensors = read_shard(source).tensors, load_file(source)
    np.testing.assert_array_equal(read_raw(refs["codes"], 1, 3), np.arange(4, 12, dtype=np.uint8).reshape(2, 4))
    np.testing.assert_array_equal(read_float(refs["z"]), tensors["z"].float().numpy())
    assert read_float(refs["scalar"]) == 3.5
    assert read_raw(refs["z"], 3).shape == (0, 5)


def test_files_that_change_while_they_are_read_are_noticed(source: Path, tmp_path: Path) -> None:
    refs = read_shard(source).tensors
    last = max(refs.values(), key=lambda ref: ref.end)
    os.truncate(source, last.end - 1)
    with pytest.raises(FileError, match=f"ends within '{last.key}'"):
        read_raw(last)

    def copy() -> None:
        with ShardWriter(tmp_path / "o.safetensors", {last.key: (last.dtype, last.shape)}, {}) as writer:
            writer.copy(last.key, last, last.nbytes)

    with pytest.raises(FileError, match=f"ends within '{last.key}'"):
        copy()
    source.unlink()
    with pytest.raises(FileError, match="can't be read"):
        read_raw(last)


def test_a_shard_knows_when_its_file_has_changed(source: Path) -> None:
    shard = read_shard(source)
    shard.check_unchanged()
    source.write_bytes(source.read_bytes())
    with pytest.raises(FileError, match="changed while it was in use"):
        shard.check_unchanged()


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
