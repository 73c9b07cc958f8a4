"""Turn a `Placement` into the PEFT `LoraConfig` that adapts exactly its matrices, also after saving and loading.

In some families PEFT rewrites the module names of MLPs to the routed experts (`Family.peft_remaps_experts`).  There
dense and shared MLPs are named as parameters (`mlp.gate_proj.weight`), which PEFT does not rewrite; the saved keys are
the same.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from peft import LoraConfig

from mla_tune.adapter.placement import Placement, PlannedSite, reached_as_parameter
from mla_tune.arch.site import Architecture, Site
from mla_tune.sockets import ADAPTER_METHODS


def peft_config(arch: Architecture, placement: Placement, modules_to_save: list[str] | None = None) -> LoraConfig:
    """Return the configuration for `peft.get_peft_model` on the transformers model of `arch`."""
    modules: list[Site] = []
    parameters: list[Site] = []
    for p in placement.sites:
        as_parameter = reached_as_parameter(arch, p.site.role)
        (parameters if as_parameter else modules).append(p.site)

    # PEFT computes the scale from the rank that it attaches; if that is a multiple of the planned rank
    # (`Placement.width`), a larger alpha keeps the scale as planned.
    method = ADAPTER_METHODS.get(placement.method)
    alpha_factor = method.scale(1.0, 1) / method.scale(1.0, placement.width)
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    parameter_paths = {site.path for site in parameters}
    for p in placement.sites:
        key = _pattern(p, as_parameter=p.site.path in parameter_paths)
        if p.rank != placement.rank:
            rank_pattern[key] = p.rank * placement.width
        if p.alpha != placement.alpha:
            alpha_pattern[key] = _integer_if_whole(p.alpha * alpha_factor)

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=placement.rank * placement.width,
        lora_alpha=_integer_if_whole(placement.alpha * alpha_factor),  # type: ignore[arg-type]
        lora_dropout=placement.dropout,
        **dict.fromkeys(method.switches, True),  # type: ignore[arg-type]
        target_modules=_module_names(arch, modules),
        target_parameters=_parameter_names(arch, parameters) or None,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        bias="none",
        modules_to_save=modules_to_save,
    )


def _module_names(arch: Architecture, sites: list[Site]) -> list[str]:
    """Return the names of the planned modules: last parts (`o_proj`) if they are unambiguous, else full paths.

    Beside a tower whose layout is not known all paths are full, because its modules may have the same names.
    """

    def with_leaf(site: Site) -> tuple[str, str]:
        return site.path.rpartition(".")[2], site.path

    return _shortest_names(map(with_leaf, sites), map(with_leaf, arch.sites), may_be_short=arch.tower_counted)


def _parameter_names(arch: Architecture, sites: list[Site]) -> list[str]:
    """Return the names of the planned parameters: inside a layer if they are unambiguous, else full names.

    In a multimodal model all names are full, because its tower has layers of its own.
    """

    def with_ending(site: Site) -> tuple[str, str]:
        return _name_in_layer(site.parameter), site.parameter

    named = map(with_ending, sites)
    return sorted(_shortest_names(named, map(with_ending, arch.sites), may_be_short=arch.wrapper is None))


def _shortest_names(
    planned: Iterable[tuple[str, str]], everything: Iterable[tuple[str, str]], *, may_be_short: bool
) -> list[str]:
    """Return names by which PEFT, which compares the ends of names, finds exactly what is planned.

    `planned` and `everything` (all matrices of the model) are pairs (ending, full name).  An ending is returned if
    everything that has it is planned and `may_be_short`; otherwise the full names.
    """
    planned_by_ending: dict[str, set[str]] = defaultdict(set)
    for ending, full in planned:
        planned_by_ending[ending].add(full)
    all_by_ending: dict[str, set[str]] = defaultdict(set)
    for ending, full in everything:
        all_by_ending[ending].add(full)
    names: list[str] = []
    for ending, full_names in planned_by_ending.items():
        names += [ending] if may_be_short and full_names == all_by_ending[ending] else sorted(full_names)
    return names


def _name_in_layer(parameter: str) -> str:
    """Return the part of a parameter's name after its decoder layer: `mlp.shared_experts.up_proj.weight`."""
    return re.sub(r"^.*?\.layers\.\d+\.", "", parameter)


def _pattern(p: PlannedSite, *, as_parameter: bool) -> str:
    """Return the key of a matrix in rank_pattern and alpha_pattern.

    PEFT matches it as a regular expression at the end of the module's name, or of the parameter's.
    """
    return re.escape(_name_in_layer(p.site.parameter if as_parameter else p.site.path))


def _integer_if_whole(x: float) -> float | int:
    """Return an alpha as an integer if it is one: PEFT and engines expect that in adapter_config.json."""
    return int(x) if x == int(x) else x
