"""Read adapter_config.json: refuse settings that can't be merged exactly, and give rank and scale of each matrix."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from mla_tune.adapter.methods import method_of, scaling, titles
from mla_tune.errors import InputError
from mla_tune.sockets import ADAPTER_METHODS
from mla_tune.user_files import read_json_object

#: Name of the file in an adapter folder.
CONFIG_FILE = "adapter_config.json"

#: Settings that may have any value, besides the switches of adapter methods: they don't change what the tensors mean,
#: or mla-tune reads them.
ANY_VALUE = frozenset(
    {
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "lora_bias", "lora_dropout"),
        *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("modules_to_save", "ensure_weight_tying"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # used by init_lora_weights only
        *("megatron_core", "qalora_group_size", "runtime_config"),
    }
)
#: Values that other settings may have.  A setting that is neither here nor in `ANY_VALUE` must be unset (`_UNSET`).
ALLOWED_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", "all", "lora_only"),
    # pissa, corda, olora, loftq and lora_ga change the base weights before training, so W + s·B·A is not the model.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
}
_UNSET = (None, False, [], {})


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the contents of adapter_config.json of `folder`.

    Raises `FileError` for a file that can't be read, and `InputError`, which names all such settings, if the adapter is
    not one of `sockets.ADAPTER_METHODS` or has a setting that can't be merged.
    """
    file = folder / CONFIG_FILE
    settings = read_json_object(file, "the adapter's configuration")
    problems = []
    any_value = ANY_VALUE.union(*(method.switches for method in ADAPTER_METHODS.values()))
    for name, value in settings.items():
        allowed = ALLOWED_VALUES.get(name, _UNSET)
        if name not in any_value and not any(value == a and type(value) is type(a) for a in allowed):
            problems.append(f"{name}: {value!r}")
    if settings.get("peft_type") is None:
        problems.append("no peft_type")
    method = method_of(settings)
    for other in method.excludes:  # PEFT's LoraConfig refuses these, too
        if settings.get(other):
            problems.append(f"{' and '.join(method.switches)} with {other}")
    for name in ("modules_to_save", "target_parameters"):
        value = settings.get(name) or []
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            problems.append(f"{name}: {value!r} is not a list of names")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(settings.get(name) or {}, dict):
            problems.append(f"{name}: {settings[name]!r} is not a table")
    if problems:
        raise InputError(
            f"{file}: not supported: {'; '.join(problems)}. Supported are {titles()} as PEFT writes them, "
            "with rank_pattern, alpha_pattern, target_parameters, lora_bias, trained biases and modules_to_save"
        )
    return settings


class AdapterSettings:
    """Answers what adapter_config.json says about one module or parameter, with PEFT's own rules for matching names.

    `file` names adapter_config.json in errors, `settings` are its contents.
    """

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self.file, self.settings = file, settings
        self.target_parameters: list[str] = settings.get("target_parameters") or []

    def is_parameter(self, parameter: str) -> bool:
        """Return whether this parameter is adapted through `target_parameters` (`BaseTuner._inject_parameters`)."""
        return any(parameter == t or parameter.endswith(f".{t}") for t in self.target_parameters)

    def number(self, default: str, pattern: str, name: str) -> float:
        """Return the rank or alpha of a module or parameter by its name.

        It comes from the first entry of the setting `pattern` whose key matches the end of the name
        (`peft.utils.other.get_pattern_key`), or else from the setting `default`.

        Raises `InputError` for a value that is not a positive number and a key that is not a regular expression.
        """
        value = self.settings.get(default)
        for key, special in (self.settings.get(pattern) or {}).items():
            try:
                if re.match(rf"(.*\.)?({key})$", name):
                    value = special
                    break
            except re.error as error:
                raise InputError(f"{self.file}: {pattern}: '{key}' is not a regular expression: {error}") from error
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise InputError(f"{self.file}: {default} of {name} is {value!r}: a positive number was expected")
        return value

    def rank_and_scale(self, name: str) -> tuple[int, float]:
        """Return (r, s) of `name`: the rank, and the factor on B·A.  Raises `InputError` for wrong numbers."""
        rank = self.number("r", "rank_pattern", name)
        if rank != int(rank):
            raise InputError(f"{self.file}: r of {name} is {rank!r}: a whole number was expected")
        alpha = self.number("lora_alpha", "alpha_pattern", name)
        return int(rank), scaling(alpha, int(rank), bool(self.settings.get("use_rslora")))
