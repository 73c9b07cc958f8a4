"""Reading headers: good files as by the safetensors library, damaged ones with an error that names the damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mla_tune.checkpoint.index import Checkpoint, nearest, read_shard
from mla_tune.errors import FileError, InputError

TENSORS = {
    "b.weight": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "a.weight": torch.arange(8, dtype=torch.float32).view(4, 2),
    "codes": torch.zeros(3, 5, dtype=torch.float8_e4m3fn),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.zeros(0, 4),
}
Header = dict[str, Any]


def single(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(TENSORS, folder / "model.safetensors", metadata={"format": "pt", "note": "größe"})
    (folder / "config.json").write_text('{"model_type": "x"}')
    return folder


def sharded(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    halves = [{"a": torch.zeros(2, 3), "b": torch.ones(4)}, {"c": torch.zeros(5)}]
    weight_map = {}
    for i, tensors in enumerate(halves, 1):
        save_file(tensors, folder / f"model-{i}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_one_file_agrees_with_the_safetensors_library(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(single(tmp_path))
    file = tmp_path / "model.safetensors"
    raw = file.read_bytes()
    with safe_open(file, "pt") as reference:
        assert set(checkpoint.tensors) == set(reference.keys())
        assert checkpoint.shards[0].metadata == reference.metadata()
        for key, ref in checkpoint.tensors.items():
            tensor = reference.get_tensor(key)
            assert ref.shape == tuple(tensor.shape)
            assert ref.nbytes == tensor.numel() * tensor.element_size()
            assert raw[ref.begin : ref.end] == bytes(tensor.flatten().view(torch.uint8).numpy())
    assert checkpoint.tensors["codes"].dtype == "F8_E4M3"
    assert checkpoint.nbytes == 12 + 32 + 15 + 8
    assert checkpoint.config == {"model_type": "x"}


def test_shards_by_index(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(sharded(tmp_path))
    assert list(checkpoint.tensors) == ["a", "b", "c"]
    assert [shard.file.name for shard in checkpoint.shards] == ["model-1.safetensors", "model-2.safetensors"]
    assert checkpoint["c"].file.name == "model-2.safetensors"
    assert checkpoint["c"].shape == (5,)


def test_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no tensor 'a\.weigth'; did you mean 'a\.weight'\?"):
        Checkpoint.open(single(tmp_path))["a.weigth"]


def test_the_nearest_key_has_the_same_ending() -> None:
    keys = [f"model.layers.{i}.mlp.experts.{e}.up_proj.weight" for i in range(50) for e in range(200)]
    hint = nearest("model.layer.3.self_attn.o_proj.weight", [*keys, "model.layers.3.self_attn.o_proj.weight"])
    assert hint == "; did you mean 'model.layers.3.self_attn.o_proj.weight'?"


def rewrite(file: Path, change: Callable[[Header], Any]) -> None:
    """Edit the JSON header and leave the data as it is."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    changed = json.dumps(header).encode()
    file.write_bytes(len(changed).to_bytes(8, "little") + changed + raw[8 + length :])


def set_entry(key: str, **values: Any) -> Callable[[Header], None]:
    return lambda header: header[key].update(values)


