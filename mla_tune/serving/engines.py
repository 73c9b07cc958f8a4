"""Read `engines.json`: the facts on what inference engines do with MLA checkpoints and adapters.

The file is data: a new fact, source, version or engine needs no code.  Its parts:

- `sources`: id → `versions` (the versions that were looked at), `date` (when), `url`, and `how`: `measured` (outputs
  were compared), `source` (read in the engine's code) or `issue` (the engine's issue tracker says so).
- `engines`: id → `title`, `launch` (a list of command templates for an `adapter` and one for a `model`; the words in
  braces are `PLACEHOLDERS`), and `ranks`, where the engine's highest LoRA rank can have certain values only.
- `facts`: engine → list of facts.  A fact has `about`, one of `TOPICS`; `of`, the subjects within the topic; `when`,
  observations that must hold too, each with the values that it may have or `{"min": …, "max": …}`; a `verdict`; `says`,
  the reason in a few words; `source` and `where` in it; and maybe `instead`, what to do about it.

**The first fact that matches decides**: special facts stand before general ones.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from mla_tune.errors import InputError, did_you_mean

FILE = Path(__file__).with_name("engines.json")

#: Verdicts, the worst first.  `dropped`: it loads without an error, and the outputs are not those of the adapter or
#: checkpoint.  `refused`: the engine stops with an error.  `unknown`: no fact.  `applied`: it does what the files say.
VERDICTS = ("dropped", "refused", "unknown", "applied")
#: How a fact was found out, the strongest first.
EVIDENCE = ("measured", "source", "issue")
#: Topic of a fact → the observations that an item of this topic has beside `MODEL_OBSERVATIONS`.
TOPICS: Mapping[str, tuple[str, ...]] = {
    "model": (),
    "adapter": (),
    "role": ("layout", "partner"),
    "setting": ("value",),
    "config": ("value",),
    "layout": ("value", "index", "block", "block_fits"),
}
#: Observations that every item has, because they hold for the whole model (`items.model_observations`).
MODEL_OBSERVATIONS = ("family", "model_type", "layers", "query_compression", "mla_head", "qk_head")
#: Words that a launch template may have in braces.
PLACEHOLDERS = ("base", "adapter", "name", "model", "max_rank", "modules", "gguf", "adapter_gguf")


@dataclass(frozen=True, slots=True)
class FactSource:
    """Where facts come from."""

    id: str
    """Its key in `sources`."""
    versions: str
    """The versions that were looked at."""
    date: str
    """When they were looked at (ISO 8601)."""
    url: str
    """Where to look again."""
    how: str
    """One of `EVIDENCE`."""


@dataclass(frozen=True, slots=True)
class Fact:
    """What one engine does with some subjects of a topic."""

    topic: str
    """One of `TOPICS`."""
    subjects: tuple[str, ...]
    """The subjects that it is about: roles, settings, keys."""
    when: Mapping[str, Any]
    """Observation → the values that it must have one of, or the least and the largest (`min`, `max`)."""
    verdict: str
    """One of `VERDICTS`."""
    says: str
    """The reason, in a few words."""
    source: FactSource
    """Where it comes from."""
    where: str
    """The place in the source; may be empty."""
    instead: str
    """What a user can do about it; may be empty."""

    def matches(self, topic: str, subject: str, seen: Mapping[str, Any]) -> bool:
        """Whether the fact is about this subject, with these observations on it."""
        if topic != self.topic or subject not in self.subjects:
            return False
        return all(_is_allowed(seen.get(name), allowed) for name, allowed in self.when.items())


@dataclass(frozen=True, slots=True)
class Engine:
    """One inference engine."""

    id: str
    """Its name on the command line."""
    title: str
    """Its name as people write it."""
    launch: Mapping[str, tuple[str, ...]]
    """`adapter`, `model` → templates of the commands that serve one."""
    ranks: tuple[int, ...]
    """The values that its highest LoRA rank can have, ascending; empty where any is possible."""
    facts: tuple[Fact, ...]
    """What is known of it, special facts before general ones."""

    def fact(self, topic: str, subject: str, seen: Mapping[str, Any]) -> Fact | None:
        """The first fact that matches; None where engines.json has none."""
        return next((fact for fact in self.facts if fact.matches(topic, subject, seen)), None)


def load_engines(file: Path = FILE) -> dict[str, Engine]:
    """Read all engines of `file` by id.  Raises `InputError` with the place of the first malformed entry."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: can't be read as JSON: {error}") from error
    _keys(data, f"{file}", {"sources": dict, "engines": dict, "facts": dict})
    sources = {name: _source(name, entry, f"{file}: sources.{name}") for name, entry in data["sources"].items()}
    if strange := data["facts"].keys() - data["engines"].keys():
        raise InputError(f"{file}: facts.{min(strange)}: no such engine in 'engines'")
    engines = {}
    for name, entry in data["engines"].items():
        facts = [
            _fact(fact, sources, f"{file}: facts.{name}[{i}]") for i, fact in enumerate(data["facts"].get(name, []))
        ]
        engines[name] = _engine(name, entry, tuple(facts), f"{file}: engines.{name}")
    return engines


