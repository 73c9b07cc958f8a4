"""MODEL as a user types it → the parsed config.json, without weights and without torch."""

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

#: Names for published models whose config.json has the shapes of a shipped one.
ALIASES = {
    "deepseek-r1": "deepseek-v3",
    "deepseek-v3.1": "deepseek-v3",
    "deepseek-v2.5": "deepseek-v2",
    "deepseek-coder-v2": "deepseek-v2",
    "deepseek-coder-v2-lite": "deepseek-v2-lite",
    "kimi-k2.6": "kimi-k2.5",
}


def load_config(model: str) -> tuple[dict[str, Any], str, Path | None]:
    """The config.json of `model`, a name for it in messages, and its folder when it is a local one.

    Tried in this order: `embedded`; a shipped name in any spelling of case, `-`, `_` and `.`; a preset; a folder;
    a config.json; a hub id (the only step that uses the network, for config.json alone).  `./name` is always a path.
    Raises `InputError` for a name that nothing has and `FileError` for a file or folder that can't be used.
    """
    if model == "embedded" and (EMBEDDED_MODEL / "config.json").is_file():
        return _read(EMBEDDED_MODEL / "config.json", model), model, EMBEDDED_MODEL
    known = _by_spelling(model)
    if known:
        return _read(known, model), model, None
    path = Path(model).expanduser()
    if path.is_dir():
        return _from_folder(path, model)
    if path.is_file():
        return _read(path, model), model, path.parent
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith(".") and not model.endswith(".json"):
        return _from_hub(model)
    if "/" in model or model.endswith(".json"):
        raise FileError(f"{model}: no such file or folder. {_what_fits()}")
    raise InputError(f"{model}: not a known model{did_you_mean(model, _names()) or '.'} {_what_fits()}")


def architecture_of(section: ModelSection) -> Architecture:
    """The architecture of a recipe's model: of its preset, or of its base (`embedded` where neither is given)."""
    return described(section)[1]


def described(section: ModelSection) -> tuple[dict[str, Any], Architecture]:
    """A recipe's model: its config.json and its architecture."""
    config, where, _ = load_config(section.preset or section.base or "embedded")
    return config, architecture(config, where)


def _names() -> list[str]:
    return [*model_names(), *ALIASES, *preset_names()]


def _by_spelling(model: str) -> Path | None:
    """The shipped file that `model` names, whatever its case and separators."""

    def plain(name: str) -> str:
        return re.sub(r"[-_. ]", "", name.lower())

    if not re.fullmatch(r"[\w. -]+", model) or model.startswith("."):
        return None
    for folder, names in (("models", model_names()), ("presets", preset_names())):
        for name in names:
            if plain(name) == plain(model):
                return CONFIGS / folder / f"{name}.json"
    for alias, name in ALIASES.items():
        if plain(alias) == plain(model):
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
    raise FileError(f"{model}: no config.json in this folder. {_what_fits()}")


def _from_hub(model: str) -> tuple[dict[str, Any], str, None]:
    """From the hub's cache on this computer, else from the hub."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    where = f"{model} (hub) config.json"
    try:
        file = try_to_load_from_cache(model, "config.json")
        if not isinstance(file, str):
            get_hf_file_metadata(hf_hub_url(model, "config.json"))  # fails at once where the download would retry
            file = hf_hub_download(model, "config.json")
    except Exception as error:  # the hub's errors share no class with those of its HTTP library
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        hint = did_you_mean(model.rsplit("/", 1)[1], _names())
        raise FileError(
            f"{model}: no such folder here, and the hub gave no config.json ({why.rstrip('.')}){hint or '.'} "
            f"{_what_fits()}"
        ) from None
    return _read(Path(file), where), where, None


def _read(path: Path, where: str) -> dict[str, Any]:
    return read_json_object(path, "the model's configuration", where)


def _what_fits() -> str:
    """What MODEL may be, with every shipped name."""
    presets = ", ".join(preset_names())
    return f"Shipped: {', '.join(model_names())}; presets: {presets}; or a folder, a config.json or a hub id"
