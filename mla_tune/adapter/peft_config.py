"""A `Placement` → the PEFT `LoraConfig` that reaches exactly those matrices, also after save and load.

In families where PEFT rewrites MLP module names to the routed experts (`Family.peft_remaps_experts`), dense and shared
MLPs are named as parameters (`mlp.gate_proj.weight`): parameters are not rewritten, and the saved keys are the same.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from peft import LoraConfig

from mla_tune.adapter.placement import Placement, PlannedSite, reached_as_parameter
from mla_tune.arch.site import Architecture, Site
from mla_tune.sockets import ADAPTER_METHODS


def peft_config(arch: Architecture, placement: Placement, whole: list[str] | None = None) -> LoraConfig:
    """LoRA configuration for `peft.get_peft_model` on the transformers model of `arch`; `whole`: modules_to_save."""
    modules: list[Site] = []
    parameters: list[Site] = []
    for p in placement.sites:
        as_parameter = reached_as_parameter(arch, p.site.role)
        (parameters if as_parameter else modules).append(p.site)

    # Of a wider LoRA alpha is larger, so that its scale stays the planned one.
    method = ADAPTER_METHODS.get(placement.method)
    stretch = method.scale(1.0, 1) / method.scale(1.0, placement.width)
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    parameter_paths = {s.path for s in parameters}
    for p in placement.sites:
        key = _pattern(p, p.site.path in parameter_paths)
        if p.rank != placement.rank:
            rank_pattern[key] = p.rank * placement.width
        if p.alpha != placement.alpha:
            alpha_pattern[key] = _number(p.alpha * stretch)

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=placement.rank * placement.width,
        lora_alpha=_number(placement.alpha * stretch),  # type: ignore[arg-type]
        lora_dropout=placement.dropout,
        **dict.fromkeys(method.switches, True),  # type: ignore[arg-type]
        target_modules=_module_names(arch, modules),
        target_parameters=_parameter_names(arch, parameters) or None,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        bias="none",
        modules_to_save=whole,
    )


def _module_names(arch: Architecture, sites: list[Site]) -> list[str]:
    """Leaf names (`o_proj`) where a name means exactly the planned modules, full paths where it would mean more; always
    these beside a tower that is not known, whose modules may have the same names."""

    def leaf(site: Site) -> tuple[str, str]:
        return site.path.rpartition(".")[2], site.path

    return _names(map(leaf, sites), map(leaf, arch.sites), arch.tower_counted)


def _parameter_names(arch: Architecture, sites: list[Site]) -> list[str]:
    """Names of parameters, likewise: those below a layer, or full ones; these always beside a tower, which has layers
    of its own."""

    def tail(site: Site) -> tuple[str, str]:
        return _tail(site.parameter), site.parameter

    return sorted(_names(map(tail, sites), map(tail, arch.sites), arch.wrapper is None))


def _names(planned: Iterable[tuple[str, str]], everywhere: Iterable[tuple[str, str]], short: bool) -> list[str]:
    """Of (end of a name, full name): the ends that mean exactly what is planned (if `short` ones may be), else full
    names.  PEFT compares ends."""
    wanted: dict[str, set[str]] = defaultdict(set)
    for end, full in planned:
        wanted[end].add(full)
    meant: dict[str, set[str]] = defaultdict(set)
    for end, full in everywhere:
        meant[end].add(full)
    names: list[str] = []
    for end, full_names in wanted.items():
        names += [end] if short and full_names == meant[end] else sorted(full_names)
    return names


def _tail(parameter: str) -> str:
    """The part of a parameter's name below its decoder layer: `mlp.shared_experts.up_proj.weight`."""
    return re.sub(r"^.*?\.layers\.\d+\.", "", parameter)


def _pattern(p: PlannedSite, as_parameter: bool) -> str:
    """A key for rank_pattern and alpha_pattern; PEFT matches it as a regular expression at the end of a name, which
    for parameters is that of the parameter."""
    return re.escape(_tail(p.site.parameter if as_parameter else p.site.path))


def _number(x: float) -> float | int:
    """Whole alphas as whole numbers, as PEFT and engines expect them in adapter_config.json."""
    return int(x) if x == int(x) else x
