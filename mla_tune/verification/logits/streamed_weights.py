"""The numbers of a checkpoint where a model keeps them, and the memory they are read into."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from mla_tune.arch.site import HEAD, Architecture, Site
from mla_tune.checkpoint.index import Checkpoint, TensorRef, matrix_shape, nearest
from mla_tune.errors import CheckError
from mla_tune.verification.dequantize import Values
from mla_tune.verification.read import TORCH, TensorReader

#: Numbers read and converted at once: they stay in a core's cache.
_BLOCK = 1 << 19


class Weights:
    """Tensors of a checkpoint as numbers, read into tensors that are there already."""

    def __init__(self, checkpoint: Checkpoint, arch: Architecture) -> None:
        self.checkpoint, self.key_mapping = checkpoint, arch.key_mapping
        self.values = Values(checkpoint)
        #: Where the numbers of each weight or tensor are: the codes of a quantized one.
        self.refs = dict(checkpoint.tensors) | {key: q.codes for key, q in self.values.quantized.items()}
        # Of this checkpoint, not of `arch`: a merged one may be untied.
        self.tied = bool(checkpoint.config.get("tie_word_embeddings", arch.tied))
        #: Where a checkpoint has one end of tied embeddings, it is the other too.
        self.ends = {arch.embedding: arch.head_key, HEAD: arch.embedding_key}
        self.reader = TensorReader()

    def find(self, name: str, site: Site | None) -> list[TensorRef]:
        """The tensors that hold the parameter or buffer `name`: one, or for a stack of experts one for each part.

        Raises `CheckError` where one is missing.
        """
        tensors = self.refs
        keys = site.disk_keys() if site is not None else self.key_mapping.tensors(name, tensors)
        if self.tied and keys[0] not in tensors and self.ends.get(name) in tensors:
            return [tensors[self.ends[name]]]
        missing = [key for key in keys if key not in tensors]
        if missing:
            more = f" and {len(missing) - 1:,} more of {site.path}" if site and len(missing) > 1 else ""
            raise CheckError(
                f"{self.checkpoint.folder}: the checkpoint has no tensor '{missing[0]}'{more}, which the model needs"
                f"{nearest(missing[0], tensors)}"
            )
        return [tensors[key] for key in keys]

    def read(self, ref: TensorRef, out: torch.Tensor, begin: int = 0, end: int | None = None) -> None:
        """Rows [begin, end) of the tensor seen as a matrix into `out`, which holds as many numbers, contiguous."""
        rows, columns = matrix_shape(self.values.shape(ref))
        end = rows if end is None else end
        target = out.view(end - begin, columns)
        step = max(1, _BLOCK // max(1, columns))
        for first in range(begin, end, step):
            last = min(first + step, end)
            raw = self.reader.rows(ref, first, last, "logits")
            if self.values.name(ref) in self.values.quantized:
                numbers = self.values.of(ref, raw, first, last, torch.float32)
            else:
                numbers = raw.view(TORCH[ref.dtype]).view(last - first, columns)
            target[first - begin : last - begin].copy_(numbers)


@dataclass(eq=False)
class Slot:
    """Where one parameter or persistent buffer is kept, and the tensors of the checkpoint that hold it.

    The module stays the same one when PEFT wraps it.  `trained` is what an adapter puts in its place.
    """

    module: nn.Module
    leaf: str
    name: str
    shape: torch.Size
    refs: list[TensorRef]
    is_buffer: bool
    site: Site | None = None
    trained: torch.Tensor | None = None

    @property
    def fused(self) -> bool:
        """One tensor on disk holds the whole stack of experts."""
        return self.site is not None and self.site.disk == "fused"

    @property
    def value(self) -> torch.Tensor:
        """The parameter or buffer as the module has it now."""
        return getattr(self.module, self.leaf)

    def put(self, tensor: torch.Tensor) -> None:
        """Make `tensor` the parameter of the module."""
        self.module._parameters[self.leaf] = nn.Parameter(tensor, requires_grad=False)

    def empty(self) -> None:
        """Put a parameter without memory in the place of the one that was read."""
        # Whoever still holds the parameter (PEFT's parametrizations, until they are collected) keeps no memory with it.
        if not self.value.is_meta:
            self.value.data = torch.empty(0)
        self.put(torch.empty(self.shape, device="meta"))


def find_slots(model: nn.Module, weights: Weights, arch: Architecture) -> Iterator[Slot]:
    """Every parameter and persistent buffer that text passes through, checked against the headers of the checkpoint."""
    stacks = {site.path: site for site in arch if site.is_experts}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if not name.startswith((f"{arch.prefix}.", "lm_head.")):
            continue  # a tower
        path, _, leaf = name.rpartition(".")
        site = stacks.get(name)
        refs = weights.find(name, site)
        slot = Slot(
            model.get_submodule(path), leaf, name, tensor.shape, refs, not isinstance(tensor, nn.Parameter), site
        )
        _check_shape(slot, weights)
        yield slot


def _check_shape(slot: Slot, weights: Weights) -> None:
    if slot.site is None:
        # Some convolutions are several tensors on disk, cut by rows.
        expected = (slot.shape[0] // len(slot.refs), *slot.shape[1:]) if slot.shape else ()
    elif slot.fused:
        expected = tuple(slot.shape)
    else:
        parts = len(slot.refs) // slot.site.count
        expected = (slot.site.shape[0] // parts, slot.site.shape[1])
    for ref in slot.refs:
        if (shape := weights.values.shape(ref)) != expected:
            raise CheckError(f"{weights.checkpoint.folder}: '{ref.key}' is {shape}, and the model needs {expected}")


class BufferPool:
    """Tensors cut from one piece of memory that stays: allocated one by one they leave holes behind, layer after layer,
    and fresh pages cost as much time as what is written there."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._all, self._used = torch.empty(0, dtype=dtype), 0

    def reserve(self, shapes: Iterable[torch.Size]) -> None:
        """Make room for these shapes; what was taken before is used again, or freed where there are none."""
        numbers, self._used = sum(_padded(shape.numel()) for shape in shapes), 0
        if numbers > len(self._all) or not numbers:
            dtype, self._all = self._all.dtype, torch.empty(0)  # freed before there is more
            self._all = torch.empty(numbers, dtype=dtype)

    def take(self, shape: torch.Size) -> torch.Tensor:
        """The next tensor of this shape; valid until the next `reserve`."""
        begin, self._used = self._used, self._used + _padded(shape.numel())
        return self._all[begin : begin + shape.numel()].view(shape)


def _padded(numbers: int) -> int:
    return -(-numbers // 64) * 64  # rows begin at a cache line
