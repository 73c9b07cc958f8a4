"""`engines.json`: what was seen that an inference engine does with MLA checkpoints and adapters.

The file is data: a new fact, source, version or engine needs no code.  Its parts:

- `sources`: id → `versions` (what was looked at), `date` (when), `url`, and `how`: `measured` (outputs were compared),
  `source` (read in the engine's code) or `issue` (said by its tracker).
- `engines`: id → `title`, `launch` (one list of command templates for an `adapter`, one for a `model`; the words in
  braces are those of `PLACES`), and `ranks`, where the engine takes certain values of its maximal rank only.
- `facts`, for each engine a list.  A fact has `about` and `of` (see `TOPICS`), `when` (further observations that must
  hold, each with the values that do, or `{"min": …, "max": …}`), a `verdict`, `says` (a few words), `source`, `where`
  in it, and maybe `instead`: what to do.  **The first fact that fits counts**: special ones stand before general ones.
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
#: Topics of facts, and observations that stand with each item of one, beside those of `ALWAYS`.
TOPICS: Mapping[str, tuple[str, ...]] = {
    "model": (),
    "adapter": (),
    "role": ("layout", "partner"),
    "setting": ("value",),
    "config": ("value",),
    "layout": ("value", "index", "block", "block_fits"),
}
#: Observations that hold for the whole model.
ALWAYS = ("family", "model_type", "layers", "query_compression", "mla_head", "qk_head")
#: What launch templates may name.
PLACES = ("base", "adapter", "name", "model", "max_rank", "modules", "gguf", "adapter_gguf")


@dataclass(frozen=True, slots=True)
class FactSource:
    """Where facts come from: versions that were looked at, the date (ISO 8601) of looking, and how."""

    id: str
    versions: str
    date: str
    url: str
    how: str


@dataclass(frozen=True, slots=True)
class Fact:
    """What one engine does with items `of` a topic; `when`: values that other observations must have."""

    about: str
    of: tuple[str, ...]
    when: Mapping[str, Any]
    verdict: str
    says: str
    source: FactSource
    where: str
    instead: str

    def fits(self, about: str, subject: str, seen: Mapping[str, Any]) -> bool:
        """Whether the fact is about this subject and what was seen of it."""
        if about != self.about or subject not in self.of:
            return False
        return all(_holds(wanted, seen.get(name)) for name, wanted in self.when.items())


@dataclass(frozen=True, slots=True)
class Engine:
    """One inference engine.  `ranks`: the values its maximal LoRA rank can have, ascending; empty means any."""

    id: str
    title: str
    launch: Mapping[str, tuple[str, ...]]
    ranks: tuple[int, ...]
    facts: tuple[Fact, ...]

    def fact(self, about: str, subject: str, seen: Mapping[str, Any]) -> Fact | None:
        """The first fact that fits; None where the file has none."""
        return next((fact for fact in self.facts if fact.fits(about, subject, seen)), None)


def load_engines(file: Path = FILE) -> dict[str, Engine]:
    """All engines of `file` by id.  Raises `InputError` that names the place of the first entry that is malformed."""
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
    """The ids of all engines, without checking their facts: for help texts."""
    return list(json.loads(file.read_text(encoding="utf-8"))["engines"])


def find_engine(name: str, file: Path = FILE) -> Engine:
    """The engine of this id.  Raises `InputError` with those there are."""
    engines = load_engines(file)
    if name not in engines:
        raise InputError(f"unknown engine '{name}'{did_you_mean(name, engines) or '.'} Known: {', '.join(engines)}")
    return engines[name]


def _holds(wanted: Any, seen: Any) -> bool:
    if isinstance(wanted, dict):
        return isinstance(seen, int) and wanted.get("min", seen) <= seen <= wanted.get("max", seen)
    return seen in wanted


def _source(name: str, entry: Any, where: str) -> FactSource:
    _keys(entry, where, {"versions": str, "date": str, "url": str, "how": str})
    _one_of(entry["how"], EVIDENCE, f"{where}.how")
    try:
        datetime.date.fromisoformat(entry["date"])
    except ValueError:
        raise InputError(f"{where}.date: {entry['date']!r} is no date such as 2026-11-23") from None
    if not entry["url"].startswith("https://"):
        raise InputError(f"{where}.url: {entry['url']!r} does not begin with https://")
    return FactSource(name, entry["versions"], entry["date"], entry["url"], entry["how"])


def _engine(name: str, entry: Any, facts: tuple[Fact, ...], where: str) -> Engine:
    _keys(entry, where, {"title": str, "launch": dict}, {"ranks": list})
    _keys(entry["launch"], f"{where}.launch", {"adapter": list, "model": list})
    for kind, commands in entry["launch"].items():
        for command in commands:
            if not isinstance(command, str):
                raise InputError(f"{where}.launch.{kind}: {command!r} is no command")
            for _, place, _, _ in Formatter().parse(command):
                if place is not None:
                    _one_of(place, PLACES, f"{where}.launch.{kind}")
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
        _one_of(name, (*ALWAYS, *TOPICS[entry["about"]]), f"{where}.when")
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
