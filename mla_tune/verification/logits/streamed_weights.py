"""Which tensors of a checkpoint each parameter of a model needs, and the memory that they are read into."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from mla_tune.arch.site import HEAD, Architecture, Site
from mla_tune.checkpoint.index import Checkpoint, TensorRef, matrix_shape, nearest
from mla_tune.errors import CheckError
from mla_tune.verification.dequantize import DequantizedCheckpoint
from mla_tune.verification.read import TORCH_DTYPES, TensorReader

#: Numbers read and converted at once: they stay in a core's cache.
_BLOCK = 1 << 19


class WeightReader:
    """Finds the tensors of a checkpoint that a parameter needs, and reads their numbers into existing memory."""

    def __init__(self, checkpoint: Checkpoint, arch: Architecture) -> None:
        self.checkpoint, self.key_mapping = checkpoint, arch.key_mapping
        self.dequantized = DequantizedCheckpoint(checkpoint)
        #: Key of each weight or tensor → the tensor that holds its numbers: the codes, if it is quantized.
        self.refs = dict(checkpoint.tensors) | {key: q.codes for key, q in self.dequantized.quantized.items()}
        # This checkpoint's config.json, not `arch`, says it: a merge may have untied the embeddings.
        self.is_tied = bool(checkpoint.config.get("tie_word_embeddings", arch.tied))
        #: Parameter of the embedding or the head → key of the other one, which is the same tensor if they are tied.
        self.tied_keys = {arch.embedding: arch.head_key, HEAD: arch.embedding_key}
        self.reader = TensorReader()

    def find(self, name: str, site: Site | None) -> list[TensorRef]:
        """Return the tensors that hold the parameter or buffer `name`: one, or several for stacked experts (`site`).

        Raises `CheckError` where one is missing.
        """
        tensors = self.refs
        keys = site.disk_keys() if site is not None else self.key_mapping.tensors(name, tensors)
        if self.is_tied and keys[0] not in tensors and self.tied_keys.get(name) in tensors:
            return [tensors[self.tied_keys[name]]]
        missing = [key for key in keys if key not in tensors]
        if missing:
            more = f" and {len(missing) - 1:,} more of {site.path}" if site and len(missing) > 1 else ""
            raise CheckError(
                f"{self.checkpoint.folder}: the checkpoint has no tensor '{missing[0]}'{more}, which the model needs"
                f"{nearest(missing[0], tensors)}"
            )
        return [tensors[key] for key in keys]

    def read(self, ref: TensorRef, out: torch.Tensor, begin: int = 0, end: int | None = None) -> None:
        """Read rows [begin, end) of a tensor, seen as a matrix, into `out`: contiguous, with as many numbers."""
        rows, columns = matrix_shape(self.dequantized.shape(ref))
        end = rows if end is None else end
        target = out.view(end - begin, columns)
        step = max(1, _BLOCK // max(1, columns))
        for first in range(begin, end, step):
            last = min(first + step, end)
            raw = self.reader.rows(ref, first, last, "logits")
            if self.dequantized.is_quantized(ref):
                numbers = self.dequantized.numbers(ref, raw, first, last, torch.float32)
            else:
                numbers = raw.view(TORCH_DTYPES[ref.dtype]).view(last - first, columns)
            target[first - begin : last - begin].copy_(numbers)


@dataclass(eq=False)
class Slot:
    """One parameter or persistent buffer of a model, and the tensors of the checkpoint that hold its numbers."""

    module: nn.Module
    """The module that has the parameter; it stays the same when PEFT wraps it."""
    leaf: str
    """Name of the parameter in the module."""
    name: str
    """Name of the parameter in the model."""
    shape: torch.Size
    """Shape of the parameter."""
    refs: list[TensorRef]
    """The tensors of the checkpoint."""
    is_buffer: bool
    """It is a buffer, not a parameter."""
    site: Site | None = None
    """The routed experts that the parameter stacks; None for every other parameter."""
    trained: torch.Tensor | None = None
    """The tensor that an adapter stores in place of the parameter (`modules_to_save`)."""

    @property
    def is_fused(self) -> bool:
        """Whether one tensor on disk holds all experts."""
        return self.site is not None and self.site.disk == "fused"

    @property
    def value(self) -> torch.Tensor:
        """The parameter or buffer that the module has now."""
        return getattr(self.module, self.leaf)

    def set(self, tensor: torch.Tensor) -> None:
        """Make `tensor` the parameter of the module."""
        self.module._parameters[self.leaf] = nn.Parameter(tensor, requires_grad=False)

    def free(self) -> None:
        """Free the parameter: replace it with one that has no memory."""
        # PEFT's parametrizations hold the parameter until they are garbage-collected: it must not keep its memory.
        if not self.value.is_meta:
            self.value.data = torch.empty(0)
        self.set(torch.empty(self.shape, device="meta"))


def find_slots(model: nn.Module, weights: WeightReader, arch: Architecture) -> Iterator[Slot]:
    """Yield a slot for every parameter and persistent buffer of the language model, with shapes checked.

    Raises `CheckError` where the checkpoint lacks a tensor, or has one of another shape.
    """
    stacks = {site.path: site for site in arch if site.is_experts}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if not name.startswith((f"{arch.prefix}.", "lm_head.")):
            continue  # an image or audio encoder
        path, _, leaf = name.rpartition(".")
        site = stacks.get(name)
        refs = weights.find(name, site)
        slot = Slot(
            model.get_submodule(path), leaf, name, tensor.shape, refs, not isinstance(tensor, nn.Parameter), site
        )
        _check_shape(slot, weights)
        yield slot


def _check_shape(slot: Slot, weights: WeightReader) -> None:
    if slot.site is None:
        # Some convolutions are stored as several tensors, cut by rows.
        expected = (slot.shape[0] // len(slot.refs), *slot.shape[1:]) if slot.shape else ()
    elif slot.is_fused:
        expected = tuple(slot.shape)
    else:
        parts = len(slot.refs) // slot.site.count
        expected = (slot.site.shape[0] // parts, slot.site.shape[1])
    for ref in slot.refs:
        if (shape := weights.dequantized.shape(ref)) != expected:
            raise CheckError(
                f"{weights.checkpoint.folder}: '{ref.key}' has the shape {shape}, but the model needs {expected}"
            )


class BufferPool:
    """Memory for the weights of one layer, which the next layer uses again.

    Allocating them one by one fragments memory layer after layer, and writing to fresh pages takes twice as long.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._memory, self._used = torch.empty(0, dtype=dtype), 0

    def reserve(self, shapes: Iterable[torch.Size]) -> None:
        """Make room for tensors of these shapes in place of the earlier ones; frees all memory if there are none."""
        size, self._used = sum(_padded(shape.numel()) for shape in shapes), 0
        if size > len(self._memory) or not size:
            dtype, self._memory = self._memory.dtype, torch.empty(0)  # free the old memory before the new is allocated
            self._memory = torch.empty(size, dtype=dtype)

    def take(self, shape: torch.Size) -> torch.Tensor:
        """Return the next tensor, of this shape; it is valid until the next `reserve`."""
        begin, self._used = self._used, self._used + _padded(shape.numel())
        return self._memory[begin : begin + shape.numel()].view(shape)


def _padded(numbers: int) -> int:
    return -(-numbers // 64) * 64  # tensors begin at a cache line
