"""Write one safetensors file, tensor by tensor in any order; it appears complete or not at all.

The safetensors library needs all tensors in memory and sorts the keys.  Here the layout is known beforehand, threads
write bytes to their places in any order, and nothing of the file stays in memory.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mla_tune.checkpoint.atomic_files import sync_folder
from mla_tune.checkpoint.index import TensorRef, tensor_bytes
from mla_tune.errors import FileError

#: Key → (dtype of the format, shape), in the order in which the data lies.
TensorLayout = Mapping[str, tuple[str, tuple[int, ...]]]
#: Bytes that are copied in one call: other threads run between calls.
_CHUNK = 1 << 26
#: Errors with which the kernel refuses to copy between two files that reading and writing can copy.
_NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM)


def header_bytes(layout: TensorLayout, metadata: Mapping[str, str]) -> bytes:
    """The bytes before the data: the length of the header, and the header, padded to a multiple of 8 bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key, (dtype, shape) in layout.items():
        begin, end = end, end + tensor_bytes(dtype, shape)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


class ShardWriter:
    """Writes a file beside `file`, and renames it when it is complete.

    Used as a context manager, it commits at the end of the block, and discards where the block raises.
    """

    def __init__(self, file: Path, layout: TensorLayout, metadata: Mapping[str, str]) -> None:
        self.file = file
        self._partial = file.with_name(f".{file.name}.partial")
        raw = header_bytes(layout, metadata)
        self._begin: dict[str, int] = {}
        self._nbytes = {key: tensor_bytes(*entry) for key, entry in layout.items()}
        end = len(raw)
        for key, nbytes in self._nbytes.items():
            self._begin[key] = end
            end += nbytes
        self.nbytes = end
        self._handle = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.ftruncate(self._handle, end)
            self._put(memoryview(raw), 0)
        except BaseException:
            self.discard()
            raise

    def write(self, key: str, data: np.ndarray | memoryview, offset: int = 0) -> None:
        """Write `data` (C-contiguous) into the tensor `key`, from byte `offset` of it on."""
        view = data.reshape(-1).view(np.uint8).data if isinstance(data, np.ndarray) else data
        assert offset + len(view) <= self._nbytes[key], f"{key}: {offset} + {len(view)} of {self._nbytes[key]} bytes"
        self._put(view, self._begin[key] + offset)

    def copy(self, key: str, source: TensorRef, nbytes: int, copied: Callable[[int], None] = lambda _: None) -> None:
        """Copy `nbytes` from the beginning of `source` to the beginning of `key`.

        These may be several tensors, if they follow each other in both files.  `copied` is called with the bytes of
        each step.  Raises `FileError` where the source ends too early.
        """
        begin = self._begin[key]
        assert begin + nbytes <= self.nbytes
        handle = os.open(source.file, os.O_RDONLY)
        try:
            done = 0
            while done < nbytes:
                step = min(nbytes - done, _CHUNK)
                count = _copy_range(handle, self._handle, step, source.begin + done, begin + done)
                if count == 0:
                    raise FileError(f"{source.file}: ends within '{source.key}': the file changed while it was read")
                done += count
                copied(count)
        finally:
            os.close(handle)

    def commit(self) -> None:
        """Flush the file to the disk and give it its name."""
        os.fsync(self._handle)
        os.close(self._handle)
        self._handle = -1
        os.replace(self._partial, self.file)
        sync_folder(self.file.parent)

    def discard(self) -> None:
        """Delete what was written beside `file`, unless it was committed."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.commit()
        else:
            self.discard()

    def _put(self, view: memoryview, position: int) -> None:
        while view:
            count = os.pwrite(self._handle, view, position)
            view, position = view[count:], position + count


def _copy_range(source: int, target: int, count: int, source_at: int, target_at: int) -> int:
    """Copy bytes between two files inside the kernel where it can (Linux), else through memory; return how many."""
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, target, count, source_at, target_at)
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
    data = os.pread(source, min(count, 1 << 24), source_at)
    return os.pwrite(target, data, target_at)
