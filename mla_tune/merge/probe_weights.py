"""Weights of a checkpoint that a model reads while it computes: no layer, and no expert, is ever held in memory.

A `StoredWeight` is a tensor of which only the shape exists.  transformers and PEFT take it for a parameter; what
touches it decides how much is read: a linear layer some rows at a time, an embedding the rows of its tokens, a stack of
experts those experts that a token was routed to.  Anything else gets the whole matrix for the length of that operation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F

from mla_tune.checkpoint.index import TensorRef
from mla_tune.merge.proof_values import Reader, Values, matrix_shape

#: Numbers read and multiplied at once: float32 and stored form together fit the cache of a core.
PIECE = 1 << 18


class Source(ABC):
    """Where the numbers of a weight come from.  `shape` is (out, in), or (E, out, in) for a stack of experts."""

    shape: tuple[int, ...]

    @abstractmethod
    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Rows [begin, end) as float32 (rows, in); a stack is seen as one matrix of E·out rows.  Valid until the next
        call."""

    def part(self, expert: int) -> Source:
        """The matrix of one expert of a stack."""
        return _Rows(self, expert * self.shape[1], (expert + 1) * self.shape[1])

    def whole(self) -> torch.Tensor:
        """All of it as float32, in memory of its own."""
        result = torch.empty(self.shape)
        flat = result.view(matrix_shape(self.shape))
        for begin, end in pieces(*flat.shape):
            flat[begin:end] = self.rows(begin, end)
        return result


