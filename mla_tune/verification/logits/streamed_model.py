"""A transformers model whose weights are read from a checkpoint layer by layer, while it computes.

`empty_model` builds it without weights.  Each part (the embedding, a decoder layer, the last norm, the head) reads its
weights right before it runs and frees them right after.  Of the routed experts only those are read that get a token, a
few at a time, and of the embedding only the rows of the tokens.  So `model(input_ids)` of a model of any size needs the
memory of one layer without its experts.
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
from mla_tune.verification.logits.streamed_weights import BufferPool, Slot, WeightReader, find_slots

#: Bytes of the output head that are read and multiplied at a time.
_HEAD_BYTES = 1 << 24


class BatchSplit(Protocol):
    """Runs equal parts of a batch through a module in different ways."""

    def setups(self, module: nn.Module) -> list[Callable[[], None] | None]:
        """Return what to call before each part of a batch goes through the module: one entry for each part."""
        ...


@dataclass(eq=False)
class StreamedPart:
    """A part of the model whose weights are read and freed together."""

    path: str
    """Module path."""
    slots: list[Slot] = field(default_factory=list)
    """Its parameters and buffers, without routed experts."""
    stacks: dict[str, list[Slot]] = field(default_factory=dict)
    """Its stacked parameters of routed experts, by the path of their module."""


class StreamedModel:
    """A model of `build_empty_model`, with weights from `weights`, that computes in `dtype`."""

    def __init__(
        self,
        model: PreTrainedModel,
        arch: Architecture,
        weights: WeightReader,
        dtype: torch.dtype,
        *,
        threads: Executor,
        read_ahead: int,
        chunk: int | None,
        progress: Callable[[int], None],
    ) -> None:
        """`threads` read the next `read_ahead` chunks of experts while one is computed.

        A chunk has about `chunk` bytes, but at least one expert; None: all experts of a layer that get a token.
        `progress(n)` is called when a part that has n bytes on disk, all experts included, has run.
        """
        self.model, self.arch, self.weights = model, arch, weights
        self.dtype, self.threads, self.chunk = dtype, threads, chunk
        self.progress = progress
        self.parts = {path: StreamedPart(path) for path in _part_paths(model, arch.prefix)}
        #: (expert, its index in the stacked parameters) of the experts that are in memory now.
        self.experts: list[tuple[int, int]] = []
        self._dense = BufferPool(dtype)
        self._chunk_memory = [BufferPool(dtype) for _ in range(1 if chunk is None else read_ahead + 1)]
        for slot in find_slots(model, weights, arch):
            path = next((p for p in self.parts if slot.name.startswith(f"{p}.")), None)
            if path is None:
                raise CheckError(f"'{slot.name}' of {type(model).__name__} is in no known part of the model")
            if slot.site is None:
                self.parts[path].slots.append(slot)
            else:
                self.parts[path].stacks.setdefault(slot.name.rpartition(".")[0], []).append(slot)

    def release(self) -> None:
        """Free the memory of all weights now; the model itself has reference cycles and is freed only later."""
        for memory in (self._dense, *self._chunk_memory):
            memory.reserve([])
        for parameter in self.model.parameters():  # parameters of adapters
            if not parameter.is_meta:
                parameter.data = torch.empty(0)

    def slots(self) -> Iterator[Slot]:
        """Yield all slots of the model, part by part."""
        for part in self.parts.values():
            yield from part.slots
            for stack in part.stacks.values():
                yield from stack

    def stream(self, tokens: torch.Tensor, split: BatchSplit | None = None) -> None:
        """Make the model read its weights while it computes.  Its input must consist of `tokens`.

        `split` runs parts of the batch through the experts in different ways.
        """
        rows = sorted(set(tokens.flatten().tolist()))
        for part in self.parts.values():
            module = self.model.get_submodule(part.path)
            is_stored_matrix = len(part.slots) == 1 and part.slots[0].trained is None
            if type(module) is nn.Linear and is_stored_matrix:  # the head, if no adapter is on it
                self._wrap_head(module, part.slots[0].refs[0])
            else:
                self._wrap(module, part, rows)
            for path, stack in part.stacks.items():
                self._wrap_experts(self.model.get_submodule(path), stack, split)

    def _wrap(self, module: nn.Module, part: StreamedPart, rows: list[int]) -> None:
        """Make a part read its weights before it runs and free them after; `rows` of an embedding are read."""
        inner: Callable[..., Any] = module.forward
        all_slots = [*part.slots, *(slot for stack in part.stacks.values() for slot in stack)]
        size = sum(ref.nbytes for slot in all_slots for ref in slot.refs)

        def forward(*args: Any, **kwargs: Any) -> Any:
            try:
                self._read_part(part, rows)
                result = inner(*args, **kwargs)
            finally:
                for slot in part.slots:
                    if not slot.is_buffer:
                        slot.free()
            self.progress(size)
            return result

        module.forward = forward

    def _wrap_head(self, module: nn.Linear, ref: TensorRef) -> None:
        """Make the output head read and multiply some rows at a time: it can be larger than a layer."""
        rows, width = module.out_features, module.in_features
        step = max(1, _HEAD_BYTES // (width * self.dtype.itemsize))

        def forward(input: torch.Tensor) -> torch.Tensor:
            out = input.new_empty(*input.shape[:-1], rows)
            for first in range(0, rows, step):
                last = min(first + step, rows)
                shape = torch.Size((last - first, width))
                self._dense.reserve([shape])
                weight = self._dense.take(shape)
                self.weights.read(ref, weight, first, last)
                out[..., first:last] = F.linear(input, weight)
            self.progress(ref.nbytes)
            return out

        module.forward = forward

    def _read_part(self, part: StreamedPart, rows: list[int]) -> None:
        memory = self._dense
        memory.reserve(slot.shape for slot in part.slots if not slot.is_buffer)
        for slot in part.slots:
            tensor = slot.value if slot.is_buffer else memory.take(slot.shape)
            if isinstance(slot.module, nn.Embedding):
                for row in rows:
                    self.weights.read(slot.refs[0], tensor[row], row, row + 1)
            else:
                rows_of_refs = tensor.chunk(len(slot.refs)) if len(slot.refs) > 1 else (tensor,)
                for ref, target in zip(slot.refs, rows_of_refs, strict=True):
                    self.weights.read(ref, target)
            if not slot.is_buffer:
                slot.set(tensor)

    def _wrap_experts(self, module: nn.Module, stack: list[Slot], split: BatchSplit | None) -> None:
        """Make a module of routed experts run a few experts at a time, on the tokens that are routed to them."""
        inner: Callable[..., torch.Tensor] = module.forward
        setups = split.setups(module) if split else [None]
        assert stack[0].site is not None
        count = stack[0].site.count
        moe = self.arch.family.moe
        has_identity_experts = moe is not None and moe.identity_experts_key is not None

        def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Any:
            out = torch.zeros_like(hidden_states)
            batch_parts = [t.chunk(len(setups)) for t in (hidden_states, top_k_index, top_k_weights, out)]
            routed = sorted(set(top_k_index.flatten().tolist()))
            chunks = self._chunks([e for e in routed if e < count], stack)
            # Experts beyond those of the checkpoint are LongCat-Flash's identity experts, which have no weights.
            if routed[-1] >= count:
                chunks.append([(e, e) for e in routed if e >= count])
            reads: deque[Future[list[torch.Tensor]]] = deque()
            for i, self.experts in enumerate(chunks):
                memory = self._chunk_memory
                for turn in range(i + len(reads), min(i + len(memory), len(chunks))):
                    job = (stack, chunks[turn], memory[turn % len(memory)])
                    reads.append(self.threads.submit(self._read_experts, *job))
                for slot, tensor in zip(stack, reads.popleft().result(), strict=True):
                    slot.set(tensor)
                index_in_stack = torch.full((routed[-1] + 1,), -1)
                for expert, at in self.experts:
                    index_in_stack[expert] = at
                for setup, x, index, weights, y in zip(setups, *batch_parts, strict=True):
                    at = index_in_stack[index]
                    token, choice = (at >= 0).nonzero(as_tuple=True)
                    if setup:
                        setup()
                    if len(token):
                        to, weight = at[token, choice, None], weights[token, choice, None]
                        if has_identity_experts:
                            # LongCat-Flash's code fails with one expert for each token: add one with the weight 0.
                            to, weight = to.expand(-1, 2), F.pad(weight, (0, 1))
                        y.index_add_(0, token, inner(x[token], to, weight))
                for slot in stack:
                    slot.free()
            return out

        module.forward = forward

    def _chunks(self, experts: list[int], stack: list[Slot]) -> list[list[tuple[int, int]]]:
        """Divide experts into chunks; each is a list of (expert, its index in the stack)."""
        if self.chunk is None:
            return [[(e, e) for e in experts]]
        size = sum(slot.shape[1:].numel() for slot in stack) * self.dtype.itemsize
        step = max(1, self.chunk // size)
        return [[(e, at) for at, e in enumerate(experts[i : i + step])] for i in range(0, len(experts), step)]

    def _read_experts(self, stack: list[Slot], chunk: list[tuple[int, int]], memory: BufferPool) -> list[torch.Tensor]:
        """Read the stacked parameters of a chunk of experts into `memory`."""
        assert stack[0].site is not None
        count = stack[0].site.count
        stored = [pair for pair in chunk if pair[0] < count]
        shapes = [s.shape if self.chunk is None else torch.Size((len(stored), *s.shape[1:])) for s in stack]
        memory.reserve(shapes)
        tensors = []
        for slot, shape in zip(stack, shapes, strict=True):
            assert slot.site is not None
            height, tensor = slot.site.shape[0], memory.take(shape)
            for expert, at in stored:
                if slot.is_fused:
                    self.weights.read(slot.refs[0], tensor[at], expert * height, (expert + 1) * height)
                    continue
                parts = len(slot.refs) // count  # 2 for gate and up
                for i, half in enumerate(tensor[at].chunk(parts)):
                    self.weights.read(slot.refs[expert * parts + i], half)
            tensors.append(tensor)
        return tensors


def _part_paths(model: nn.Module, decoder: str) -> list[str]:
    """Return the paths of the decoder layers and of all other modules of the language model that have weights."""
    paths: list[str] = []
    for name, child in model.get_submodule(decoder).named_children():
        path = f"{decoder}.{name}"
        is_list = isinstance(child, nn.ModuleList)
        paths += [f"{path}.{i}" for i in range(len(child))] if is_list else [path]
    paths += [name for name, _ in model.named_children() if not decoder.startswith(name)]
    return [path for path in paths if model.get_submodule(path).state_dict()]


@contextmanager
def placeholders(streamed: StreamedModel) -> Iterator[None]:
    """Within this context, every parameter is on the CPU, though without memory of its own.

    PEFT creates adapters on the device of the base's weights, and loses them on the meta device.  A parameter that
    PEFT replaces within the context (`modules_to_save`) becomes `Slot.trained`.
    """
    placed = {}
    for slot in streamed.slots():
        if not slot.is_buffer:
            slot.set(torch.zeros((), dtype=torch.float32).expand(slot.shape))
            placed[slot] = slot.value
    yield
    for slot, tensor in placed.items():
        if slot.value is not tensor:
            slot.trained = slot.value.data.to(streamed.dtype)
        slot.set(torch.empty(slot.shape, device="meta"))
