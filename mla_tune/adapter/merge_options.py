"""What a user may choose about a merge."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mla_tune.errors import InputError

#: `--dtype` → the format's name.
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
CHOICES = {
    "absorb": ("split", "fold", "none"),
    "dtype": ("keep", *DTYPES),
    "fp8": ("bf16", "keep"),
    "round": ("nearest", "stochastic"),
}


@dataclass(frozen=True, slots=True)
class Options:
    """`absorb`: split | fold | none.  `dtype`: keep | float32 | bfloat16 | float16 of the merged weights.  `fp8`: write
    changed FP8 weights as bf16, or keep them FP8 with fresh scales.  `exact`: compute in float64.  `round`: nearest |
    stochastic, from `seed`.  `untie_embeddings`: an output head tied to the embedding becomes a tensor of its own.
    `link`: files that don't change are reflinked or hard-linked where the disk can.  `mtp`: adapters on MTP layers,
    which transformers does not load, are merged too."""

    absorb: str = "split"
    dtype: str = "keep"
    fp8: str = "bf16"
    exact: bool = False
    round: str = "nearest"
    seed: int = 0
    untie_embeddings: bool = False
    link: bool = True
    mtp: bool = False

    def check(self) -> None:
        """Raises `InputError` for a value that is not allowed."""
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise InputError(f"--{name} {value}: allowed are {', '.join(allowed)}")
        if self.dtype != "keep" and self.fp8 == "keep":
            raise InputError(f"--dtype {self.dtype} writes every weight in {self.dtype}: leave --fp8 keep out")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
