"""Find the config.json of a model that a user names: a shipped name, a preset, a folder, a file or a hub id.

No weights are read and no torch is imported.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_tune.arch.build import architecture
from mla_tune.arch.site import Architecture
from mla_tune.errors import FileError, InputError, did_you_mean
from mla_tune.resources import CONFIGS, EMBEDDED_MODEL, model_names, preset_names
from mla_tune.user_files import read_json_object

if TYPE_CHECKING:  # pydantic takes a tenth of a second, which `inspect` need not spend
    from mla_tune.recipe.schema import ModelSection

#: Published models whose shapes are those of a shipped config.json: their name → the shipped name.
ALIASES = {
    "deepseek-r1": "deepseek-v3",
    "deepseek-v3.1": "deepseek-v3",
    "deepseek-v2.5": "deepseek-v2",
    "deepseek-coder-v2": "deepseek-v2",
    "deepseek-coder-v2-lite": "deepseek-v2-lite",
    "kimi-k2.6": "kimi-k2.5",
}


def load_config(model: str) -> tuple[dict[str, Any], str, Path | None]:
    """Return (config.json, its name for messages, the model's folder or None if it has none on this computer).

    `model` is tried in this order: the word `embedded`; a shipped name or a preset, whatever its case and its use of
    `-`, `_` and `.`; a folder; a config.json; a hub id, the only one for which the network is used (config.json alone
    is downloaded).  `./name` is always a path.

    Raises `InputError` for a name that is none of these, and `FileError` for a file or folder that can't be used.
    """
    if model == "embedded" and (EMBEDDED_MODEL / "config.json").is_file():
        return _read(EMBEDDED_MODEL / "config.json", model), model, EMBEDDED_MODEL
    shipped = _shipped_file(model)
    if shipped:
        return _read(shipped, model), model, None
    path = Path(model).expanduser()
    if path.is_dir():
        return _from_folder(path, model)
    if path.is_file():
        return _read(path, model), model, path.parent
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith(".") and not model.endswith(".json"):
        return _from_hub(model)
    if "/" in model or model.endswith(".json"):
        raise FileError(f"{model}: no such file or folder. {_allowed_models()}")
    raise InputError(f"{model}: not a known model{did_you_mean(model, _known_names()) or '.'} {_allowed_models()}")


def architecture_of(section: ModelSection) -> Architecture:
    """Return the architecture of a recipe's model (`config_and_architecture`)."""
    return config_and_architecture(section)[1]


def config_and_architecture(section: ModelSection) -> tuple[dict[str, Any], Architecture]:
    """Return the config.json and the architecture of a recipe's model: its preset, its base, or else `embedded`.

    Raises what `load_config` and `arch.build.architecture` raise.
    """
    config, where, _ = load_config(section.preset or section.base or "embedded")
    return config, architecture(config, where)


def _known_names() -> list[str]:
    return [*model_names(), *ALIASES, *preset_names()]


def _shipped_file(model: str) -> Path | None:
    """Return the shipped config.json that `model` names, whatever its case and separators; None if it names none."""

    def normalize(name: str) -> str:
        return re.sub(r"[-_. ]", "", name.lower())

    if not re.fullmatch(r"[\w. -]+", model) or model.startswith("."):
        return None
    for folder, names in (("models", model_names()), ("presets", preset_names())):
        for name in names:
            if normalize(name) == normalize(model):
                return CONFIGS / folder / f"{name}.json"
    for alias, name in ALIASES.items():
        if normalize(alias) == normalize(model):
            return CONFIGS / "models" / f"{name}.json"
    return None


def _from_folder(folder: Path, model: str) -> tuple[dict[str, Any], str, Path]:
    if (folder / "config.json").is_file():
        where = f"{model.rstrip('/')}/config.json"
        return _read(folder / "config.json", where), where, folder
    adapter = next((p for p in (folder, folder / "adapter") if (p / "adapter_config.json").is_file()), None)
    if adapter:
        base = _read(adapter / "adapter_config.json", model).get("base_model_name_or_path")
        raise FileError(f"{model}: holds an adapter, not a model. Inspect its base model: {base or 'not named there'}")
    raise FileError(f"{model}: no config.json in this folder. {_allowed_models()}")


def _from_hub(model: str) -> tuple[dict[str, Any], str, None]:
    """Read config.json from the hub's cache on this computer, or else from the hub."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    where = f"{model} (hub) config.json"
    try:
        file = try_to_load_from_cache(model, "config.json")
        if not isinstance(file, str):
            get_hf_file_metadata(hf_hub_url(model, "config.json"))  # fails at once where the download would retry
            file = hf_hub_download(model, "config.json")
    except Exception as error:  # the hub's errors share no class with those of its HTTP library
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        hint = did_you_mean(model.rsplit("/", 1)[1], _known_names())
        raise FileError(
            f"{model}: no such folder here, and the hub gave no config.json ({why.rstrip('.')}){hint or '.'} "
            f"{_allowed_models()}"
        ) from None
    return _read(Path(file), where), where, None


def _read(path: Path, where: str) -> dict[str, Any]:
    return read_json_object(path, "the model's configuration", where)


def _allowed_models() -> str:
    """Say what a user may name as a model, with every shipped name."""
    presets = ", ".join(preset_names())
    return f"Shipped: {', '.join(model_names())}; presets: {presets}; or a folder, a config.json or a hub id"
