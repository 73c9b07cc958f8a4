"""A transformers model whose weights are read from a checkpoint piece by piece, while it computes.

The model is built from config.json without weights.  A piece (the embedding, a decoder layer, the last norm, the head)
gets its weights right before it runs and gives them back right after; of routed experts only those that are sent a
token are read, and of the embedding the rows of the tokens.  So a plain `model(input_ids)` of a model of any size needs
the memory of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from mla_tune.arch.site import Architecture, Site
from mla_tune.checkpoint.index import Checkpoint, TensorRef, nearest
from mla_tune.errors import CheckError
from mla_tune.merge.proof_values import TORCH, Reader, Values, matrix_shape

#: Numbers read and converted at once: they stay in a core's cache.
_BLOCK = 1 << 19
#: Bytes of experts in memory at a time: few enough for a processor's cache.
CHUNK = 8_000_000
#: The two ends of tied embeddings: where a checkpoint has one of them, it is the other too.
_TIED = {"lm_head.weight": "model.embed_tokens.weight", "model.embed_tokens.weight": "lm_head.weight"}


def build(checkpoint: Checkpoint, arch: Architecture, attention: str) -> PreTrainedModel:
    """The model of config.json in float32 with parameters on the meta device and real buffers, as if not quantised."""
    left_out = ("quantization_config", "compression_config", "auto_map", "model_type")
    settings = {k: v for k, v in checkpoint.config.items() if k not in left_out}
    config = CONFIG_MAPPING[arch.family.model_type].from_dict(settings)
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention, experts_implementation="eager"
        )
    return model.eval()


class Weights:
    """Tensors of a checkpoint as numbers, read into tensors that are there already."""

    def __init__(self, checkpoint: Checkpoint, arch: Architecture) -> None:
        self.checkpoint = checkpoint
        self.values = Values(checkpoint)
        # Of this checkpoint, not of `arch`: a merged one may be untied.
        default = arch.family.defaults.get("tie_word_embeddings", False)
        self.tied = bool(checkpoint.config.get("tie_word_embeddings", default))
        self.reader = Reader()

    def find(self, name: str, site: Site | None) -> list[TensorRef]:
        """The tensors that hold the parameter or buffer `name`: one, or for a stack of experts one for each part.

        Raises `CheckError` where one is missing.
        """
        tensors = self.checkpoint.tensors
        if name in tensors:
            return [tensors[name]]
        if self.tied and _TIED.get(name) in tensors:
            return [tensors[_TIED[name]]]
        keys = site.disk_keys() if site is not None else [name]
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
        rows, columns = matrix_shape(ref.shape)
        end = rows if end is None else end
        target = out.view(end - begin, columns)
        step = max(1, _BLOCK // max(1, columns))
        for first in range(begin, end, step):
            last = min(first + step, end)
            raw = self.reader.rows(ref, first, last, "probe")
            if ref.key in self.values.quantised:
                numbers = self.values.of(ref, raw, first, last, torch.float32)
            else:
                numbers = raw.view(TORCH[ref.dtype]).view(last - first, columns)
            target[first - begin : last - begin].copy_(numbers)


class Sides(Protocol):
    """Runs parts of a batch in different ways."""

    def parts(self, module: nn.Module) -> list[Callable[[], None] | None]:
        """What to call before each equal part of a batch goes through the module: one entry a part."""
        ...


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
        """One tensor on disk holds the whole parameter, as it does for all but stacks of experts."""
        return self.site is None or self.refs[0].key == self.name

    @property
    def value(self) -> torch.Tensor:
        return getattr(self.module, self.leaf)

    def put(self, tensor: torch.Tensor) -> None:
        self.module._parameters[self.leaf] = nn.Parameter(tensor, requires_grad=False)

    def empty(self) -> None:
        # Whoever still holds the parameter (PEFT's parametrisations, until they are collected) keeps no memory with it.
        if not self.value.is_meta:
            self.value.data = torch.empty(0)
        self.put(torch.empty(self.shape, device="meta"))


@dataclass(eq=False)
class Piece:
    """What is filled and emptied at once; `stacks` are the routed experts in it, by the path of their module."""

    path: str
    slots: list[Slot] = field(default_factory=list)
    stacks: dict[str, list[Slot]] = field(default_factory=dict)


class Memory:
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
        begin, self._used = self._used, self._used + _padded(shape.numel())
        return self._all[begin : begin + shape.numel()].view(shape)


def _padded(numbers: int) -> int:
    return -(-numbers // 64) * 64  # rows begin at a cache line


class Streamed:
    """A model of `build`, its weights from `weights`, computing in `dtype`.

    `reader` reads experts ahead.  `chunk` is how many bytes of experts are in memory at a time (twice: one chunk is
    read while another is used); None means all experts of a layer that run, in a stack as large as the model's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        arch: Architecture,
        weights: Weights,
        dtype: torch.dtype,
        reader: Executor,
        chunk: int | None = CHUNK,
    ) -> None:
        self.model, self.arch, self.weights = model, arch, weights
        self.dtype, self.reader, self.chunk = dtype, reader, chunk
        self.pieces = {path: Piece(path) for path in _piece_paths(model)}
        #: Which expert lies where in the stacks at hand.
        self.experts: list[tuple[int, int]] = []
        self._dense, self._ahead = Memory(dtype), (Memory(dtype), Memory(dtype))
        stacks = {site.path: site for site in arch if site.is_experts}
        for slot in _slots(model, weights, stacks):
            path = next((p for p in self.pieces if slot.name.startswith(f"{p}.")), None)
            if path is None:
                raise CheckError(f"'{slot.name}' of {type(model).__name__} is in no part of the model that is known")
            if slot.site is None:
                self.pieces[path].slots.append(slot)
            else:
                self.pieces[path].stacks.setdefault(slot.name.rpartition(".")[0], []).append(slot)

    def release(self) -> None:
        """Give back the memory of the weights: a model, which holds itself in circles, is freed some time later."""
        for memory in (self._dense, *self._ahead):
            memory.reserve([])
        for parameter in self.model.parameters():  # those of adapters
            if not parameter.is_meta:
                parameter.data = torch.empty(0)

    def slots(self) -> Iterator[Slot]:
        for piece in self.pieces.values():
            yield from piece.slots
            for stack in piece.stacks.values():
                yield from stack

    def stream(self, tokens: torch.Tensor, sides: Sides | None = None) -> None:
        """From now on the model fills its pieces itself.  `tokens` are those that it will be given."""
        rows = sorted(set(tokens.flatten().tolist()))
        for piece in self.pieces.values():
            self._wrap(self.model.get_submodule(piece.path), piece, rows)
            for path, stack in piece.stacks.items():
                self._wrap_experts(self.model.get_submodule(path), stack, sides)

    def _wrap(self, module: nn.Module, piece: Piece, rows: list[int]) -> None:
        inner: Callable[..., Any] = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            try:
                self._fill(piece, rows)
                return inner(*args, **kwargs)
            finally:
                for slot in piece.slots:
                    if not slot.is_buffer:
                        slot.empty()

        module.forward = forward

    def _fill(self, piece: Piece, rows: list[int]) -> None:
        memory = self._dense
        memory.reserve(slot.shape for slot in piece.slots if not slot.is_buffer)
        for slot in piece.slots:
            (ref,) = slot.refs
            if slot.is_buffer:
                self.weights.read(ref, slot.value)
                continue
            tensor = memory.take(slot.shape)
            if isinstance(slot.module, nn.Embedding):
                for row in rows:
                    self.weights.read(ref, tensor[row], row, row + 1)
            else:
                self.weights.read(ref, tensor)
            slot.put(tensor)

    def _wrap_experts(self, module: nn.Module, stack: list[Slot], sides: Sides | None) -> None:
        """Run the module for a few experts at a time, on those tokens that are sent to them."""
        inner: Callable[..., torch.Tensor] = module.forward
        parts = sides.parts(module) if sides else [None]
        assert stack[0].site is not None
        count = stack[0].site.count
        zeros = self.arch.family.moe is not None and self.arch.family.moe.identity_experts_key is not None

        def forward(hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
            out = torch.zeros_like(hidden)
            halves = [t.chunk(len(parts)) for t in (hidden, top_k_index, top_k_weights, out)]
            hit = sorted(set(top_k_index.flatten().tolist()))
            chunks = self._chunks([e for e in hit if e < count], stack)
            # Experts beyond those of the checkpoint hand their tokens through (LongCat-Flash).
            if hit[-1] >= count:
                chunks.append([(e, e) for e in hit if e >= count])
            ahead = self.reader.submit(self._read_experts, stack, chunks[0], 0)
            for i, self.experts in enumerate(chunks):
                tensors = ahead.result()
                if i + 1 < len(chunks):
                    ahead = self.reader.submit(self._read_experts, stack, chunks[i + 1], i + 1)
                for slot, tensor in zip(stack, tensors, strict=True):
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

    def _read_experts(self, stack: list[Slot], chunk: list[tuple[int, int]], turn: int) -> list[torch.Tensor]:
        """The stacks of a chunk, in memory that is used again in the next turn but one."""
        assert stack[0].site is not None
        count = stack[0].site.count
        held = [pair for pair in chunk if pair[0] < count]
        shapes = [s.shape if self.chunk is None else torch.Size((len(held), *s.shape[1:])) for s in stack]
        memory, tensors = self._ahead[turn % 2], []
        memory.reserve(shapes)
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


def _piece_paths(model: nn.Module) -> list[str]:
    """The decoder layers, and beside them all that has weights."""
    paths: list[str] = []
    for name, child in model.named_children():
        for inner, grandchild in child.named_children() if name == "model" else [("", child)]:
            path = f"{name}.{inner}".removesuffix(".")
            many = isinstance(grandchild, nn.ModuleList)
            paths += [f"{path}.{i}" for i in range(len(grandchild))] if many else [path]
    return [path for path in paths if model.get_submodule(path).state_dict()]


def _slots(model: nn.Module, weights: Weights, stacks: Mapping[str, Site]) -> Iterator[Slot]:
    """Every parameter and persistent buffer, checked against the headers of the checkpoint."""
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        site = stacks.get(name)
        refs = weights.find(name, site)
        slot = Slot(
            model.get_submodule(path), leaf, name, tensor.shape, refs, not isinstance(tensor, nn.Parameter), site
        )
        _check_shape(slot, weights.checkpoint)
        yield slot


def _check_shape(slot: Slot, checkpoint: Checkpoint) -> None:
    if slot.site is None or slot.fused:
        expected = tuple(slot.shape)
    else:
        parts = len(slot.refs) // slot.site.count
        expected = (slot.site.shape[0] // parts, slot.site.shape[1])
    for ref in slot.refs:
        if ref.shape != expected:
            raise CheckError(f"{checkpoint.folder}: '{ref.key}' is {ref.shape}, and the model needs {expected}")


@contextmanager
def placeholders(streamed: Streamed) -> Iterator[None]:
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
