"""Names of weights on disk from those in transformers' module tree.

Three namespaces: PEFT's keys follow the module tree (with `base_model.model.` in front), checkpoints have names of
their own in some families.  A family gives one or more ways to write them: as it was published, and as transformers
writes it when it saves, which is not always the same.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass
from functools import cache

#: Replacements by regular expression, in order.
Renames = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class KeyMapping:
    """`ways`: each a list of replacements on a name in the module tree; the first is that of published checkpoints.

    `experts` are names of an expert's (gate, up, down) in files that hold experts apart, `splits` parameters that are
    cut by rows into several tensors on disk: last part of the module's path → those on disk.
    """

    ways: tuple[Renames, ...] = ((),)
    experts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    splits: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def candidates(self, name: str) -> tuple[str, ...]:
        """Every name that the parameter or module `name` may have on disk, the most likely first."""
        return _candidates(self.ways, name)

    def on_disk(self, name: str, keys: Container[str]) -> str:
        """The first candidate that is among `keys`, else the most likely one."""
        names = self.candidates(name)
        return next((n for n in names if n in keys), names[0])

    def tensors(self, name: str, keys: Container[str]) -> list[str]:
        """The keys that hold the parameter `name`: one, or those of its parts in the order of their rows."""
        whole = self.on_disk(name, keys)
        if whole in keys:
            return [whole]
        module, _, leaf = name.rpartition(".")
        stem, _, last = module.rpartition(".")
        for split, parts in self.splits:
            if last == split:
                return [self.on_disk(f"{stem}.{part}.{leaf}", keys) for part in parts]
        return [whole]


@cache
def _candidates(ways: tuple[Renames, ...], name: str) -> tuple[str, ...]:
    found = []
    for way in (*ways, ()):
        renamed = name
        for pattern, replacement in way:
            renamed = re.sub(pattern, replacement, renamed)
        found.append(renamed)
    return tuple(dict.fromkeys(found))
