"""Say which engines would drop or refuse parts of a planned adapter if it is served unmerged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mla_tune.adapter.placement import Placement
from mla_tune.arch.site import Architecture
from mla_tune.serving.engines import Engine, load_engines
from mla_tune.serving.items import PARTNERS, Item, model_observations


def unmerged_notes(arch: Architecture, placement: Placement) -> list[str]:
    """Describe what engines would drop or refuse: a sentence for roles and settings that the same engines treat alike.

    Returns no sentence where every engine that takes adapters applies all of this one.
    """
    of_model = model_observations(arch)
    items = _items(placement)
    # An engine that applies no part of it takes no adapters at all, whatever is planned: it is left out.
    engines = [e for e in load_engines().values() if any(_verdict(e, item, of_model) == "applied" for item in items)]
    found: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for item in items:
        verdicts: dict[str, list[str]] = {"dropped": [], "refused": []}
        for engine in engines:
            verdict = _verdict(engine, item, of_model)
            if verdict in verdicts:
                verdicts[verdict].append(engine.title)
        key = (tuple(verdicts["dropped"]), tuple(verdicts["refused"]))
        if any(key):
            found.setdefault(key, []).append(item.subject)
    notes = []
    for (dropped, refused), subjects in found.items():
        does = [f"{', '.join(dropped)} would leave it out without an error"] * bool(dropped)
        does += [f"{', '.join(refused)} would refuse it"] * bool(refused)
        notes.append(f"{', '.join(subjects)}, served unmerged: {'; '.join(does)}")
    if notes:
        notes.append("merge the adapter with mla-tune merge-absorb to serve it there; mla-tune serve-check says more")
    return notes


def _verdict(engine: Engine, item: Item, of_model: Mapping[str, Any]) -> str:
    fact = engine.fact(item.topic, item.subject, {**of_model, **item.seen})
    return "unknown" if fact is None else fact.verdict


def _items(placement: Placement) -> list[Item]:
    """What an engine has to support in the adapter that this placement makes."""
    if placement.method == "none":
        return []
    roles, items = set(placement.roles), []
    for role in placement.roles:
        experts = any(p.site.is_experts for p in placement.by_role(role))
        partner = PARTNERS.get(role)
        has = "none" if partner is None else "adapted" if partner in roles else "not adapted"
        items.append(Item("role", role.value, {"layout": "fused experts" if experts else "module", "partner": has}))
    items.append(Item("setting", placement.method))
    if len({p.rank for p in placement.sites}) > 1:
        items.append(Item("setting", "rank_pattern"))
    if len({placement.scale(p) for p in placement.sites}) > 1:
        items.append(Item("setting", "alpha_pattern"))
    if placement.modules_to_save:
        items.append(Item("setting", "modules_to_save"))
    return items
