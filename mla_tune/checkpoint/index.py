"""Read the safetensors headers of a checkpoint folder: which tensor lies where.  No weight is read.

Format (https://github.com/huggingface/safetensors#format): 8 bytes, little-endian, give the length N of a JSON header;
N bytes of JSON, {key: {dtype, shape, data_offsets: [begin, end]}}; then the data, in row-major order, without holes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

from mla_tune.checkpoint.pickles import convert_folder_command
from mla_tune.errors import FileError, InputError, did_you_mean
from mla_tune.user_files import read_json_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

#: dtype of the safetensors format → bits of one number.
DTYPE_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

#: The longest header that the safetensors library itself accepts.
_MAX_HEADER = 100_000_000
#: Endings of weight files in other formats, which are not read.
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of the data of a tensor with this dtype and shape."""
    return prod(shape) * DTYPE_BITS[dtype] // 8


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a tensor seen as a matrix: the last dimension is the columns; a vector is one row."""
    return prod(shape[:-1]), shape[-1] if shape else 1


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where one tensor lies in a safetensors file."""

    key: str
    """Its name in the file."""
    file: Path
    """The safetensors file."""
    dtype: str
    """Its dtype, as the format names it ("BF16")."""
    shape: tuple[int, ...]
    """Its shape."""
    begin: int
    """Byte at which its data begins, from the start of the file."""
    end: int
    """Byte after its data."""

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Stamp:
    """The properties of a file that change when it is written to or replaced."""

    size: int
    """Bytes."""
    mtime_ns: int
    """Time of the last change, in nanoseconds."""
    inode: int
    """Number of the inode: another one after the file was replaced."""

    @classmethod
    def read(cls, file: Path) -> Stamp:
        """Read them from the file system.  Raises `FileError` for a file that can't be read."""
        try:
            stat = file.stat()
        except OSError as error:
            raise FileError(f"{file}: can't be read: {error.strerror}") from error
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ino)


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file, as its header describes it."""

    file: Path
    """The file."""
    tensors: dict[str, TensorRef]
    """Its tensors by key, in the order of their data."""
    metadata: dict[str, str]
    """The `__metadata__` of the header."""
    header_sha256: str
    """Digest of the header."""
    stamp: Stamp
    """The file's properties when the header was read."""

    def check_unchanged(self) -> None:
        """Raise `FileError` if the file was written to or replaced since its header was read."""
        if Stamp.read(self.file) != self.stamp:
            raise FileError(f"{self.file}: changed while it was in use: wait until nothing writes to it, and run again")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder in Hugging Face's layout."""

    folder: Path
    """The folder."""
    shards: tuple[Shard, ...]
    """Its safetensors files."""
    tensors: dict[str, TensorRef]
    """Its tensors by key, in the order of the index, or of the single file."""
    index: dict[str, Any] | None
    """The parsed index; None for a single file without one."""

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read and check all headers of `folder`.

        Raises `FileError` for a folder, file or index that is missing or damaged and `InputError` for a folder whose
        weights are not in safetensors files.
        """
        if not folder.is_dir():
            raise FileError(f"{folder}: no such folder: a model folder with config.json and *.safetensors was expected")
        single, index_file = folder / SINGLE_FILE, folder / INDEX_FILE
        if index_file.exists():
            index = read_json_object(index_file, "the index of the checkpoint", unique=True)
            weight_map = _weight_map(index_file, index)
            if single.exists() and set(weight_map.values()) != {SINGLE_FILE}:
                raise InputError(
                    f"{folder}: holds both {SINGLE_FILE} and an index of other files, and programs differ in which one "
                    "they read: remove the one that does not belong to the model"
                )
            shards = tuple(read_shard(folder / name) for name in dict.fromkeys(weight_map.values()))
            return cls(folder, shards, _indexed(index_file, weight_map, shards), index)
        if single.exists():
            shard = read_shard(single)
            return cls(folder, (shard,), dict(shard.tensors), None)
        raise _no_weights(folder)

    def __getitem__(self, key: str) -> TensorRef:
        """The tensor with this key.  Raises `InputError` with the most similar key where there is none."""
        if key not in self.tensors:
            raise InputError(f"{self.folder}: the checkpoint has no tensor '{key}'{nearest(key, self.tensors)}")
        return self.tensors[key]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The parsed config.json.  Raises `FileError` where it is missing or damaged."""
        return read_json_object(self.folder / "config.json", "the model's configuration")

    def name(self, shard: Shard) -> str:
        """The shard's path relative to the folder, as the index writes it."""
        return shard.file.relative_to(self.folder).as_posix()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(ref.nbytes for shard in self.shards for ref in shard.tensors.values())


def nearest(key: str, keys: Iterable[str]) -> str:
    """The end of an error message about an unknown tensor key: `"; did you mean '…'?"`, or nothing."""
    # Comparing with all 100,000 keys of a large model would take minutes.
    names, parts = list(keys), key.split(".")
    parents, ending = ".".join(parts[:-2]), ".".join(parts[-2:])
    alike = [name for name in names if name.endswith(ending) or (parents and name.startswith(parents))]
    return did_you_mean(key, (alike or names)[:2000])


