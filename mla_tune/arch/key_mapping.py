"""`KeyMapping`: from a name in transformers' module tree to the keys that a checkpoint may use for it.

Adapter keys of PEFT follow the module tree (after `base_model.model.`), but checkpoints of some families have names of
their own.  A family may have several naming variants: what was published, and what transformers writes when it saves a
model, which is not always the same.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass
from functools import cache

#: (regular expression, replacement) pairs, applied one after another.
Renames = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class KeyMapping:
    """How the checkpoints of a family name their weights."""

    variants: tuple[Renames, ...] = ((),)
    """One entry per naming variant: renames from the module tree to the disk.  Published checkpoints use the first."""
    experts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Names of an expert's (gate, up, down) matrices where a checkpoint stores each expert by itself."""
    splits: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Modules whose parameters are split by rows on disk: (the module's own name, the names of its pieces)."""

    def candidates(self, name: str) -> tuple[str, ...]:
        """Return every name that the parameter or module `name` may have on disk, the published one first."""
        return _candidates(self.variants, name)

    def on_disk(self, name: str, keys: Container[str]) -> str:
        """Return the first candidate that is in `keys`, or the published name if none is."""
        names = self.candidates(name)
        return next((n for n in names if n in keys), names[0])

    def tensors(self, name: str, keys: Container[str]) -> list[str]:
        """Return the keys that together hold the parameter `name`: one key, or its pieces in the order of their rows.

        A parameter that `keys` does not hold in any form gets its most likely key or keys.
        """
        single = self.on_disk(name, keys)
        if single in keys:
            return [single]
        module, _, leaf = name.rpartition(".")
        parent, _, module_name = module.rpartition(".")
        for split, pieces in self.splits:
            if module_name == split:
                return [self.on_disk(f"{parent}.{piece}.{leaf}", keys) for piece in pieces]
        return [single]


@cache
def _candidates(variants: tuple[Renames, ...], name: str) -> tuple[str, ...]:
    found = []
    for renames in (*variants, ()):  # the name in the module tree itself may be on disk, too
        renamed = name
        for pattern, replacement in renames:
            renamed = re.sub(pattern, replacement, renamed)
        found.append(renamed)
    return tuple(dict.fromkeys(found))
