"""Adapter methods: what LoRA, rsLoRA and DoRA are, in one place.

    LoRA     W' = W + s·B·A, s = alpha/r                   Hu et al., arXiv:2106.09685, section 4.1
    rsLoRA   the same with s = alpha/√r                    Kalajdzievski, arXiv:2312.03732, section 3
    DoRA     W' = m ⊙ (W + s·B·A) / ‖W + s·B·A‖            Liu et al., arXiv:2402.09353; one norm for each row

A (r, in), B (out, r), m (out).  `sockets.ADAPTER_METHODS` holds the methods by the names that `adapter.method` of a
recipe may have.  Settings, limits and the merge's arithmetic are asked of the method.  The proof
(`verification.exact_sum`) and the absorbed runtime (`inference.lora_tensors`) have arithmetic of their own for each.
No torch is imported here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mla_tune.sockets import ADAPTER_METHODS

if TYPE_CHECKING:
    import numpy as np

#: Key of DoRA's magnitude in an adapter file, after the module's path.
MAGNITUDE = "lora_magnitude_vector"


def scaling(alpha: float, rank: int, rslora: bool) -> float:
    """Return the factor s on B·A: alpha/r, or alpha/√r with rsLoRA."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


@dataclass(frozen=True, eq=False, kw_only=True)
class AdapterMethod:
    """One adapter method of the LoRA kind: low-rank factors A and B, and perhaps vectors beside them."""

    #: What `adapter.method` of a recipe calls it.
    name: str
    #: How people write it.
    title: str
    #: One sentence on what it does, for documentation.
    summary: str
    #: Switches of PEFT's LoraConfig (and of adapter_config.json) that are on for this method and off for others.
    switches: Sequence[str] = ()
    #: Vectors of `out` numbers that are trained beside A and B: their keys after the module's path.
    vectors: Sequence[str] = ()
    #: Settings of adapter_config.json with which it can't be combined.
    excludes: Sequence[str] = ()
    #: W' is W plus a change, so that several adapters on one matrix add up and can be given weights.
    additive: bool = True
    #: PEFT can adapt a parameter with it (`target_parameters`), not only a module.
    through_parameters: bool = True
    #: PEFT has it for stacks of routed experts.
    on_experts: bool = True
    #: Training through a parameter keeps W' of the whole matrix for the backward pass (preflight counts it).
    keeps_weight: bool = False
    #: Why it can't be trained on a base that stays quantized; empty if it can.
    unsupported_on_quantized: str = ""
    #: Tested where FSDP2 or ZeRO-3 shards the model.
    sharded: bool = True

    def matches(self, settings: Mapping[str, Any]) -> bool:
        """Whether the switches of this method are on in an adapter_config.json."""
        return all(settings.get(switch) for switch in self.switches)

    def scale(self, alpha: float, rank: int) -> float:
        """Return s, the factor on B·A, for a matrix of this alpha and rank."""
        return scaling(alpha, rank, rslora="use_rslora" in self.switches)

    def params(self, lora_params: int, out: int) -> int:
        """Return the number of trained parameters of one matrix: `lora_params` of A and B, and `out` a vector."""
        return lora_params + out * len(self.vectors)

    def finish(self, merged: np.ndarray, vectors: Mapping[str, np.ndarray]) -> None:
        """Turn rows of W + Σ s·B·A into rows of W', in place.

        `merged` (n, in) are floats; `vectors` holds the n numbers of each of `self.vectors` for these rows.
        The default leaves them: W' = W + s·B·A.
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

    Where the switches of several are on (DoRA with rsLoRA's scale), it is the one that was registered last.
    """
    matching = [method for method in ADAPTER_METHODS.values() if method.matches(settings)]
    most = max(len(method.switches) for method in matching)
    return [method for method in matching if len(method.switches) == most][-1]


def title_of(settings: Mapping[str, Any]) -> str:
    """Name the method of an adapter in the words of a recipe: `lora`, or `dora with rslora's scale`."""
    method = method_of(settings)
    other = [m.name for m in ADAPTER_METHODS.values() if m.switches and m is not method and m.matches(settings)]
    return f"{method.name} with {other[0]}'s scale" if other else method.name


def vector_names() -> tuple[str, ...]:
    """List the vectors beside A and B of all methods, as adapter files call them."""
    return tuple(dict.fromkeys(name for method in ADAPTER_METHODS.values() for name in method.vectors))


def titles() -> str:
    """List the methods as people write them: "LoRA, rsLoRA and DoRA"."""
    *most, last = (method.title for method in ADAPTER_METHODS.values())
    return f"{', '.join(most)} and {last}"