def _no_weights(folder: Path) -> InputError | FileError:
    """The error for a folder without safetensors files, which says how to get them."""
    others = sorted(p.name for p in folder.iterdir() if p.suffix in _OTHER_FORMATS)
    if others:
        what = f"{folder}: holds {others[0]} but no {SINGLE_FILE}: only safetensors checkpoints are read"
        if others[0].startswith("pytorch_model") and others[0].endswith(".bin"):
            return InputError(
                f"{what}, since opening a pickle can run code. Download the model's safetensors version, or convert "
                f"it, without running code from it, by\n  {convert_folder_command(folder)}"
            )
        return InputError(f"{what}. Download the model's safetensors version")
    return FileError(f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}: not a complete model folder")


def _weight_map(index_file: Path, index: dict[str, Any]) -> dict[str, str]:
    """Key → file name of the index.  Raises `FileError` for names outside the folder and for missing files."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileError(f"{index_file}: has no 'weight_map' from keys to files: the index is damaged")
    seen: set[str] = set()
    for key, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise FileError(f"{index_file}: '{key}' points at {name!r}, which is not a safetensors file")
        if name in seen:
            continue
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            raise FileError(f"{index_file}: '{key}' points at {name!r}, outside the folder")
        if not (index_file.parent / name).is_file():
            raise FileError(
                f"{index_file}: '{key}' is in {name}, which is missing: the download or copy is not complete"
            )
        seen.add(name)
    return weight_map


def _indexed(index_file: Path, weight_map: dict[str, str], shards: tuple[Shard, ...]) -> dict[str, TensorRef]:
    """The tensors that the index lists.  Raises `FileError` where the files do not hold what it says."""
    by_name = {str(shard.file.relative_to(index_file.parent).as_posix()): shard for shard in shards}
    for shard_name, shard in by_name.items():
        for key in shard.tensors:
            # A merge copies a key that the index does not list; of a listed key it would leave a second copy unmerged.
            if weight_map.get(key, shard_name) != shard_name:
                raise FileError(f"{index_file}: '{key}' is in {weight_map[key]} and in {shard_name} too: remove one")
    tensors = {}
    for key, name in weight_map.items():
        if key not in by_name[name].tensors:
            raise FileError(
                f"{index_file}: '{key}' should be in {name}, which does not hold it: "
                "the index and the files are of different versions"
            )
        tensors[key] = by_name[name].tensors[key]
    return tensors


def read_shard(file: Path) -> Shard:
    """Read and check the header of one safetensors file.  Raises `FileError` for a missing or damaged file."""
    stamp = Stamp.read(file)
    size = stamp.size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise _damaged(file, f"its first 8 bytes announce a header of {length:,} bytes in {size:,} bytes")
            raw = stream.read(length)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{file}: can't be read: {error.strerror}") from error
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(file, "its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(file, "its '__metadata__' is not a table of strings")
    start = 8 + length
    refs = sorted((_ref(file, start, k, v) for k, v in header.items()), key=lambda ref: (ref.begin, ref.end))
    expected = start
    for ref in refs:
        if ref.begin != expected:
            what = "overlaps the tensor before it" if ref.begin < expected else "leaves a hole before it"
            raise _damaged(file, f"the data of '{ref.key}' {what}")
        expected = ref.end
    if expected != size:
        raise _damaged(file, f"the header describes {expected:,} bytes, the file has {size:,}")
    digest = hashlib.sha256(raw).hexdigest()
    return Shard(file, {ref.key: ref for ref in refs}, metadata, digest, stamp)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dictionary.  Raises `ValueError` for a key that comes twice, which `json` would accept."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _ref(file: Path, start: int, key: str, entry: Any) -> TensorRef:
    """Parse one entry of a header; `start` is where the file's data begins.  Raises `FileError` if it is malformed."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise _damaged(file, f"the entry of '{key}' lacks dtype, shape or data_offsets")
    if dtype not in DTYPE_BITS:
        known = ", ".join(DTYPE_BITS)
        raise FileError(f"{file}: '{key}' has the dtype {dtype!r}, which is not known here; known: {known}")
    if not all(isinstance(n, int) and n >= 0 for n in shape) or not 0 <= begin <= end:
        raise _damaged(file, f"the shape {shape} or the offsets [{begin}, {end}] of '{key}' are impossible")
    if (end - begin) * 8 != prod(shape) * DTYPE_BITS[dtype]:
        raise _damaged(file, f"'{key}' is {dtype} {shape}, but its offsets give it {end - begin:,} bytes")
    return TensorRef(key, file, dtype, tuple(shape), start + begin, start + end)


def _damaged(file: Path, what: str) -> FileError:
    return FileError(f"{file}: damaged or incomplete: {what}. Download or save it again")
