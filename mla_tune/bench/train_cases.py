"""The cases that `bench train` compares: mla-tune with each kind of checkpointing, and TRL's SFTTrainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class TrainCase:
    """One case of the comparison."""

    #: Its name in `--cases` and in the table.
    name: str
    #: Whether TRL trains, not mla-tune.
    trl: bool = False
    #: mla-tune: overrides of the recipe, as for `--set`.
    sets: tuple[str, ...] = ()
    #: TRL: arguments of SFTConfig that differ from its defaults.
    config: dict[str, Any] = field(default_factory=dict)


#: TRL's defaults in 1.16: gradient checkpointing and bfloat16 autocast on.  `fastest` turns both off.
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
