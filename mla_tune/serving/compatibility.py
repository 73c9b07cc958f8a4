"""Judge a checkpoint or an adapter for one engine: each item gets the verdict of the fact that fits it.

    `items` (what the files hold) × `engines` (facts of engines.json) → Check → CompatibilityReport

Everything comes from config.json, adapter_config.json and safetensors headers: no torch, no weight is read.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_tune.adapter.deltas import Adapter, LoraDelta
from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.index import Checkpoint
from mla_tune.serving.engines import VERDICTS, Engine, Fact
from mla_tune.serving.items import Item, adapter_items, checkpoint_items, model_observations

_NO_FACT = "engines.json has no fact on this: compare outputs before you trust it"


@dataclass(frozen=True, slots=True)
class Check:
    """One item and what the engine does with it."""

    item: Item
    """What is judged."""
    fact: Fact | None
    """The fact that decides; None where engines.json has none that fits."""

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`: that of the fact, or `unknown` without a fact."""
        return self.fact.verdict if self.fact else "unknown"

    @property
    def says(self) -> str:
        """The reason for the verdict, in a few words."""
        return self.fact.says if self.fact else _NO_FACT

    def to_json(self) -> dict[str, Any]:
        """The check as `mla-tune serve-check --json` prints it."""
        fact = self.fact
        return {
            "about": self.item.topic,
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
    """What one engine does with a model, or with an adapter and its base model."""

    engine: Engine
    """The engine."""
    model: tuple[Check, ...]
    """Checks of the model, or of the adapter's base model."""
    adapter: tuple[Check, ...]
    """Checks of the adapter; empty without one."""
    merge: str | None
    """The command that merges the adapter, where the engine can't serve it unmerged; else None."""
    launch: tuple[str, ...]
    """The commands that serve the model, or the adapter on its base; with `merge`, the merged checkpoint."""

    @property
    def checks(self) -> tuple[Check, ...]:
        """All checks, of the model and then of the adapter."""
        return self.model + self.adapter

    @property
    def verdict(self) -> str:
        """The worst verdict of all checks."""
        found = {check.verdict for check in self.checks}
        return next(verdict for verdict in VERDICTS if verdict in found)

    def subjects_with(self, verdict: str) -> list[str]:
        """The subjects of the checks that have this verdict, in order; one may come twice."""
        return [check.item.subject for check in self.checks if check.verdict == verdict]


def check_compatibility(
    engine: Engine, checkpoint: Checkpoint, arch: Architecture, adapter: Adapter | None = None, out: str = "merged"
) -> CompatibilityReport:
    """Judge `checkpoint`, and `adapter` on it where there is one, for `engine`.

    `out` is the folder that the proposed merge command writes to.
    """
    of_model = model_observations(arch)

    def judge(items: Iterable[Item]) -> tuple[Check, ...]:
        return tuple(Check(i, engine.fact(i.topic, i.subject, {**of_model, **i.seen})) for i in items)

    model = judge(checkpoint_items(checkpoint, arch))
    if adapter is None:
        return CompatibilityReport(engine, model, (), None, _launch(engine, "model", checkpoint.folder))
    checks = judge(adapter_items(adapter))
    if all(check.verdict in ("applied", "unknown") for check in checks):
        return CompatibilityReport(engine, model, checks, None, _launch(engine, "adapter", checkpoint.folder, adapter))
    merge = shlex.join(["mla-tune", "merge-absorb", str(adapter.folder), "--base", str(checkpoint.folder)])
    merge += f" --out {shlex.quote(out)}"
    return CompatibilityReport(engine, model, checks, merge, _launch(engine, "model", Path(out)))


def _launch(engine: Engine, kind: str, model: Path, adapter: Adapter | None = None) -> tuple[str, ...]:
    """Fill in the engine's command templates of this `kind`: `model`, or `adapter` for one on its base `model`."""
    values: dict[str, Any] = dict.fromkeys(("base", "model"), shlex.quote(str(model)))
    values["gguf"] = shlex.quote(f"{model.resolve().name}.gguf")
    if adapter is not None:
        folder = adapter.folder
        # The adapter of a run lies in RUN/adapter: the run's name says more.
        name = re.sub(r"\W+", "-", (folder.parent if folder.name == "adapter" else folder).resolve().name) or "adapter"
        highest = max((d.rank for d in adapter.deltas), default=1)
        values |= {
            "adapter": shlex.quote(str(folder)),
            "name": name,
            "max_rank": next((r for r in engine.ranks if r >= highest), highest),
            "modules": " ".join(sorted({leaf for d in adapter.deltas for leaf in _layer_names(d)})),
            "adapter_gguf": shlex.quote(f"{name}.gguf"),
        }
    return tuple(command.format(**values) for command in engine.launch[kind])


def _layer_names(delta: LoraDelta) -> tuple[str, ...]:
    """Names of the linear layers that a delta sits on, as engines name them: gate and up of fused experts apart."""
    leaf = delta.site.path.rpartition(".")[2]
    return ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
