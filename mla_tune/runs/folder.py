"""The run folder: what lies where, and `run.json`."""

from __future__ import annotations

import contextlib
import platform
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mla_tune import __version__
from mla_tune.checkpoint.atomic_files import replacing, write_json
from mla_tune.errors import FileError, InputError, MlaTuneError
from mla_tune.recipe.load import dump, load_recipe
from mla_tune.recipe.schema import Recipe
from mla_tune.runs.checkpoints import checkpoints, newest_whole
from mla_tune.user_files import read_json_object

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run.  `adapter/` holds the result (`model/` where every weight was trained)."""

    root: Path

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def base(self) -> Path:
        """The untrained weights of a preset: the base that the adapter belongs to."""
        return self.root / "base"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def run_json(self) -> Path:
        return self.root / "run.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def plot(self) -> Path:
        return self.root / "loss.png"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that is there; whether it is whole, `checkpoints.newest_whole` finds out."""
        return next(iter(checkpoints(self.checkpoints)), None)

    def read(self) -> dict[str, Any]:
        return read_json_object(self.run_json, "the record of the run")

    def write(self, run: dict[str, Any]) -> None:
        write_json(self.run_json, run)


def check_folder(recipe: Recipe, resume: bool, allow_changes: bool = False) -> tuple[RunFolder, str]:
    """The run folder, if a run may use it, and what of its recipe is changed (a line each); touches nothing.

    Raises `FileError` for a folder in the way and `InputError` for a resume without a checkpoint, or of another recipe
    unless `allow_changes`.
    """
    folder = RunFolder(Path(recipe.output.dir).expanduser())
    root = folder.root
    if root.exists() and not root.is_dir():
        raise FileError(f"output.dir: {root} is a file")
    if resume:
        if folder.last_checkpoint() is None:
            raise InputError(f"--resume: no checkpoint in {folder.checkpoints}; run without --resume")
        difference = _difference(folder, recipe)
        if difference and not allow_changes:
            raise InputError(
                f"--resume: the recipe is not the one of {folder.recipe}:\n{difference}\n"
                "Take the changes back, or go on with them with --allow-changes"
            )
        return folder, difference
    if root.exists() and any(root.iterdir()):
        if not recipe.output.overwrite:
            unfinished = folder.last_checkpoint() is not None and not (folder.adapter.exists() or folder.model.exists())
            state = "holds an unfinished run: continue it with --resume," if unfinished else "is not empty:"
            raise FileError(
                f"output.dir: {root} {state} empty it with --overwrite, or choose another with --output DIR"
            )
        if not folder.run_json.exists():
            raise FileError(f"output.dir: {root} is not empty and no run folder of mla-tune, so it is not emptied")
    return folder, ""


def mark_killed(folder: RunFolder) -> str:
    """Put right what a killed run left in run.json; returns how to go on."""
    with contextlib.suppress(MlaTuneError):
        run = folder.read()
        if run.get("state") in ("running", "failed"):
            folder.write(run | {"state": "killed"})
    return how_to_go_on(folder)


def how_to_go_on(folder: RunFolder) -> str:
    """The end of an error's sentence: where a run that broke off goes on from."""
    last, _ = newest_whole(folder.checkpoints)
    return f"; the last whole checkpoint is {last}: go on with --resume" if last else "; there is no checkpoint yet"


def make_folder(folder: RunFolder, recipe: Recipe) -> None:
    """Make the folder, or empty it of what an earlier run wrote (and of nothing else), and write the recipe."""
    for path in (folder.adapter, folder.model, folder.base, folder.checkpoints, folder.root / "merged"):
        shutil.rmtree(path, ignore_errors=True)
    for path in (folder.run_json, folder.metrics, folder.plot, folder.report):
        path.unlink(missing_ok=True)
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"output.dir: {folder.root} can't be written: {error.strerror}") from None
    write_recipe(folder, recipe)


def write_recipe(folder: RunFolder, recipe: Recipe) -> None:
    """recipe.yaml with every default spelled out."""
    try:
        with replacing(folder.recipe) as stream:
            stream.write(dump(recipe).encode())
    except OSError as error:
        raise FileError(f"output.dir: {folder.root} can't be written: {error.strerror}") from None


def _difference(folder: RunFolder, recipe: Recipe) -> str:
    """Changed keys between the folder's recipe and this one, a line each; where the output goes does not count."""
    try:
        before = load_recipe(str(folder.recipe)).model_dump(exclude={"output"})
    except FileError:
        return ""
    now = recipe.model_dump(exclude={"output"})
    return "\n".join(
        f"  {section}.{key}: {before[section][key]!r} then, {value!r} now"
        for section in now
        for key, value in now[section].items()
        if before[section][key] != value
    )


def environment() -> dict[str, Any]:
    """Versions and machine, for run.json."""
    import torch

    return {
        "mla_tune": __version__,
        "python": platform.python_version(),
        **{p: version(p) for p in PACKAGES},
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
