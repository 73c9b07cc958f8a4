"""What a user may choose about a merge: the options of `merge-absorb`, and which values they can have."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mla_tune.errors import InputError

#: Value of `dtype` → the name of the dtype in safetensors files.
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
CHOICES = {
    "absorb": ("split", "fold", "none"),
    "dtype": ("keep", *DTYPES),
    "quantized": ("dequantize", "keep"),
    "round": ("nearest", "stochastic"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """The options that decide what a merge writes."""

    #: Absorbed tensors beside the checkpoint: `split` (W_UK and W_UV), `fold` (W_QK and W_VO), or `none`.
    absorb: str = "split"
    #: Dtype of the merged weights: float32, bfloat16, float16, or `keep`, that of the base.
    dtype: str = "keep"
    #: Changed weights that the base holds quantized: `dequantize` writes them in bfloat16, `keep` quantizes them again.
    quantized: str = "dequantize"
    #: Compute W + ΔW in float64 instead of float32.
    exact: bool = False
    #: How sums are rounded to the dtype that is written: to the `nearest` number, or `stochastic` from `seed`.
    round: str = "nearest"
    seed: int = 0
    #: Write an output head that is tied to the embedding as a tensor of its own.
    untie_embeddings: bool = False
    #: Share files that don't change with the base (as reflinks or hard links) where the disk can.
    link: bool = True
    #: Merge adapters on MTP layers too, which transformers does not load.
    mtp: bool = False

    def check(self) -> None:
        """Raise `InputError` for a value that is not allowed, and for two that contradict each other."""
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise InputError(f"--{name} {value}: allowed are {', '.join(allowed)}")
        if self.dtype != "keep" and self.quantized == "keep":
            raise InputError(f"--dtype {self.dtype} writes every weight in {self.dtype}: leave --quantized keep out")

    def to_json(self) -> dict[str, Any]:
        """The options as the manifest keeps them."""
        return asdict(self)
