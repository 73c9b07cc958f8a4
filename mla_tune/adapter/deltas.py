"""`Adapter`: an opened adapter, with its low-rank updates (`LoraDelta`) and its fully trained tensors (`SavedTensor`).

All three hold references to tensors in the adapter file (`TensorRef`); only `Adapter.check_finite` reads numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mla_tune.adapter.methods import AdapterMethod, method_of
from mla_tune.arch.site import Site
from mla_tune.checkpoint.dtypes import decode
from mla_tune.checkpoint.index import TensorRef
from mla_tune.checkpoint.tensor_io import read_raw
from mla_tune.errors import InputError

#: Bytes that `check_finite` reads at once.
_BLOCK = 1 << 24


@dataclass(frozen=True, slots=True)
class LoraDelta:
    """One low-rank update of one site.  Shapes are checked; numbers are not read."""

    site: Site
    """The matrix or stack of experts that it changes."""
    rank: int
    """The rank r."""
    scale: float
    """The factor s on B·A."""
    A: TensorRef
    """(E·r, in), with E = `experts`: the r rows of expert 0 come first."""
    B: TensorRef
    """(out, r·E), rank-major: column j·E + e is column j of expert e."""
    method: AdapterMethod
    """The adapter method."""
    vectors: tuple[TensorRef, ...]
    """The vectors (out) that the method trains beside A and B, in the order of `AdapterMethod.vectors`."""
    experts: int
    """Number of experts in A and B; 1 for a single matrix.  It exceeds the site's count where transformers allocates
    unused weights for identity experts (LongCat-Flash); the site's experts come first."""
    expert: int | None = None
    """The expert that it belongs to, if each expert has an adapter of its own (transformers before 5); else None."""
    rows: tuple[int, int] | None = None
    """With `expert`: first and end row of the site's matrix that B covers, those of gate or of up; None: all rows."""
    bias: TensorRef | None = None
    """The bias (out) of lora_B: the base's bias becomes bias + s·this.  None without `lora_bias`."""

    def refs(self) -> Iterator[TensorRef]:
        """Yield every tensor of the adapter file that belongs to this update."""
        yield self.A
        yield self.B
        yield from self.vectors
        if self.bias is not None:
            yield self.bias


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A fully trained tensor (modules_to_save, a bias, a saved embedding) that replaces one of the base.

    It has the shape of the base's tensor, but not always its dtype.  If the same matrix has a LoRA too (an adapted
    lm_head that was saved with its base layer), the LoRA is added to this tensor.
    """

    key: str
    """Key of the base's tensor.  The base holds it, except for the lm_head.weight of a model with tied embeddings."""
    ref: TensorRef
    """The trained tensor in the adapter file."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter folder, opened against an architecture (`adapter.files.open_adapter`)."""

    folder: Path
    """The folder with adapter_config.json."""
    settings: dict[str, Any]
    """The contents of adapter_config.json."""
    deltas: tuple[LoraDelta, ...]
    """The low-rank updates, in the order of the architecture's sites; within a site by expert, gate before up."""
    saved: tuple[SavedTensor, ...] = ()
    """The fully trained tensors, in the order of the file."""

    @property
    def method(self) -> AdapterMethod:
        """The adapter method, according to the switches in adapter_config.json."""
        return method_of(self.settings)

    def refs(self) -> Iterator[TensorRef]:
        """Yield every tensor of the adapter file that a merge uses."""
        for item in self.deltas:
            yield from item.refs()
        yield from (item.ref for item in self.saved)

    def check_finite(self) -> None:
        """Read all tensors, in blocks of rows.  Raises `InputError` for the first one with a NaN or an infinity."""
        for ref in self.refs():
            rows = ref.shape[0] if ref.shape else 0
            step = max(1, _BLOCK * rows // max(1, ref.nbytes))
            blocks = ((i, min(i + step, rows)) for i in range(0, rows, step)) if ref.shape else [(0, None)]
            if not all(np.isfinite(decode(read_raw(ref, *block), ref.dtype)).all() for block in blocks):
                raise InputError(
                    f"{ref.file}: '{ref.key}' holds NaN or infinity: the training diverged or the file is damaged. "
                    "Use an earlier checkpoint of the run"
                )
