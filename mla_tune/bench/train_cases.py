"""The cases that `bench train` compares: mla-tune with each kind of checkpointing, and TRL's SFTTrainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class TrainCase:
    """One case of the comparison."""

    name: str
    """Its name in `--cases` and in the table."""
    trl: bool = False
    """Whether TRL's SFTTrainer trains; otherwise mla-tune does."""
    sets: tuple[str, ...] = ()
    """For mla-tune: overrides of the recipe, as in `--set`."""
    config: dict[str, Any] = field(default_factory=dict)
    """For TRL: arguments of SFTConfig that differ from its defaults."""


#: Turn off gradient checkpointing and bfloat16 autocast, which are on by default in TRL 1.16.
_PLAIN = {"gradient_checkpointing": False, "bf16": False}
#: All cases by name.
CASES: dict[str, TrainCase] = {
    c.name: c
    for c in (
        TrainCase("none", sets=("train.activation_checkpointing=none",)),
        TrainCase("unpacked", sets=("train.activation_checkpointing=none", "train.packing=false")),
        TrainCase("mla", sets=("train.activation_checkpointing=mla",)),
        TrainCase("full", sets=("train.activation_checkpointing=full",)),
        TrainCase("compiled", sets=("train.activation_checkpointing=none", "train.compile=true")),
        TrainCase("trl", trl=True, config={"packing": False}),
        TrainCase("trl-packed", trl=True, config={"packing": True}),
        TrainCase("trl-plain", trl=True, config={"packing": False, **_PLAIN}),
        TrainCase("trl-plain-packed", trl=True, config={"packing": True, **_PLAIN}),
    )
}
