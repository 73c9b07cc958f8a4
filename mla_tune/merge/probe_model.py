"""A transformers model whose weights are read from a checkpoint piece by piece, while it computes.

The model is built from config.json without weights.  A piece (the embedding, a decoder layer, the last norm, the head)
gets its weights right before it runs and gives them back right after; of routed experts only those that are sent a
token are read, and of the embedding the rows of the tokens.  So a plain `model(input_ids)` of a model of any size needs
the memory of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from mla_tune.arch.site import Architecture, Site
from mla_tune.checkpoint.index import Checkpoint, TensorRef, nearest
from mla_tune.errors import CheckError
from mla_tune.merge.proof_values import TORCH, Reader, Values, matrix_shape

#: Numbers read and converted at once: they stay in a core's cache.
_BLOCK = 1 << 19
#: The two ends of tied embeddings: where a checkpoint has one of them, it is the other too.
_TIED = {"lm_head.weight": "model.embed_tokens.weight", "model.embed_tokens.weight": "lm_head.weight"}


def build(checkpoint: Checkpoint, arch: Architecture, attention: str) -> PreTrainedModel:
    """The model of config.json in float32 with parameters on the meta device and real buffers, as if not quantised."""
    left_out = ("quantization_config", "compression_config", "auto_map", "model_type")
    settings = {k: v for k, v in checkpoint.config.items() if k not in left_out}
    config = CONFIG_MAPPING[arch.family.model_type].from_dict(settings)
    with init_empty_weights(include_buffers=False):
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


@dataclass(eq=False)
class Slot:
    """Where one parameter or persistent buffer is kept, and the tensors of the checkpoint that hold it.

    The module stays the same one when PEFT wraps it.  `trained` is what an adapter puts in its place.  `read` are the
    experts read so far into a stack.
    """

    module: nn.Module
    leaf: str
    name: str
    shape: torch.Size
    refs: list[TensorRef]
    is_buffer: bool
    site: Site | None = None
    trained: torch.Tensor | None = None
    read: set[int] = field(default_factory=set)

    @property
    def fused(self) -> bool:
        """One tensor on disk holds the whole parameter, as it does for all but stacks of experts."""
        return self.site is None or self.refs[0].key == self.name

    @property
    def value(self) -> torch.Tensor:
        return getattr(self.module, self.leaf)

    def put(self, tensor: torch.Tensor) -> None:
        self.module._parameters[self.leaf] = nn.Parameter(tensor, requires_grad=False)


@dataclass(eq=False)
class Piece:
    """What is filled and emptied at once: `stacks` are the experts in it, by the path of their module."""

    path: str
    slots: list[Slot] = field(default_factory=list)
    stacks: dict[str, list[Slot]] = field(default_factory=dict)


class Pool:
    """Memory of stacks of experts, handed from layer to layer: fresh pages cost as much time as what is put there."""

    def __init__(self) -> None:
        self._free: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}

    def take(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        free = self._free.get((shape, dtype))
        return free.pop() if free else torch.empty(shape, dtype=dtype)

    def give(self, tensor: torch.Tensor) -> None:
        self._free.setdefault((tensor.shape, tensor.dtype), []).append(tensor)

    def clear(self) -> None:
        self._free.clear()


#: Runs a piece whose weights are there: called with its path, its module, its own forward, and the arguments.
Run = Callable[..., Any]


class Streamed:
    """A model of `build`, its weights from `weights`, computing in `dtype`."""

    def __init__(self, model: PreTrainedModel, arch: Architecture, weights: Weights, dtype: torch.dtype, pool: Pool):
        self.model, self.weights, self.dtype, self.pool = model, weights, dtype, pool
        self.pieces = {path: Piece(path) for path in _piece_paths(model)}
        self.hit: list[int] = []
        stacks = {site.path: site for site in arch if site.is_experts}
        for slot in _slots(model, weights, stacks):
            path = next((p for p in self.pieces if slot.name.startswith(f"{p}.")), None)
            if path is None:
                raise CheckError(f"'{slot.name}' of {type(model).__name__} is in no part of the model that is known")
            if slot.site is None:
                self.pieces[path].slots.append(slot)
            else:
                self.pieces[path].stacks.setdefault(slot.name.rpartition(".")[0], []).append(slot)

    def slots(self) -> Iterator[Slot]:
        for piece in self.pieces.values():
            yield from piece.slots
            for stack in piece.stacks.values():
                yield from stack

    def stream(self, tokens: torch.Tensor, run: Run | None = None) -> None:
        """From now on the model fills its pieces itself.  `tokens` are those that it will be given."""
        rows = sorted(set(tokens.flatten().tolist()))
        for piece in self.pieces.values():
            module = self.model.get_submodule(piece.path)
            self._wrap(module, piece, rows, run)
            for path, stack in piece.stacks.items():
                self._wrap_experts(self.model.get_submodule(path), stack)

    def _wrap(self, module: nn.Module, piece: Piece, rows: list[int], run: Run | None) -> None:
        inner: Callable[..., Any] = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not piece.stacks:
                self.pool.clear()
            try:
                self._fill(piece, rows)
                return inner(*args, **kwargs) if run is None else run(piece, module, inner, args, kwargs)
            finally:
                self._empty(piece)

        module.forward = forward

    def _wrap_experts(self, module: nn.Module, stack: list[Slot]) -> None:
        inner: Callable[..., Any] = module.forward

        def forward(hidden: torch.Tensor, top_k_index: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.hit = sorted(set(top_k_index.flatten().tolist()))
            for slot in stack:
                self._fill_experts(slot)
            return inner(hidden, top_k_index, *args, **kwargs)

        module.forward = forward

    def _fill(self, piece: Piece, rows: list[int]) -> None:
        for slot in piece.slots:
            (ref,) = slot.refs
            if slot.is_buffer:
                self.weights.read(ref, slot.value)
                continue
            tensor = torch.empty(slot.shape, dtype=self.dtype)
            if isinstance(slot.module, nn.Embedding):
                for row in rows:
                    self.weights.read(ref, tensor[row], row, row + 1)
            else:
                self.weights.read(ref, tensor)
            slot.put(tensor)
        for stack in piece.stacks.values():
            for slot in stack:
                slot.put(self.pool.take(slot.shape, self.dtype))

    def _fill_experts(self, slot: Slot) -> None:
        assert slot.site is not None
        count = slot.site.count
        new = [e for e in self.hit if e < count and e not in slot.read]
        slot.read.update(new)
        tensor, height = slot.value, slot.site.shape[0]
        if slot.fused:
            jobs = [(slot.refs[0], tensor[e], e * height, (e + 1) * height) for e in new]
        else:
            parts = len(slot.refs) // count  # 2 for gate and up
            halves = [(e * parts + i, half) for e in new for i, half in enumerate(tensor[e].chunk(parts))]
            jobs = [(slot.refs[i], half, 0, None) for i, half in halves]
        for job in jobs:
            self.weights.read(*job)

    def _empty(self, piece: Piece) -> None:
        for stack in piece.stacks.values():
            for slot in stack:
                if not slot.value.is_meta:
                    self.pool.give(slot.value.data)
                slot.read.clear()
                slot.put(torch.empty(slot.shape, device="meta"))
        for slot in piece.slots:
            if not slot.is_buffer:
                slot.put(torch.empty(slot.shape, device="meta"))


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