DAMAGE: dict[str, tuple[Callable[[Header], Any], str]] = {
    "shape and bytes differ": (set_entry("a.weight", shape=[4, 3]), r"'a\.weight' is F32 \[4, 3\], but its offsets"),
    "dtype and bytes differ": (set_entry("a.weight", dtype="BF16"), r"'a\.weight' is BF16 \[4, 2\]"),
    "unknown dtype": (set_entry("a.weight", dtype="F3"), r"dtype 'F3', which is not known here; known: F64"),
    "negative shape": (set_entry("a.weight", shape=[-4, -2]), "are impossible"),
    "offsets backwards": (set_entry("a.weight", data_offsets=[32, 0]), "are impossible"),
    "no offsets": (lambda h: h["a.weight"].pop("data_offsets"), "lacks dtype, shape or data_offsets"),
    "beyond the end": (set_entry("b.weight", data_offsets=[4000, 4012]), "leaves a hole before it"),
    "overlap": (set_entry("b.weight", data_offsets=[0, 12]), "overlaps the tensor before it"),
    "a tensor less": (lambda h: h.pop("codes"), "the header describes|leaves a hole"),
    "metadata no strings": (lambda h: h["__metadata__"].update(x=1), "'__metadata__' is not a table of strings"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_header_is_refused(case: str, tmp_path: Path) -> None:
    change, words = DAMAGE[case]
    file = single(tmp_path) / "model.safetensors"
    rewrite(file, change)
    with pytest.raises(FileError, match=words) as error:
        Checkpoint.open(tmp_path)
    assert str(error.value).startswith(f"{file}: ")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "announce a header of 0 bytes in 0 bytes"),
        (b"\x10\0\0", "announce a header"),
        ((1 << 40).to_bytes(8, "little") + b"{}", r"announce a header of 1,099,511,627,776 bytes"),
        ((2).to_bytes(8, "little") + b"{]", "not valid JSON"),
        ((3).to_bytes(8, "little") + b"[1]", "not a JSON object"),
        ((4).to_bytes(8, "little") + b"\xff\xfe\0\0", "not valid JSON"),
        ((50_000).to_bytes(8, "little") + b"[" * 50_000, "not valid JSON"),
        ((62).to_bytes(8, "little") + b'{"a":1,"a":2}' + b" " * 49, "a key appears twice"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(FileError, match=words):
        Checkpoint.open(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    file = single(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(FileError, match=r"damaged or incomplete: the header describes .* the file has"):
        read_shard(file)


def edit_index(folder: Path, **weight_map: Any) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] |= weight_map
    file.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "entry, words",
    [
        ({"c": "model-9.safetensors"}, r"'c' is in model-9\.safetensors, which is missing: the download"),
        ({"c": "../model-2.safetensors"}, "outside the folder"),
        ({"c": "/etc/model.safetensors"}, "outside the folder"),
        ({"c": "config.json"}, "not a safetensors file"),
        ({"c": 3}, "points at 3"),
        ({"d": "model-2.safetensors"}, r"'d' should be in model-2\.safetensors, which does not hold it"),
    ],
)
def test_an_index_that_lies_is_refused(entry: dict[str, Any], words: str, tmp_path: Path) -> None:
    edit_index(sharded(tmp_path), **entry)
    with pytest.raises(FileError, match=words) as error:
        Checkpoint.open(tmp_path)
    assert "model.safetensors.index.json" in str(error.value)


def test_a_second_copy_of_a_tensor_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"c": torch.zeros(5), "a": torch.zeros(2, 3)}, tmp_path / "model-2.safetensors")
    with pytest.raises(FileError, match=r"'a' is in model-1\.safetensors and in model-2\.safetensors too"):
        Checkpoint.open(tmp_path)


def test_a_key_that_the_index_leaves_out_stays_in_its_shard(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"c": torch.zeros(5), "extra": torch.zeros(1)}, tmp_path / "model-2.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert "extra" not in checkpoint.tensors
    assert "extra" in checkpoint.shards[1].tensors


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}}', "{}"])
def test_a_damaged_index_is_refused(text: str, tmp_path: Path) -> None:
    (sharded(tmp_path) / "model.safetensors.index.json").write_text(text)
    with pytest.raises(FileError, match=r"index\.json: "):
        Checkpoint.open(tmp_path)


def test_folders_that_hold_no_safetensors_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such folder"):
        Checkpoint.open(tmp_path / "nothing")
    with pytest.raises(FileError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds pytorch_model\.bin but no model\.safetensors.*can run code"):
        Checkpoint.open(tmp_path)


def test_two_checkpoints_in_one_folder_are_refused(tmp_path: Path) -> None:
    single(sharded(tmp_path))
    with pytest.raises(InputError, match=r"holds both model\.safetensors and an index of other files"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "text, words", [(None, "no such file"), ("{", "not valid JSON"), ("[1]", "must hold a JSON object, not a list")]
)
def test_config_errors(text: str | None, words: str, tmp_path: Path) -> None:
    config = single(tmp_path) / "config.json"
    config.unlink()
    if text is not None:
        config.write_text(text)
    with pytest.raises(FileError, match=rf"config\.json:.*{words}"):
        _ = Checkpoint.open(tmp_path).config
