"""The interface of a checkpoint format: `QuantFormat`, and `QuantizedTensor`, one quantized weight.

    QuantFormat       finds its weights in a checkpoint, decodes and encodes rows
    QuantizedTensor   says where the codes and scales of one weight lie

`sockets.QUANT_FORMATS` holds the formats by name.  Planning, merging, absorption and reports ask the format: no other
code knows how codes become numbers.  Two rooms have a second implementation under the same names: the proof has its own
decoders (`verification.decoders.DECODERS`), and models in memory have their own layers (`model.quantized_linear`).

A row is a row of the matrix (out, in).  A format may pack several numbers of a row into one stored element, but an
element must not hold numbers of two rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mla_tune.checkpoint.index import Checkpoint, TensorRef


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """Where the codes and scales of one quantized weight lie.  It holds no numbers."""

    format: QuantFormat
    """The format that decodes it."""
    codes: TensorRef
    """The codes, with as many rows as the weight: (out, …) or, for stacked experts, (E, out, …)."""
    scales: tuple[TensorRef, ...]
    """The tensors that decoding needs beside the codes and that a merge writes anew with them: one tensor of scales, or
    several (NVFP4 has block scales and a global scale).  The format decides on their order, dtypes and shapes."""
    block: tuple[int, int] | None = None
    """Rows and columns of the block of an (out, in) matrix that shares a scale: (1, in) for one scale a row; None for
    one scale for the whole matrix."""
    power_of_two: bool = False
    """Whether scales must be powers of two (UE8M0)."""
    extra_keys: tuple[str, ...] = ()
    """Keys of further tensors of the quantized layer, which decoding does not need (scales of static activations, the
    shape of packed codes).  A merge copies them as they are while the weight stays quantized."""
    weight_key: str = ""
    """Key of the weight in an unquantized checkpoint; empty where it is the key of the codes."""
    weight_shape: tuple[int, ...] = ()
    """Shape of the numbers, (out, in) or (E, out, in); empty where it is the shape of the codes."""

    @property
    def key(self) -> str:
        """Key of the weight in an unquantized checkpoint."""
        return self.weight_key or self.codes.key

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the numbers: (out, in) or (E, out, in)."""
        return self.weight_shape or self.codes.shape

    @property
    def scale(self) -> TensorRef:
        """The only tensor of scales, for a format that has one."""
        (scale,) = self.scales
        return scale

    @property
    def dependent_keys(self) -> tuple[str, ...]:
        """Keys of the tensors that are left out of a checkpoint in which the weight is not quantized any more."""
        return (*(scale.key for scale in self.scales), *self.extra_keys)


class QuantFormat(ABC):
    """A way to store weights in fewer bits.  Instances hold no state: many threads use one at once."""

    name: str
    """The format's name in `sockets.QUANT_FORMATS`, in reports and in the proof's table of decoders."""
    title: str
    """The format's name as people write it: "FP8"."""
    kind: str
    """Short name in run.json and in the tables of `plan`; formats that differ only in their scales share it: "fp8"."""
    understood: str
    """What the format reads of config.json, for error messages: "quant_method 'fp8' (E4M3, …)"."""
    dtype_name: str | None = None
    """The name of the codes' dtype in reports; None for its name in safetensors."""
    bytes_per_weight: float
    """Bytes for one number of a weight, scales included, on disk and in memory; the memory estimate counts with it."""

    @abstractmethod
    def claims(self, quant: Mapping[str, Any]) -> bool:
        """Whether weights of this format may be in a checkpoint whose config.json describes quantization as `quant`."""

    def check_config(self, config: Mapping[str, Any], where: Any) -> None:  # noqa: B027 - most formats have nothing to add
        """Raises `InputError` for a config.json (at `where`) of this format whose details it can't decode."""

    @abstractmethod
    def find(self, checkpoint: Checkpoint) -> dict[str, QuantizedTensor]:
        """Find the weights of this format in a checkpoint, by key, from headers and config.json alone.

        Raises `InputError` with the name of the tensor where it is not certain how to decode one.
        """

    @abstractmethod
    def read_scales(self, tensor: QuantizedTensor, float_type: type = np.float32) -> np.ndarray:
        """Read all scales of a weight into the one array that `decode` takes.

        A format with several tensors of scales multiplies them here.  Raises `InputError` for scales that can't be
        right (not finite, not positive).
        """

    @abstractmethod
    def decode(
        self,
        codes: np.ndarray,
        scales: np.ndarray,
        tensor: QuantizedTensor,
        *,
        row: int = 0,
        expert: int | None = None,
        float_type: type = np.float32,
    ) -> np.ndarray:
        """Decode rows [row, row + n) of a weight: codes (n, …) as stored → numbers (n, in), each rounded once.

        `scales` is the whole array from `read_scales`; `expert` is the number of the expert among stacked ones.
        """

    @abstractmethod
    def encode(
        self,
        numbers: np.ndarray,
        tensor: QuantizedTensor,
        *,
        rng: np.random.Generator | None = None,
        absmax: float | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """Encode whole row groups of a weight: numbers (n, in) → (codes (n, …), fresh scales), both as stored.

        There is one array of fresh scales for each tensor of `tensor.scales`, in their order and in numpy's storage
        dtype (`checkpoint.dtypes.STORAGE`).  An array holds the scales of these rows, and the merge concatenates them;
        or it holds the whole tensor, where every call returns the same (a global scale).  Scales must not depend on
        `rng`.

        Codes are rounded to the nearest, or stochastically with `rng`.  `absmax` is the largest magnitude in the whole
        weight, where `needs_absmax` asks for it.  Raises `CheckError` where a number is not finite.
        """

    @abstractmethod
    def decode_fresh(
        self, codes: np.ndarray, scales: tuple[np.ndarray, ...], tensor: QuantizedTensor, float_type: type = np.float32
    ) -> np.ndarray:
        """Decode what one call of `encode` returned to numbers (n, in)."""

    def row_group(self, tensor: QuantizedTensor) -> int:
        """The number of rows that `encode` needs together, because they share scales."""
        return 1 if tensor.block is None else tensor.block[0]

    def needs_absmax(self, tensor: QuantizedTensor) -> bool:
        """Whether `encode` needs the largest magnitude of the whole weight, because all of it shares a scale.

        The merge then reads and computes the weight twice.
        """
        return tensor.block is None

    @abstractmethod
    def edit_config(
        self, config: Mapping[str, Any], dequantized: Collection[str], quantized: Collection[str]
    ) -> dict[str, Any]:
        """Return a copy of config.json for a checkpoint in which the weights `dequantized` are in bfloat16.

        `dequantized` and `quantized` are keys; the latter are of all weights that the format had.  Where no weight of
        the format is left, its description is removed.
        """
