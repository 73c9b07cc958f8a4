"""What `bench train` compares: mla-tune with each kind of checkpointing, and TRL's SFTTrainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Case:
    """One contender.  `sets`: keys of the recipe (mla-tune); `keys`: what differs from SFTConfig's defaults (TRL)."""

    name: str
    trl: bool = False
    sets: tuple[str, ...] = ()
    keys: dict[str, Any] = field(default_factory=dict)


#: TRL's defaults in 1.16: gradient checkpointing and bfloat16 autocast on.  `fastest` turns both off.
_PLAIN = {"gradient_checkpointing": False, "bf16": False}
CASES: dict[str, Case] = {
    c.name: c
    for c in (
        Case("none", sets=("train.activation_checkpointing=none",)),
        Case("unpacked", sets=("train.activation_checkpointing=none", "train.packing=false")),
        Case("mla", sets=("train.activation_checkpointing=mla",)),
        Case("full", sets=("train.activation_checkpointing=full",)),
        Case("compiled", sets=("train.activation_checkpointing=none", "train.compile=true")),
        Case("trl", trl=True, keys={"packing": False}),
        Case("trl-packed", trl=True, keys={"packing": True}),
        Case("trl-plain", trl=True, keys={"packing": False, **_PLAIN}),
        Case("trl-plain-packed", trl=True, keys={"packing": True, **_PLAIN}),
    )
}
