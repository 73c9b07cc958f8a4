"""Files that ship with the package: recipes, model configurations, the embedded model and data.

In a wheel `configs/` and `recipes/` lie inside the package; in a checkout they lie beside it.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _root(name: str) -> Path:
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


RECIPES = _root("recipes")
CONFIGS = _root("configs")
EMBEDDED_MODEL = _PACKAGE / "embedded" / "model"
EMBEDDED_DATA = _PACKAGE / "embedded" / "data"


def recipe_names() -> list[str]:
    """List the names of the recipes in `recipes/`."""
    return sorted(p.stem for p in RECIPES.glob("*.yaml"))


def model_names() -> list[str]:
    """List the names of published models whose config.json ships in `configs/models`."""
    return sorted(p.stem for p in (CONFIGS / "models").glob("*.json"))


def preset_names() -> list[str]:
    """List the names of untrained shapes in `configs/presets`, which `model.preset` builds."""
    return sorted(p.stem for p in (CONFIGS / "presets").glob("*.json"))
