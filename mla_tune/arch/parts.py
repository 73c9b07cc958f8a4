"""`Part`: a weight in the family table that is not one of the common matrices, described by its path and shape alone.

A shape is written in dimension letters, as a product or a sum of products: ("H*P+H*R", "L").  The letters of
`mla_tune.arch.roles` may be used, and those that `arch.config.letters_of_family` (text models) or a
`multimodal.Tower` defines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from mla_tune.arch.roles import Role


@dataclass(frozen=True, slots=True)
class Part:
    """One weight.  A vector (one dimension) is counted in totals but gets no `Site`."""

    path: str
    """Path below the module that the part belongs to."""
    shape: tuple[str, ...]
    """Dimensions in letters, (out, in) for a matrix.  The inner dimensions of a convolution are multiplied into one."""
    role: Role | None = None
    """The role of a matrix; None for a vector."""
    bias: bool = False
    """Whether a bias of the first dimension comes with it."""
    is_parameter: bool = False
    """Whether `path` names the parameter itself, and not a module with a `weight`."""


def evaluate_size(expression: str, letters: Mapping[str, int]) -> int:
    """Return the number that a size in letters stands for: "H*P+H*R" with H=2, P=3, R=4 is 14."""
    return sum(prod(int(t) if t.isdigit() else letters[t] for t in term.split("*")) for term in expression.split("+"))


def parameter_count(part: Part, letters: Mapping[str, int]) -> int:
    """Return the number of parameters of a part, with its bias."""
    sizes = [evaluate_size(e, letters) for e in part.shape]
    return prod(sizes) + (sizes[0] if part.bias else 0)
