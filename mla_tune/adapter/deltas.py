"""What an opened adapter consists of: its low-rank updates (`LoraDelta`) and its whole tensors (`SavedTensor`)."""

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

#: Bytes read at once to look for NaN.
_BLOCK = 1 << 24


@dataclass(frozen=True, slots=True)
class LoraDelta:
    """One low-rank update of one site, by reference: shapes are checked, weights not read.

    A (E·r, in) and B (out, r·E) for `experts` E in the factors, B rank-major (see `merge.apply`).  E is 1 for a single
    matrix, and more than the site's count where the model holds unused weights for its identity experts
    (LongCat-Flash); the site's come first.  `scale` is the factor s on B·A; `vectors` are those of the `method`, in the
    order of `AdapterMethod.vectors`, each (out).

    The adapter of one expert, as transformers before 5 had them, says which in `expert`, and in `rows` which rows of
    the site's (out, in) matrix B covers: those of gate or of up; None means all.

    `bias` (out) is the bias of lora_B: the base's bias becomes bias + s·this.
    """

    site: Site
    rank: int
    scale: float
    A: TensorRef
    B: TensorRef
    method: AdapterMethod
    vectors: tuple[TensorRef, ...]
    experts: int
    expert: int | None = None
    rows: tuple[int, int] | None = None
    bias: TensorRef | None = None

    def refs(self) -> Iterator[TensorRef]:
        """Every tensor of the adapter file that belongs to this delta."""
        yield self.A
        yield self.B
        yield from self.vectors
        if self.bias is not None:
            yield self.bias

    def vector(self, name: str) -> TensorRef | None:
        """The vector of this name; None where the method has none such."""
        return dict(zip(self.method.vectors, self.vectors, strict=True)).get(name)


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A trained tensor (modules_to_save, a bias, a saved embedding) that replaces the base's tensor `key`.

    It has the shape of the base's, not always its dtype.  Where the site has a delta too (an adapted lm_head saved with
    its base layer), the delta comes on top.  `key` is in the base but for the lm_head.weight of a model with tied
    embeddings, which the base may leave out.
    """

    key: str
    ref: TensorRef


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter on an architecture: `deltas` in the order of the architecture's sites (within one by expert, gate
    before up), `saved` in the order of the file."""

    folder: Path
    settings: dict[str, Any]
    deltas: tuple[LoraDelta, ...]
    saved: tuple[SavedTensor, ...] = ()

    @property
    def method(self) -> AdapterMethod:
        """The adapter method, by the switches in adapter_config.json."""
        return method_of(self.settings)

    def refs(self) -> Iterator[TensorRef]:
        """Every tensor of the adapter that the merge uses."""
        for item in self.deltas:
            yield from item.refs()
        yield from (item.ref for item in self.saved)

    def check_finite(self) -> None:
        """Read every tensor once, in blocks of rows.  Raises `InputError` for the first with a NaN or an infinity."""
        for ref in self.refs():
            rows = ref.shape[0] if ref.shape else 0
            step = max(1, _BLOCK * rows // max(1, ref.nbytes))
            blocks = ((i, min(i + step, rows)) for i in range(0, rows, step)) if ref.shape else [(0, None)]
            if not all(np.isfinite(decode(read_raw(ref, *block), ref.dtype)).all() for block in blocks):
                raise InputError(
                    f"{ref.file}: '{ref.key}' holds NaN or infinity: the training diverged or the file is damaged. "
                    "Take an earlier checkpoint of the run"
                )
