"""Values of a recipe that are names: roles, groups and presets, adapter methods, objectives.

A name that is not known is an error that lists those that are, with the nearest one first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from mla_tune.arch.roles import ADAPTABLE, GROUPS, PRESETS
from mla_tune.errors import did_you_mean
from mla_tune.sockets import ADAPTER_METHODS, OBJECTIVES

#: What `adapter.targets` and `adapter.roles` may name beside presets.
TARGET_NAMES: tuple[str, ...] = (*(r.value for r in ADAPTABLE), *GROUPS)


def _unknown(kind: str, name: Any, allowed: tuple[str, ...]) -> str:
    hint = did_you_mean(str(name), allowed) or "."
    return f"unknown {kind} '{name}'{hint} Allowed: {', '.join(allowed)}"


def _targets(value: Any) -> Any:
    """A preset stays a word, and a single role or group becomes a list.  Raises `ValueError` with all unknown names."""
    if isinstance(value, str):
        if value in PRESETS:
            return value
        if value not in TARGET_NAMES:
            raise ValueError(_unknown("preset, role or group", value, (*PRESETS, *TARGET_NAMES)))
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError(f"expected a preset or a list of roles and groups, got {value!r}")
    wrong = [v for v in value if v not in TARGET_NAMES]
    if wrong:
        raise ValueError("; ".join(_unknown("role or group", v, TARGET_NAMES) for v in wrong))
    return value


def check_role_keys(value: Any) -> Any:
    """The keys of `adapter.roles` are roles and groups.  Raises `ValueError` with all that are not."""
    if isinstance(value, dict):
        wrong = [v for v in value if v not in TARGET_NAMES]
        if wrong:
            raise ValueError("; ".join(_unknown("role or group", v, TARGET_NAMES) for v in wrong))
    return value


def _one_of(names: Callable[[], tuple[str, ...]]) -> Callable[[Any], Any]:
    """A validator for a name in a registry.  `names` is called when a recipe is read, so that what was registered by
    then is allowed."""

    def check(value: Any) -> Any:
        allowed = names()
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(
                f"expected one of {', '.join(allowed)}, got {str(value)[:80]!r}{did_you_mean(str(value)[:80], allowed)}"
            )
        return value

    return check


def _methods() -> tuple[str, ...]:
    return (*ADAPTER_METHODS.names, "none")


def _objectives() -> tuple[str, ...]:
    return OBJECTIVES.names


#: JSON Schema of a role or a group.
NAME_SCHEMA: dict[str, Any] = {"type": "string", "enum": list(TARGET_NAMES)}
#: `adapter.targets`: a preset, or a list of roles and groups (one of them may stand alone).
Targets = Annotated[
    list[str] | str,
    BeforeValidator(_targets),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "enum": [*PRESETS, *TARGET_NAMES]}, {"type": "array", "items": NAME_SCHEMA}]}
    ),
]
#: `adapter.method`: a name in `sockets.ADAPTER_METHODS`, or none.
Method = Annotated[str, BeforeValidator(_one_of(_methods)), WithJsonSchema({"type": "string", "enum": [*_methods()]})]
#: `train.objective`: a name in `sockets.OBJECTIVES`.
ObjectiveName = Annotated[
    str, BeforeValidator(_one_of(_objectives)), WithJsonSchema({"type": "string", "enum": [*_objectives()]})
]
