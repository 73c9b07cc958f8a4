"""`MergeOptions`: the options of `merge-absorb` that decide what is written, and the values that are allowed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mla_tune.errors import InputError

#: Value of `dtype` → the name of the dtype in safetensors files.
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
#: Option → allowed values.
CHOICES = {
    "absorb": ("split", "fold", "none"),
    "dtype": ("keep", *DTYPES),
    "quantized": ("dequantize", "keep"),
    "round": ("nearest", "stochastic"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """The options that decide what a merge writes; the command line has the same names and defaults."""

    absorb: str = "split"
    """Absorbed tensors beside the checkpoint: `split` (W_UK and W_UV), `fold` (W_QK and W_VO), or `none`."""
    dtype: str = "keep"
    """Dtype of the merged weights: float32, bfloat16, float16, or `keep` for that of the base."""
    quantized: str = "dequantize"
    """What becomes of changed weights that the base holds quantized: `dequantize` writes them in bfloat16, `keep`
    quantizes them again."""
    exact: bool = False
    """Compute W + ΔW in float64 instead of float32."""
    round: str = "nearest"
    """How a sum is rounded to the dtype that is written: to the `nearest` number, or `stochastic` (by `seed`)."""
    seed: int = 0
    """Seed of stochastic rounding."""
    untie_embeddings: bool = False
    """Write an output head that is tied to the embedding as a tensor of its own."""
    link: bool = True
    """Share unchanged files with the base (as reflinks or hard links) where the file system can."""
    mtp: bool = False
    """Merge adapters on MTP layers too, which transformers does not load."""

    def check(self) -> None:
        """Raise `InputError` for a value that is not allowed, and for two options that contradict each other."""
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise InputError(f"--{name} {value}: allowed are {', '.join(allowed)}")
        if self.dtype != "keep" and self.quantized == "keep":
            raise InputError(f"--dtype {self.dtype} writes every weight in {self.dtype}: leave out --quantized keep")

    def to_json(self) -> dict[str, Any]:
        """Return the options as the manifest of the output stores them."""
        return asdict(self)