def engine_names(file: Path = FILE) -> list[str]:
    """The ids of all engines, for help texts: facts are not checked."""
    return list(json.loads(file.read_text(encoding="utf-8"))["engines"])


def find_engine(name: str, file: Path = FILE) -> Engine:
    """The engine with this id.  Raises `InputError` with the known ids."""
    engines = load_engines(file)
    if name not in engines:
        raise InputError(f"unknown engine '{name}'{did_you_mean(name, engines) or '.'} Known: {', '.join(engines)}")
    return engines[name]


def _is_allowed(value: Any, allowed: Any) -> bool:
    """Whether an observation has one of the values `allowed`, or lies between their `min` and `max`."""
    if isinstance(allowed, dict):
        return isinstance(value, int) and allowed.get("min", value) <= value <= allowed.get("max", value)
    return value in allowed


def _source(name: str, entry: Any, where: str) -> FactSource:
    _keys(entry, where, {"versions": str, "date": str, "url": str, "how": str})
    _one_of(entry["how"], EVIDENCE, f"{where}.how")
    try:
        datetime.date.fromisoformat(entry["date"])
    except ValueError:
        raise InputError(f"{where}.date: {entry['date']!r} is not a date such as 2026-11-23") from None
    if not entry["url"].startswith("https://"):
        raise InputError(f"{where}.url: {entry['url']!r} does not begin with https://")
    return FactSource(name, entry["versions"], entry["date"], entry["url"], entry["how"])


def _engine(name: str, entry: Any, facts: tuple[Fact, ...], where: str) -> Engine:
    _keys(entry, where, {"title": str, "launch": dict}, {"ranks": list})
    _keys(entry["launch"], f"{where}.launch", {"adapter": list, "model": list})
    for kind, commands in entry["launch"].items():
        for command in commands:
            if not isinstance(command, str):
                raise InputError(f"{where}.launch.{kind}: {command!r} is not a command")
            for _, place, _, _ in Formatter().parse(command):
                if place is not None:
                    _one_of(place, PLACEHOLDERS, f"{where}.launch.{kind}")
    launch = {kind: tuple(commands) for kind, commands in entry["launch"].items()}
    return Engine(name, entry["title"], launch, tuple(sorted(entry.get("ranks", []))), facts)


def _fact(entry: Any, sources: Mapping[str, FactSource], where: str) -> Fact:
    needed = {"about": str, "of": list, "verdict": str, "says": str, "source": str}
    _keys(entry, where, needed, {"when": dict, "where": str, "instead": str})
    _one_of(entry["about"], TOPICS, f"{where}.about")
    _one_of(entry["verdict"], VERDICTS, f"{where}.verdict")
    _one_of(entry["source"], sources, f"{where}.source")
    if not entry["of"] or not entry["says"]:
        raise InputError(f"{where}: 'of' or 'says' is empty")
    for name, wanted in entry.get("when", {}).items():
        _one_of(name, (*MODEL_OBSERVATIONS, *TOPICS[entry["about"]]), f"{where}.when")
        if not (isinstance(wanted, list) or (isinstance(wanted, dict) and wanted.keys() <= {"min", "max"})):
            raise InputError(f"{where}.when.{name}: a list of values, or min and max, was expected")
    return Fact(
        entry["about"],
        tuple(entry["of"]),
        entry.get("when", {}),
        entry["verdict"],
        entry["says"],
        sources[entry["source"]],
        entry.get("where", ""),
        entry.get("instead", ""),
    )


def _keys(entry: Any, where: str, needed: Mapping[str, type], optional: Mapping[str, type] | None = None) -> None:
    if not isinstance(entry, dict):
        raise InputError(f"{where}: a table was expected")
    known = {**needed, **(optional or {})}
    for name in needed:
        if name not in entry:
            raise InputError(f"{where}: '{name}' is missing")
    for name, value in entry.items():
        if name not in known:
            raise InputError(f"{where}: unknown key '{name}'{did_you_mean(name, known)}. Known: {', '.join(known)}")
        if not isinstance(value, known[name]):
            raise InputError(f"{where}.{name}: {value!r} is not a {known[name].__name__}")


def _one_of(value: str, allowed: Any, where: str) -> None:
    if value not in allowed:
        raise InputError(f"{where}: '{value}'{did_you_mean(value, allowed)}. Known: {', '.join(allowed)}")
