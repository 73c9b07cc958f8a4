"""Quantization formats on disk: what a format must say so that a checkpoint in it can be merged into.

    QuantFormat       a format: finds its weights in a checkpoint, decodes and encodes rows
    QuantizedTensor   one weight in it: where its codes and scales lie

`sockets.QUANT_FORMATS` holds the formats by name.  Planning, merging, absorption and reports ask the format; nothing
else knows how codes become numbers.  The proof has decoders of its own (`verification.decoders.DECODERS`) under the
same names, and models in memory have layers of their own (`model.quantized_linear`).

Rows here are rows of the matrix (out, in): a format may pack several numbers of a row into one stored element, but no
element may hold numbers of two rows.
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
    """One quantized weight, by reference: where its codes and its scales lie."""

    #: The format that decodes it.
    format: QuantFormat
    #: The codes, with as many rows as the weight: (out, …) or, for stacked experts, (E, out, …).
    codes: TensorRef
    #: The tensors that decoding needs beside the codes, and that are written anew when the weight is: one tensor of
    #: scales, or several (NVFP4 has the scales of the blocks and a global scale).  The format decides on their order,
    #: dtypes and shapes.
    scales: tuple[TensorRef, ...]
    #: Rows and columns of the part of an (out, in) matrix that shares a scale: (1, in) for one scale a row; None for
    #: one scale for all of it.
    block: tuple[int, int] | None = None
    #: Scales are powers of two (ue8m0).
    power_of_two: bool = False
    #: Keys of tensors of the quantized layer that decoding does not need (scales of static activations, the shape of
    #: packed codes).  They are copied as they are while the weight stays quantized.
    extra_keys: tuple[str, ...] = ()
    #: Key of the weight in an unquantized checkpoint; empty where the codes have it.
    weight_key: str = ""
    #: Shape of the numbers, (out, in) or (E, out, in); empty where it is that of the codes.
    weight_shape: tuple[int, ...] = ()

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
        """Keys of the tensors that mean nothing without the codes: a weight that leaves the format drops them."""
        return (*(scale.key for scale in self.scales), *self.extra_keys)


class QuantFormat(ABC):
    """One way to store weights in fewer bits.  Instances hold no state and are used by many threads."""

    #: Name in `sockets.QUANT_FORMATS`, in reports and in the proof's table of decoders.
    name: str
    #: How people write it: "FP8".
    title: str
    #: Short name in run.json and in the tables of `plan`, which formats may share that differ in their scales: "fp8".
    kind: str
    #: What the format's tensors are called in a message that lists what is understood.
    understood: str
    #: What reports call the dtype of the codes; None: its name in safetensors.
    dtype_name: str | None = None
    #: Bytes that a weight takes, scales included, on disk and in memory; the memory estimate counts with it.
    bytes_per_weight: float

    @abstractmethod
    def claims(self, quant: Mapping[str, Any]) -> bool:
        """Whether `quant`, the description of quantized weights in config.json, is of this format."""

    def check_config(self, config: Mapping[str, Any], where: Any) -> None:  # noqa: B027 - most formats have nothing to add
        """Raises `InputError` for a config.json (at `where`) of this format whose details it can't decode."""

    @abstractmethod
    def find(self, checkpoint: Checkpoint) -> dict[str, QuantizedTensor]:
        """The weights of this format in a checkpoint by their key, from headers and config.json.

        Raises `InputError`, which names the tensor, for whatever can't be turned into numbers for certain.
        """

    @abstractmethod
    def read_scales(self, tensor: QuantizedTensor, float_type: type = np.float32) -> np.ndarray:
        """All scales of a weight, in one array that `decode` understands.  A format with several tensors of scales
        multiplies them here.  Raises `InputError` for scales that can't be right (not finite, not positive)."""

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
        """Rows [row, row + n) of a weight: stored codes (n, …) → numbers (n, in), one rounding each.

        `scales` are all that `read_scales` gave; `expert` says which of stacked experts the rows belong to.
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

        There is one array of fresh scales for each tensor of `tensor.scales`, in its order and in the dtype that numpy
        stores it in (`checkpoint.dtypes.STORAGE`).  It holds the scales of these rows, which the merge joins in the
        order of the rows; or all elements of the tensor, where every call gives the same ones (a global scale).
        The scales do not depend on `rng`.

        Rounds to the nearest, or stochastically with `rng`.  `absmax` is max |W'| of the whole weight where
        `needs_absmax` says so.  Raises `CheckError` where a number is not finite.
        """

    @abstractmethod
    def decode_fresh(
        self, codes: np.ndarray, scales: tuple[np.ndarray, ...], tensor: QuantizedTensor, float_type: type = np.float32
    ) -> np.ndarray:
        """The numbers (n, in) that the codes and fresh scales of one `encode` stand for."""

    def row_group(self, tensor: QuantizedTensor) -> int:
        """How many rows have to be encoded together, because they share scales."""
        return 1 if tensor.block is None else tensor.block[0]

    def needs_absmax(self, tensor: QuantizedTensor) -> bool:
        """Whether `encode` has to know the largest number of the whole weight, because a scale is for all of it.

        Such a weight is read and computed once more before it is encoded.
        """
        return tensor.block is None

    @abstractmethod
    def edit_config(
        self, config: Mapping[str, Any], dequantized: Collection[str], quantized: Collection[str]
    ) -> dict[str, Any]:
        """A copy of config.json for a checkpoint in which the weights `dequantized` (keys) left the format.

        `quantized` are all weights that were in it.  Where none is left, the description goes.
        """
