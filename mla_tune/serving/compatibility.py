"""What an inference engine will do with a checkpoint or an adapter: items seen in the files, judged by `engines.json`.

Everything comes from config.json, adapter_config.json and safetensors headers: no torch, no weight is read.  The facts
are in `engines.json` (`engines`), and `items` says what there is to be judged.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_tune.adapter.files import Adapter, LoraDelta
from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.index import Checkpoint
from mla_tune.serving.engines import VERDICTS, Engine, Fact
from mla_tune.serving.items import Item, adapter_items, model_items, observations

_UNKNOWN = "engines.json has no fact on this: compare outputs before you trust it"


@dataclass(frozen=True, slots=True)
class Check:
    """An item and the fact that decides it; no fact means `unknown`."""

    item: Item
    fact: Fact | None

    @property
    def verdict(self) -> str:
        """What the engine does with the item: the fact's verdict, or `unknown` without a fact."""
        return self.fact.verdict if self.fact else "unknown"

    @property
    def says(self) -> str:
        """The sentence of the fact that decides; empty without one."""
        return self.fact.says if self.fact else _UNKNOWN

    def to_json(self) -> dict[str, Any]:
        """The check as `mla-tune serve-check --json` prints it."""
        fact = self.fact
        return {
            "about": self.item.about,
            "subject": self.item.subject,
            "detail": self.item.detail,
            "matrices": self.item.count,
            "verdict": self.verdict,
            "says": self.says,
            "instead": fact.instead if fact else "",
            "versions": fact.source.versions if fact else None,
            "date": fact.source.date if fact else None,
            "source": fact.source.url if fact else None,
            "where": fact.where if fact else None,
            "how": fact.source.how if fact else None,
        }


@dataclass(frozen=True, slots=True)
class CompatibilityReport:
    """All checks of one engine on one model, or on an adapter and its base.

    `launch` are the commands that serve it; for an adapter that can't be served as it is, those that serve the merged
    checkpoint, `merge` being the command that makes it.
    """

    engine: Engine
    model: tuple[Check, ...]
    adapter: tuple[Check, ...]
    merge: str | None
    launch: tuple[str, ...]

    @property
    def checks(self) -> tuple[Check, ...]:
        """All checks, of the model and then of the adapter."""
        return self.model + self.adapter

    @property
    def verdict(self) -> str:
        """The worst verdict of all checks."""
        found = {check.verdict for check in self.checks}
        return next(verdict for verdict in VERDICTS if verdict in found)

    def named(self, verdict: str) -> list[str]:
        """Subjects with this verdict."""
        return [check.item.subject for check in self.checks if check.verdict == verdict]


def check_compatibility(
    engine: Engine, checkpoint: Checkpoint, arch: Architecture, adapter: Adapter | None = None, out: str = "merged"
) -> CompatibilityReport:
    """What `engine` does with `checkpoint`, and with `adapter` on it; `out` is the folder a merge would go to."""
    always = observations(arch)

    def decide(items: Iterable[Item]) -> tuple[Check, ...]:
        return tuple(Check(i, engine.fact(i.about, i.subject, {**always, **i.seen})) for i in items)

    model = decide(model_items(checkpoint, arch))
    if adapter is None:
        return CompatibilityReport(engine, model, (), None, _launch(engine, "model", checkpoint.folder))
    checks = decide(adapter_items(adapter, arch))
    if all(check.verdict in ("applied", "unknown") for check in checks):
        return CompatibilityReport(engine, model, checks, None, _launch(engine, "adapter", checkpoint.folder, adapter))
    merge = shlex.join(["mla-tune", "merge-absorb", str(adapter.folder), "--base", str(checkpoint.folder)])
    merge += f" --out {shlex.quote(out)}"
    return CompatibilityReport(engine, model, checks, merge, _launch(engine, "model", Path(out)))


def _launch(engine: Engine, kind: str, model: Path, adapter: Adapter | None = None) -> tuple[str, ...]:
    """The engine's commands for `model`, the base of `adapter` where there is one."""
    places: dict[str, Any] = dict.fromkeys(("base", "model"), shlex.quote(str(model)))
    places["gguf"] = shlex.quote(f"{model.resolve().name}.gguf")
    if adapter is not None:
        folder = adapter.folder
        name = re.sub(r"\W+", "-", (folder.parent if folder.name == "adapter" else folder).resolve().name) or "adapter"
        top = max((d.rank for d in adapter.deltas), default=1)
        places |= {
            "adapter": shlex.quote(str(folder)),
            "name": name,
            "max_rank": next((r for r in engine.ranks if r >= top), top),
            "modules": " ".join(sorted({leaf for d in adapter.deltas for leaf in _leaves(d)})),
            "adapter_gguf": shlex.quote(f"{name}.gguf"),
        }
    return tuple(command.format(**places) for command in engine.launch[kind])


def _leaves(delta: LoraDelta) -> tuple[str, ...]:
    """Names of the linear layers that a delta sits on, as modules of a model with single experts."""
    leaf = delta.site.path.rpartition(".")[2]
    return ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
