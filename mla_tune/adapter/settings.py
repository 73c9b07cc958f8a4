"""adapter_config.json: which settings leave an adapter that can be merged exactly, and rank and scale of each name."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from mla_tune.adapter.methods import method_of, scaling, titles
from mla_tune.errors import InputError
from mla_tune.sockets import ADAPTER_METHODS
from mla_tune.user_files import read_json_object

CONFIG_FILE = "adapter_config.json"

#: Settings that may have any value, besides the switches of adapter methods: they don't change what the tensors mean,
#: or are read where they do.
FREE = frozenset(
    {
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "lora_bias", "lora_dropout"),
        *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("modules_to_save", "ensure_weight_tying"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # read by init_lora_weights only
        *("megatron_core", "qalora_group_size", "runtime_config"),
    }
)
#: Values of the others that leave a LoRA; a setting that stands neither here nor above must be unset.
ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", "all", "lora_only"),
    # pissa, corda, olora, loftq and lora_ga change the base weights before training: W + s·B·A is not the model.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
}
_UNSET = (None, False, [], {})


def read_settings(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json of `folder`.

    Raises `FileError` for a file that can't be read, and `InputError` for settings of an adapter that is none of
    `sockets.ADAPTER_METHODS`.
    """
    file = folder / CONFIG_FILE
    settings = read_json_object(file, "the adapter's configuration")
    problems = []
    free = FREE.union(*(method.switches for method in ADAPTER_METHODS.values()))
    for name, value in settings.items():
        allowed = ALLOWED.get(name, _UNSET)
        if name not in free and not any(value == a and type(value) is type(a) for a in allowed):
            problems.append(f"{name}: {value!r}")
    if settings.get("peft_type") is None:
        problems.append("no peft_type")
    method = method_of(settings)
    for other in method.excludes:  # LoraConfig refuses it too
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
    """What adapter_config.json says about one name: targeted as a parameter or not, its rank, its alpha."""

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self.file, self.settings = file, settings
        self.parameters: list[str] = settings.get("target_parameters") or []

    def is_parameter(self, parameter: str) -> bool:
        """As `BaseTuner._inject_parameters` matches `target_parameters`."""
        return any(parameter == t or parameter.endswith(f".{t}") for t in self.parameters)

    def number(self, default: str, pattern: str, name: str) -> float:
        """`r` or `lora_alpha` of one name: the first pattern that matches it at its end, else the default
        (`peft.utils.other.get_pattern_key`)."""
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
        """r and s of one name."""
        rank = self.number("r", "rank_pattern", name)
        if rank != int(rank):
            raise InputError(f"{self.file}: r of {name} is {rank!r}: a whole number was expected")
        alpha = self.number("lora_alpha", "alpha_pattern", name)
        return int(rank), scaling(alpha, int(rank), bool(self.settings.get("use_rslora")))
