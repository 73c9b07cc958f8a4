"""Weights in and out of safetensors files, one tensor at a time.

The safetensors library writes a file from tensors that are all in memory, and sorts the keys.  The writer here takes
them one by one and keeps the order, so that a shard of any size is merged with one tensor in memory and the tensors
that do not change are copied byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mla_tune.checkpoint.files import replacing, write_json
from mla_tune.checkpoint.index import INDEX_FILE, TensorRef, tensor_bytes
from mla_tune.errors import FileError

#: Floating-point dtypes of the format that are computed with.
FLOATS: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_NAMES = {dtype: name for name, dtype in FLOATS.items()}
#: Bytes copied at once.
_CHUNK = 1 << 24

#: Key → (dtype of the format, shape), in the order in which the data is written.
Layout = Mapping[str, tuple[str, tuple[int, ...]]]


def read_tensor(ref: TensorRef) -> torch.Tensor:
    """The tensor on the CPU, in its own dtype.  Raises `FileError` where the file has changed since it was opened."""
    try:
        with safe_open(ref.file, framework="pt", device="cpu") as file:
            tensor = file.get_tensor(ref.key)
    except (SafetensorError, OSError) as error:
        raise FileError(f"{ref.file}: '{ref.key}' can't be read: {error}") from error
    if tuple(tensor.shape) != ref.shape:
        raise FileError(f"{ref.file}: '{ref.key}' is now {tuple(tensor.shape)}, it was {ref.shape}: the file changed")
    return tensor


def read_raw(ref: TensorRef) -> Iterator[bytes]:
    """The bytes of a tensor of any dtype, in chunks."""
    with ref.file.open("rb") as stream:
        stream.seek(ref.begin)
        left = ref.nbytes
        while left:
            chunk = stream.read(min(left, _CHUNK))
            if not chunk:
                raise FileError(f"{ref.file}: ends within '{ref.key}': the file changed while it was read")
            left -= len(chunk)
            yield chunk


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor as the format stores them: row-major, little-endian."""
    # A view as bytes needs at least one dimension, and numpy knows no bfloat16.
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes: a NaN equals itself, and 0 differs from -0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def format_dtype(tensor: torch.Tensor) -> str:
    """The format's name of a floating-point tensor's dtype."""
    return _NAMES[tensor.dtype]


def write_shard(
    file: Path,
    layout: Layout,
    tensors: Iterable[torch.Tensor | TensorRef],
    metadata: Mapping[str, str],
    written: Callable[[int], None] | None = None,
) -> None:
    """Write a safetensors file, whole or not at all, with its keys in the order of `layout`.

    `tensors` gives them in that order, each when its turn comes: a tensor of the dtype and shape in the layout, or a
    `TensorRef` whose bytes are copied.  `written` is told the bytes of each tensor.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key, (dtype, shape) in layout.items():
        begin, end = end, end + tensor_bytes(dtype, shape)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # the data starts at a multiple of 8 bytes
    with replacing(file) as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for (key, (dtype, shape)), data in zip(layout.items(), tensors, strict=True):
            if isinstance(data, TensorRef):
                assert (data.dtype, data.shape) == (dtype, shape), key
                for chunk in read_raw(data):
                    stream.write(chunk)
            else:
                assert (format_dtype(data), tuple(data.shape)) == (dtype, shape), key
                stream.write(raw_bytes(data))
            if written:
                written(tensor_bytes(dtype, shape))


def write_index(folder: Path, weight_map: Mapping[str, str], total_size: int, old: Mapping[str, Any] | None) -> None:
    """Write the index: key → file name, and `total_size`, the bytes of all tensors (a byte count, never a tensor
    count).  Other entries of the `old` index are kept."""
    document = dict(old or {})
    document["metadata"] = {**document.get("metadata", {}), "total_size": total_size}
    document["weight_map"] = dict(weight_map)
    write_json(folder / INDEX_FILE, document)
