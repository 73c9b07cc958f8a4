"""MODEL as a user types it → the base to load, and the adapter to put on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mla_tune.errors import FileError, InputError
from mla_tune.runs.folder import RunFolder
from mla_tune.user_files import read_json_object


def resolve_model(model: str) -> tuple[str, Path | None]:
    """(base, adapter) of what a user names: a model, a run folder (its merged or trained model, else its base with its
    adapter), or an adapter folder (its recorded base)."""
    path = Path(model).expanduser()
    run, adapter = RunFolder(path), path / "adapter_config.json"
    if run.run_json.is_file():
        for folder in (run.merged, run.model):
            if (folder / "config.json").is_file():
                return str(folder), None
        if not run.adapter.is_dir():
            raise FileError(f"{model}: this run has no adapter yet; finish it with `mla-tune train --resume`")
        return _recorded_base(run.read().base_path, model), run.adapter
    if adapter.is_file():
        recorded = read_json_object(adapter, "the adapter's configuration").get("base_model_name_or_path")
        return _recorded_base(recorded, model), path
    return model, None


def _recorded_base(recorded: Any, model: str) -> str:
    if not recorded or not isinstance(recorded, str) or "\0" in recorded:
        raise InputError(f"{model}: an adapter that names no base; give the base as MODEL and this with --adapter")
    return recorded
