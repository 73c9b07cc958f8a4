"""Read rows of a tensor out of a safetensors file into numpy.

Files are read, not mapped into memory: mapped pages would count as memory of the process.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np

from mla_tune.checkpoint.dtypes import STORAGE, decode
from mla_tune.checkpoint.index import TensorRef
from mla_tune.errors import FileError

#: Bytes that are hashed at once.
_CHUNK = 1 << 22


def read_raw(ref: TensorRef, begin: int = 0, end: int | None = None) -> np.ndarray:
    """Read the stored codes of [begin, end) of the first dimension, by default all: BF16 as uint16, FP8 as uint8.

    Raises `FileError` where the file has become shorter or can't be read.
    """
    kind = STORAGE[ref.dtype]
    if not ref.shape:
        shape, offset = (), 0
    else:
        rows = ref.shape[0]
        end = rows if end is None else end
        assert 0 <= begin <= end <= rows, f"rows {begin}:{end} of {ref.shape}"
        shape = (end - begin, *ref.shape[1:])
        offset = begin * (ref.nbytes // rows) if rows else 0
    array = np.empty(shape, kind)
    read_into(ref, array, offset)
    return array


def read_into(ref: TensorRef, array: np.ndarray, offset: int = 0) -> None:
    """Fill a C-contiguous array with bytes of the tensor, from byte `offset` of its data on."""
    if array.size:
        fill(ref, array.reshape(-1).view(np.uint8).data, offset)


def sha256(ref: TensorRef) -> str:
    """Digest of a tensor's stored bytes."""
    digest, buffer = hashlib.sha256(), np.empty(min(_CHUNK, ref.nbytes), np.uint8)
    for begin in range(0, ref.nbytes, _CHUNK):
        piece = buffer[: min(_CHUNK, ref.nbytes - begin)]
        read_into(ref, piece, begin)
        digest.update(piece.data)
    return digest.hexdigest()


def fill(ref: TensorRef, view: memoryview, offset: int = 0) -> None:
    """Fill `view` with bytes of the tensor, from byte `offset` of its data on.

    Raises `FileError` where the file has become shorter or can't be read.
    """
    assert offset + len(view) <= ref.nbytes
    try:
        handle = os.open(ref.file, os.O_RDONLY)
        try:
            done = 0
            while done < len(view):
                count = os.preadv(handle, [view[done:]], ref.begin + offset + done)
                if count == 0:
                    raise FileError(f"{ref.file}: ends within '{ref.key}': the file changed while it was read")
                done += count
        finally:
            os.close(handle)
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{ref.file}: '{ref.key}' can't be read: {error.strerror}") from error


def read_float(ref: TensorRef, float_type: type = np.float32) -> np.ndarray:
    """Read the whole tensor as floats."""
    return decode(read_raw(ref), ref.dtype, float_type)
