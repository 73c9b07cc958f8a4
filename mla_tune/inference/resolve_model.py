"""Resolve MODEL as a user types it to the base to load, and the unmerged adapter to put on it, if any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mla_tune.errors import FileError, InputError
from mla_tune.runs.folder import RunFolder
from mla_tune.user_files import read_json_object


def resolve_model(model: str) -> tuple[str, Path | None]:
    """Return (base, adapter folder or None) for a model as a user names it.

    A run folder stands for its merged model if there is one, else for its fully trained model, else for its base and
    its adapter.  An adapter folder stands for the base that its adapter_config.json records, and the adapter.  Anything
    else is returned as the base.

    Raises `FileError` for a run without a result, and `InputError` for an adapter that records no base.
    """
    path = Path(model).expanduser()
    run, adapter_config = RunFolder(path), path / "adapter_config.json"
    if run.run_json.is_file():
        for folder in (run.merged, run.model):
            if (folder / "config.json").is_file():
                return str(folder), None
        if not run.adapter.is_dir():
            raise FileError(f"{model}: this run has no adapter yet; finish it with `mla-tune train --resume`")
        return _check_base(run.read().base_path, model), run.adapter
    if adapter_config.is_file():
        recorded = read_json_object(adapter_config, "the adapter's configuration").get("base_model_name_or_path")
        return _check_base(recorded, model), path
    return model, None


def _check_base(recorded: Any, model: str) -> str:
    """Return the base that was recorded.  Raises `InputError` where it is no name of a model."""
    if not recorded or not isinstance(recorded, str) or "\0" in recorded:
        raise InputError(f"{model}: this adapter does not name its base; give the base as MODEL, and --adapter {model}")
    return recorded