def pieces(rows: int, columns: int) -> list[tuple[int, int]]:
    """Row ranges of about `PIECE` numbers each."""
    step = max(1, PIECE // max(1, columns))
    return [(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


class Stored(Source):
    """One tensor of a checkpoint; FP8 is turned into numbers (`merge.proof_values`)."""

    def __init__(self, values: Values, reader: Reader, ref: TensorRef) -> None:
        self.values, self.reader, self.ref, self.shape = values, reader, ref, ref.shape

    def rows(self, begin: int, end: int) -> torch.Tensor:
        raw = self.reader.rows(self.ref, begin, end, "piece")
        return self.values.of(self.ref, raw, begin, end, torch.float32)


class Stacked(Source):
    """Matrices of equal width on top of each other: gate and up of one expert."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources
        self.shape = (sum(s.shape[0] for s in sources), sources[0].shape[1])

    def rows(self, begin: int, end: int) -> torch.Tensor:
        found, first = [], 0
        for source in self.sources:
            last = first + source.shape[0]
            if begin < last and first < end:
                found.append(source.rows(max(begin - first, 0), min(end, last) - first))
            first = last
        return found[0] if len(found) == 1 else torch.cat(found)


class Experts(Source):
    """One source an expert.  `total` counts the identity experts too, for which LongCat-Flash's parameter has room and
    no checkpoint has a weight; they stand for zeros, and nothing reads them."""

    def __init__(self, sources: Sequence[Source], total: int) -> None:
        self.sources, self.shape = sources, (total, *sources[0].shape)

    def part(self, expert: int) -> Source:
        return self.sources[expert]

    def rows(self, begin: int, end: int) -> torch.Tensor:
        out, found = self.shape[1], []
        while begin < end:
            expert, row = divmod(begin, out)
            last = min(out, row + end - begin)
            known = expert < len(self.sources)
            found.append(self.sources[expert].rows(row, last) if known else torch.zeros(last - row, self.shape[2]))
            begin += last - row
        return found[0] if len(found) == 1 else torch.cat(found)


@dataclass
class _Rows(Source):
    """Rows [begin, end) of another source."""

    source: Source
    begin: int
    end: int

    def __post_init__(self) -> None:
        self.shape = (self.end - self.begin, self.source.shape[-1])

    def rows(self, begin: int, end: int) -> torch.Tensor:
        return self.source.rows(self.begin + begin, self.begin + end)


class Updated(Source):
    """W + alpha · left @ right for a stack of experts: W (E, out, in), left (E, out, r), right (E, r, in)."""

    def __init__(self, source: Source, left: torch.Tensor, right: torch.Tensor, alpha: float) -> None:
        self.source, self.left, self.right, self.alpha, self.shape = source, left, right, alpha, source.shape

    def part(self, expert: int) -> Source:
        return _UpdatedPart(self.source.part(expert), self.left[expert], self.right[expert], self.alpha)

    def rows(self, begin: int, end: int) -> torch.Tensor:
        out, found = self.shape[1], []
        while begin < end:
            expert, row = divmod(begin, out)
            last = min(out, row + end - begin)
            found.append(self.part(expert).rows(row, last).clone())
            begin += last - row
        return torch.cat(found)


class _UpdatedPart(Source):
    def __init__(self, source: Source, left: torch.Tensor, right: torch.Tensor, alpha: float) -> None:
        self.source, self.left, self.right, self.alpha, self.shape = source, left, right, alpha, source.shape

    def rows(self, begin: int, end: int) -> torch.Tensor:
        return torch.addmm(self.source.rows(begin, end), self.left[begin:end], self.right, alpha=self.alpha)


class StoredWeight(torch.Tensor):
    """A parameter without storage, on the CPU and in float32 for whoever asks; see the module's docstring."""

    source: Source

    @staticmethod
    def __new__(cls, source: Source) -> StoredWeight:
        weight = torch.Tensor._make_wrapper_subclass(cls, source.shape, dtype=torch.float32, device="cpu")
        weight.source = source
        weight._is_param = True  # isinstance(…, torch.nn.Parameter), as torch does for other subclasses
        return weight

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _READS and (result := _READS[func](*args, **kwargs)) is not NotImplemented:
            return result
        args = [_whole(a) for a in args]
        kwargs = {name: _whole(a) for name, a in kwargs.items()}
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.set_.source_Tensor and args[0] is args[1]:
            return args[0]  # `register_parametrization` of what it found; set_ asks `__torch_function__` nothing
        raise TypeError(f"{func} reached a weight that has no storage")  # a fault of `__torch_function__`


def _whole(value: Any) -> Any:
    if isinstance(value, StoredWeight):
        return value.source.whole()
    return [_whole(v) for v in value] if isinstance(value, list) else value


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (…, in), weight (out, in) → (…, out), some rows of the weight at a time."""
    if not isinstance(weight, StoredWeight):
        return NotImplemented
    source, flat = weight.source, x.reshape(-1, x.shape[-1]).T.contiguous()
    rows, columns = source.shape
    result = x.new_empty(rows, flat.shape[1])
    for begin, end in pieces(rows, columns):
        torch.mm(source.rows(begin, end), flat, out=result[begin:end])
    out = result.T.contiguous().view(*x.shape[:-1], rows)
    return out if bias is None else out + bias


def _embedding(ids: torch.Tensor, weight: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
    assert isinstance(weight, StoredWeight)
    rows = torch.cat([weight.source.rows(i, i + 1).clone() for i in ids.flatten().tolist()])
    return rows.view(*ids.shape, -1)


def _item(weight: torch.Tensor, index: Any) -> Any:
    single = isinstance(index, int) or (isinstance(index, torch.Tensor) and index.ndim == 0)
    if not (isinstance(weight, StoredWeight) and weight.ndim == 3 and single):
        return NotImplemented
    return StoredWeight(weight.source.part(int(index)))


def _baddbmm(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> Any:
    if not isinstance(weight, StoredWeight) or beta != 1:
        return NotImplemented
    return StoredWeight(Updated(weight.source, left, right, alpha))


def _same(weight: torch.Tensor, *_args: Any) -> torch.Tensor:
    return weight


#: Operations that need to read less than everything, or nothing.
_READS: dict[Any, Callable[..., Any]] = {
    F.linear: linear,
    F.embedding: _embedding,
    torch.Tensor.__getitem__: _item,
    torch.baddbmm: _baddbmm,
    # What `torch.nn.utils.parametrize`, `requires_grad_` and `deepcopy` do to a parameter leaves it as it is.
    torch.Tensor.detach: _same,
    torch.Tensor.__deepcopy__: _same,
    torch.Tensor.data.__get__: _same,  # type: ignore[attr-defined]
    torch.Tensor.numel: lambda weight: prod(weight.shape),
    torch.Tensor.__repr__: lambda weight, **_: f"StoredWeight{tuple(weight.shape)}",
}
_PROPERTIES = ("shape", "dtype", "device", "requires_grad", "ndim", "layout", "is_leaf", "grad", "grad_fn", "is_meta")
#: What is known without reading.
_FACTS = {
    torch.Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
    torch.Tensor.requires_grad_,
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
    torch.is_floating_point,
    torch.is_complex,
    *(getattr(torch.Tensor, name).__get__ for name in _PROPERTIES),
}
