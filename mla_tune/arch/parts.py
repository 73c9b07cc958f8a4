"""Weights that are described by their shape alone: what no adapter sits on, and vectors, which are counted only.

A shape is written in letters, as sums of products: ("H*P+H*R", "L").  Letters are those of `roles`; the rest are given
by whoever has the config.json: `registry` for text models, `wrappers` for towers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from mla_tune.arch.roles import Role


@dataclass(frozen=True, slots=True)
class Part:
    """One weight, at `path` below whatever it is a part of.

    Of one dimension it is a vector: counted, not listed.  A matrix with more dimensions (a convolution) is written with
    its inner ones multiplied.  `bias` adds a vector of the first dimension.  `is_parameter`: the path is that of the
    parameter itself, not of a module with a `weight`.
    """

    path: str
    shape: tuple[str, ...]
    role: Role | None = None
    bias: bool = False
    is_parameter: bool = False


def size(expression: str, letters: Mapping[str, int]) -> int:
    """The number that "H*P+H*R" stands for."""
    return sum(prod(int(t) if t.isdigit() else letters[t] for t in term.split("*")) for term in expression.split("+"))


def numbers(part: Part, letters: Mapping[str, int]) -> int:
    """How many numbers a part holds."""
    sizes = [size(e, letters) for e in part.shape]
    return prod(sizes) + (sizes[0] if part.bias else 0)
