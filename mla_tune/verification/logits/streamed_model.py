"""A transformers model whose weights are read from a checkpoint piece by piece, while it computes.

The model is built from config.json without weights.  A piece (the embedding, a decoder layer, the last norm, the head)
gets its weights right before it runs and gives them back right after; of routed experts only those that are sent a
token are read, a few at a time, and of the embedding the rows of the tokens.  So a plain `model(input_ids)` of a model
of any size needs the memory of one layer without its experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.index import TensorRef
from mla_tune.errors import CheckError
from mla_tune.verification.logits.streamed_weights import BufferPool, Slot, Weights, find_slots

#: Bytes of a matrix that is multiplied by some rows at a time.
_ROWS = 1 << 24


class Halves(Protocol):
    """Runs parts of a batch in different ways."""

    def parts(self, module: nn.Module) -> list[Callable[[], None] | None]:
        """What to call before each equal part of a batch goes through the module: one entry a part."""
        ...


@dataclass(eq=False)
class StreamedPart:
    """What is filled and emptied at once; `stacks` are the routed experts in it, by the path of their module."""

    path: str
    slots: list[Slot] = field(default_factory=list)
    stacks: dict[str, list[Slot]] = field(default_factory=dict)


class StreamedModel:
    """A model of `build`, its weights from `weights`, computing in `dtype`.

    `reader` reads experts while others are used: `ahead` chunks of about `chunk` bytes, or of one expert, beside the
    one at hand.  `chunk` None means all experts of a layer that run at once, in a stack as large as the model's.
    `progress` is told the bytes that a piece has on the disk, of all its experts, when it has run.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        arch: Architecture,
        weights: Weights,
        dtype: torch.dtype,
        *,
        reader: Executor,
        ahead: int,
        chunk: int | None,
        progress: Callable[[int], None],
    ) -> None:
        self.model, self.arch, self.weights = model, arch, weights
        self.dtype, self.reader, self.chunk = dtype, reader, chunk
        self.progress = progress
        self.pieces = {path: StreamedPart(path) for path in _piece_paths(model, arch.prefix)}
        #: Which expert lies where in the stacks at hand.
        self.experts: list[tuple[int, int]] = []
        self._dense = BufferPool(dtype)
        self._chunk_memory = [BufferPool(dtype) for _ in range(1 if chunk is None else ahead + 1)]
        for slot in find_slots(model, weights, arch):
            path = next((p for p in self.pieces if slot.name.startswith(f"{p}.")), None)
            if path is None:
                raise CheckError(f"'{slot.name}' of {type(model).__name__} is in no part of the model that is known")
            if slot.site is None:
                self.pieces[path].slots.append(slot)
            else:
                self.pieces[path].stacks.setdefault(slot.name.rpartition(".")[0], []).append(slot)

    def release(self) -> None:
        """Give back the memory of the weights: a model, which holds itself in circles, is freed some time later."""
        for memory in (self._dense, *self._chunk_memory):
            memory.reserve([])
        for parameter in self.model.parameters():  # those of adapters
            if not parameter.is_meta:
                parameter.data = torch.empty(0)

    def slots(self) -> Iterator[Slot]:
        """All slots of the model, part by part."""
        for piece in self.pieces.values():
            yield from piece.slots
            for stack in piece.stacks.values():
                yield from stack

    def stream(self, tokens: torch.Tensor, sides: Halves | None = None) -> None:
        """From now on the model fills its pieces itself.  `tokens` are those that it will be given."""
        rows = sorted(set(tokens.flatten().tolist()))
        for piece in self.pieces.values():
            module = self.model.get_submodule(piece.path)
            whole = len(piece.slots) == 1 and piece.slots[0].trained is None
            if type(module) is nn.Linear and whole:  # the head, if no adapter is on it
                self._wrap_matrix(module, piece.slots[0].refs[0])
            else:
                self._wrap(module, piece, rows)
            for path, stack in piece.stacks.items():
                self._wrap_experts(self.model.get_submodule(path), stack, sides)

    def _wrap(self, module: nn.Module, piece: StreamedPart, rows: list[int]) -> None:
        inner: Callable[..., Any] = module.forward
        every = [*piece.slots, *(slot for stack in piece.stacks.values() for slot in stack)]
        size = sum(ref.nbytes for slot in every for ref in slot.refs)

        def forward(*args: Any, **kwargs: Any) -> Any:
            try:
                self._fill(piece, rows)
                result = inner(*args, **kwargs)
            finally:
                for slot in piece.slots:
                    if not slot.is_buffer:
                        slot.empty()
            self.progress(size)
            return result

        module.forward = forward

    def _wrap_matrix(self, module: nn.Linear, ref: TensorRef) -> None:
        """Multiply by some rows at a time: the matrix of a large vocabulary is larger than a layer."""
        rows, width = module.out_features, module.in_features
        step = max(1, _ROWS // (width * self.dtype.itemsize))

        def forward(input: torch.Tensor) -> torch.Tensor:
            out = input.new_empty(*input.shape[:-1], rows)
            for first in range(0, rows, step):
                last = min(first + step, rows)
                shape = torch.Size((last - first, width))
                self._dense.reserve([shape])
                part = self._dense.take(shape)
                self.weights.read(ref, part, first, last)
                out[..., first:last] = F.linear(input, part)
            self.progress(ref.nbytes)
            return out

        module.forward = forward

    def _fill(self, piece: StreamedPart, rows: list[int]) -> None:
        memory = self._dense
        memory.reserve(slot.shape for slot in piece.slots if not slot.is_buffer)
        for slot in piece.slots:
            tensor = slot.value if slot.is_buffer else memory.take(slot.shape)
            if isinstance(slot.module, nn.Embedding):
                for row in rows:
                    self.weights.read(slot.refs[0], tensor[row], row, row + 1)
            else:
                parts = tensor.chunk(len(slot.refs)) if len(slot.refs) > 1 else (tensor,)
                for ref, part in zip(slot.refs, parts, strict=True):
                    self.weights.read(ref, part)
            if not slot.is_buffer:
                slot.put(tensor)

    def _wrap_experts(self, module: nn.Module, stack: list[Slot], sides: Halves | None) -> None:
        """Run the module for a few experts at a time, on those tokens that are sent to them."""
        inner: Callable[..., torch.Tensor] = module.forward
        parts = sides.parts(module) if sides else [None]
        assert stack[0].site is not None
        count = stack[0].site.count
        zeros = self.arch.family.moe is not None and self.arch.family.moe.identity_experts_key is not None

        def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Any:
            out = torch.zeros_like(hidden_states)
            halves = [t.chunk(len(parts)) for t in (hidden_states, top_k_index, top_k_weights, out)]
            hit = sorted(set(top_k_index.flatten().tolist()))
            chunks = self._chunks([e for e in hit if e < count], stack)
            # Experts beyond those of the checkpoint hand their tokens through (LongCat-Flash).
            if hit[-1] >= count:
                chunks.append([(e, e) for e in hit if e >= count])
            coming: deque[Future[list[torch.Tensor]]] = deque()
            for i, self.experts in enumerate(chunks):
                memory = self._chunk_memory
                for turn in range(i + len(coming), min(i + len(memory), len(chunks))):
                    job = (stack, chunks[turn], memory[turn % len(memory)])
                    coming.append(self.reader.submit(self._read_experts, *job))
                for slot, tensor in zip(stack, coming.popleft().result(), strict=True):
                    slot.put(tensor)
                place = torch.full((hit[-1] + 1,), -1)
                for expert, at in self.experts:
                    place[expert] = at
                for enter, x, index, weights, y in zip(parts, *halves, strict=True):
                    at = place[index]
                    token, choice = (at >= 0).nonzero(as_tuple=True)
                    if enter:
                        enter()
                    if len(token):
                        to, weight = at[token, choice, None], weights[token, choice, None]
                        if zeros:  # LongCat-Flash's code can't do with one choice a token
                            to, weight = to.expand(-1, 2), F.pad(weight, (0, 1))
                        y.index_add_(0, token, inner(x[token], to, weight))
                for slot in stack:
                    slot.empty()
            return out

        module.forward = forward

    def _chunks(self, experts: list[int], stack: list[Slot]) -> list[list[tuple[int, int]]]:
        """(expert, place in the stack) of each chunk."""
        if self.chunk is None:
            return [[(e, e) for e in experts]]
        size = sum(slot.shape[1:].numel() for slot in stack) * self.dtype.itemsize
        step = max(1, self.chunk // size)
        return [[(e, at) for at, e in enumerate(experts[i : i + step])] for i in range(0, len(experts), step)]

    def _read_experts(self, stack: list[Slot], chunk: list[tuple[int, int]], memory: BufferPool) -> list[torch.Tensor]:
        """The stacks of a chunk."""
        assert stack[0].site is not None
        count = stack[0].site.count
        held = [pair for pair in chunk if pair[0] < count]
        shapes = [s.shape if self.chunk is None else torch.Size((len(held), *s.shape[1:])) for s in stack]
        memory.reserve(shapes)
        tensors = []
        for slot, shape in zip(stack, shapes, strict=True):
            assert slot.site is not None
            height, tensor = slot.site.shape[0], memory.take(shape)
            for expert, at in held:
                if slot.fused:
                    self.weights.read(slot.refs[0], tensor[at], expert * height, (expert + 1) * height)
                    continue
                parts = len(slot.refs) // count  # 2 for gate and up
                for i, half in enumerate(tensor[at].chunk(parts)):
                    self.weights.read(slot.refs[expert * parts + i], half)
            tensors.append(tensor)
        return tensors


def _piece_paths(model: nn.Module, decoder: str) -> list[str]:
    """The decoder layers, and beside them all that has weights and that text passes through."""
    paths: list[str] = []
    for name, child in model.get_submodule(decoder).named_children():
        path = f"{decoder}.{name}"
        many = isinstance(child, nn.ModuleList)
        paths += [f"{path}.{i}" for i in range(len(child))] if many else [path]
    paths += [name for name, _ in model.named_children() if not decoder.startswith(name)]
    return [path for path in paths if model.get_submodule(path).state_dict()]


@contextmanager
def placeholders(streamed: StreamedModel) -> Iterator[None]:
    """Meanwhile every parameter is on the CPU, though without memory: PEFT puts adapters where the base's weights are,
    and what is put on the meta device is lost.  What is loaded meanwhile in place of one becomes `Slot.trained`."""
    kept = {}
    for slot in streamed.slots():
        if not slot.is_buffer:
            slot.put(torch.zeros((), dtype=torch.float32).expand(slot.shape))
            kept[slot] = slot.value
    yield
    for slot, tensor in kept.items():
        if slot.value is not tensor:
            slot.trained = slot.value.data.to(streamed.dtype)
        slot.put(torch.empty(slot.shape, device="meta"))
