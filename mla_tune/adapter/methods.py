"""Adapter methods: `AdapterMethod`, and its instances LoRA, rsLoRA and DoRA.

    LoRA     W' = W + s·B·A, s = alpha/r                   Hu et al., arXiv:2106.09685, section 4.1
    rsLoRA   the same with s = alpha/√r                    Kalajdzievski, arXiv:2312.03732, section 3
    DoRA     W' = m ⊙ (W + s·B·A) / ‖W + s·B·A‖            Liu et al., arXiv:2402.09353; one norm for each row

A (r, in), B (out, r), m (out).  `sockets.ADAPTER_METHODS` holds the methods under the names that `adapter.method` of a
recipe may have.  A method says which settings and limits it has and how a merge computes W'.  The proof
(`verification.exact_sum`) and absorbed decoding (`inference.lora_tensors`) compute each method with their own code.
This module imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mla_tune.sockets import ADAPTER_METHODS

if TYPE_CHECKING:
    import numpy as np

#: Name of DoRA's magnitude m in an adapter file, after the module's path.
MAGNITUDE = "lora_magnitude_vector"


def scaling(alpha: float, rank: int, rslora: bool) -> float:
    """Return the factor s on B·A: alpha/r, or alpha/√r with rsLoRA."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


@dataclass(frozen=True, eq=False, kw_only=True)
class AdapterMethod:
    """An adapter method of the LoRA kind: low-rank factors A and B, and possibly vectors beside them."""

    name: str
    """Its name in `adapter.method` of a recipe."""
    title: str
    """The name that people use."""
    summary: str
    """One sentence on what it does, for documentation."""
    switches: Sequence[str] = ()
    """Settings of PEFT's LoraConfig (and of adapter_config.json) that are true for this method and false for others."""
    vectors: Sequence[str] = ()
    """Names, after the module's path, of the vectors (out) that are trained beside A and B."""
    excludes: Sequence[str] = ()
    """Settings of adapter_config.json that it can't be combined with."""
    additive: bool = True
    """Whether W' is W plus an update, so that a merge can add several adapters on one matrix, with weights."""
    through_parameters: bool = True
    """Whether PEFT can adapt a parameter with it (`target_parameters`), and not only a module."""
    on_experts: bool = True
    """Whether PEFT has it for stacks of routed experts."""
    keeps_weight: bool = False
    """Whether training through a parameter keeps W' of the whole matrix for the backward pass (the memory estimate
    counts it)."""
    unsupported_on_quantized: str = ""
    """Why it can't be trained on a base that stays quantized; empty if it can."""
    sharded: bool = True
    """Whether it is supported (and tested) when FSDP2 or ZeRO-3 shards the model."""

    def matches(self, settings: Mapping[str, Any]) -> bool:
        """Return whether all switches of this method are on in an adapter_config.json."""
        return all(settings.get(switch) for switch in self.switches)

    def scale(self, alpha: float, rank: int) -> float:
        """Return s, the factor on B·A, for this alpha and rank."""
        return scaling(alpha, rank, rslora="use_rslora" in self.switches)

    def params(self, lora_params: int, out: int) -> int:
        """Return the trained parameters of one matrix: `lora_params` of A and B, and `out` for each vector."""
        return lora_params + out * len(self.vectors)

    def finish(self, merged: np.ndarray, vectors: Mapping[str, np.ndarray]) -> None:
        """Turn rows of W + Σ s·B·A into rows of W', in place; by default they are that already.

        `merged` (n, in) holds floats, `vectors` the n numbers of each of `self.vectors` for these rows.
        """


@dataclass(frozen=True, eq=False, kw_only=True)
class _Dora(AdapterMethod):
    def finish(self, merged: np.ndarray, vectors: Mapping[str, np.ndarray]) -> None:
        import numpy as np

        norms = np.sqrt(np.einsum("ij,ij->i", merged, merged))
        merged *= (vectors[MAGNITUDE] / norms)[:, None]


LORA = AdapterMethod(name="lora", title="LoRA", summary="W' = W + (alpha/r)·B·A.")
RSLORA = AdapterMethod(
    name="rslora",
    title="rsLoRA",
    summary="LoRA scaled by alpha/√r, so that a larger rank does not weaken the update.",
    switches=("use_rslora",),
)
DORA = _Dora(
    name="dora",
    title="DoRA",
    summary="LoRA on the direction of each row of W, and a trained magnitude for each row.",
    switches=("use_dora",),
    vectors=(MAGNITUDE,),
    excludes=("lora_bias",),
    additive=False,
    through_parameters=False,
    on_experts=False,
    keeps_weight=True,
    unsupported_on_quantized="its magnitudes need the norms of all weights",
    sharded=False,
)


def method_of(settings: Mapping[str, Any]) -> AdapterMethod:
    """Return the method of an adapter with these settings (adapter_config.json).

    If several methods match (DoRA with rsLoRA's scale), it is one with the most switches, and of these the one that was
    registered last.
    """
    matching = [method for method in ADAPTER_METHODS.values() if method.matches(settings)]
    most = max(len(method.switches) for method in matching)
    return [method for method in matching if len(method.switches) == most][-1]


def title_of(settings: Mapping[str, Any]) -> str:
    """Return the name of an adapter's method for people: `lora`, or `dora with rslora's scale`."""
    method = method_of(settings)
    others = [m.name for m in ADAPTER_METHODS.values() if m.switches and m is not method and m.matches(settings)]
    return f"{method.name} with {others[0]}'s scale" if others else method.name


def vector_names() -> tuple[str, ...]:
    """Return the names of the vectors of all methods (`AdapterMethod.vectors`)."""
    return tuple(dict.fromkeys(name for method in ADAPTER_METHODS.values() for name in method.vectors))


def titles() -> str:
    """Return the titles of all methods in a sentence's form: "LoRA, rsLoRA and DoRA"."""
    *most, last = (method.title for method in ADAPTER_METHODS.values())
    return f"{', '.join(most)} and {last}"
