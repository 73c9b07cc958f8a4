"""The run folder: which file lies where, whether a run may use it, and how it is made."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from mla_tune.adapter.files import ADAPTER_SUBFOLDER
from mla_tune.checkpoint.atomic_files import replacing
from mla_tune.errors import FileError, InputError, MlaTuneError
from mla_tune.recipe.load import dump, load_recipe
from mla_tune.recipe.schema import Recipe
from mla_tune.runs.checkpoints import checkpoints, newest_whole
from mla_tune.runs.merge_inputs import MERGED_SUBFOLDER
from mla_tune.runs.record import RUN_FILE, RunRecord


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run, below its folder `root`."""

    #: The run folder.
    root: Path

    @property
    def adapter(self) -> Path:
        """Folder of the trained adapter."""
        return self.root / ADAPTER_SUBFOLDER

    @property
    def model(self) -> Path:
        """Folder of the trained model, where every weight was trained."""
        return self.root / "model"

    @property
    def base(self) -> Path:
        """Folder of a preset's untrained weights: the base that the adapter belongs to."""
        return self.root / "base"

    @property
    def merged(self) -> Path:
        """Folder that `mla-tune merge-absorb` writes unless told otherwise."""
        return self.root / MERGED_SUBFOLDER

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, `checkpoint-STEP` each."""
        return self.root / "checkpoints"

    @property
    def recipe(self) -> Path:
        """The recipe, with all defaults spelled out."""
        return self.root / "recipe.yaml"

    @property
    def run_json(self) -> Path:
        """The record of the run (`RunRecord`)."""
        return self.root / RUN_FILE

    @property
    def metrics(self) -> Path:
        """One JSON line for each logged step (`read_curves`)."""
        return self.root / "metrics.jsonl"

    @property
    def plot(self) -> Path:
        """The curves as a picture."""
        return self.root / "loss.png"

    @property
    def report(self) -> Path:
        """The report as an HTML page."""
        return self.root / "report.html"

    def last_checkpoint(self) -> Path | None:
        """Return the newest checkpoint, damaged or not; `checkpoints.newest_whole` looks for one that is whole."""
        return next(iter(checkpoints(self.checkpoints)), None)

    def read(self) -> RunRecord:
        """Read run.json.  Raises `FileError`."""
        return RunRecord.read(self.run_json)

    def write(self, record: RunRecord) -> None:
        """Write run.json.  Raises `OSError`."""
        record.write(self.run_json)


def check_folder(recipe: Recipe, *, resume: bool, allow_changes: bool = False) -> tuple[RunFolder, str]:
    """Return the run folder of a recipe, and a line for each key that differs from the recipe of the run to resume.

    Nothing is written.  Raises `FileError` if the folder holds something else, and `InputError` for a resume without a
    checkpoint, or with another recipe unless `allow_changes`.
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
    """Write into run.json that the run was killed, and return how to go on (`how_to_go_on`)."""
    with contextlib.suppress(MlaTuneError):
        record = folder.read()
        if record.state in ("running", "failed"):
            record.state = "killed"
            folder.write(record)
    return how_to_go_on(folder)


def how_to_go_on(folder: RunFolder) -> str:
    """Return the end of an error's sentence: from which checkpoint a run that broke off goes on."""
    last, _ = newest_whole(folder.checkpoints)
    return f"; the last whole checkpoint is {last}: go on with --resume" if last else "; there is no checkpoint yet"


def make_folder(folder: RunFolder, recipe: Recipe) -> None:
    """Make the run folder, or delete in it what an earlier run wrote and nothing else, and write the recipe.

    Raises `FileError` where it can't be written.
    """
    for path in (folder.adapter, folder.model, folder.base, folder.checkpoints, folder.merged):
        shutil.rmtree(path, ignore_errors=True)
    for path in (folder.run_json, folder.metrics, folder.plot, folder.report):
        path.unlink(missing_ok=True)
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"output.dir: {folder.root} can't be written: {error.strerror}") from None
    write_recipe(folder, recipe)


def write_recipe(folder: RunFolder, recipe: Recipe) -> None:
    """Write recipe.yaml, with all defaults spelled out.  Raises `FileError` where it can't be written."""
    try:
        with replacing(folder.recipe) as stream:
            stream.write(dump(recipe).encode())
    except OSError as error:
        raise FileError(f"output.dir: {folder.root} can't be written: {error.strerror}") from None


def _difference(folder: RunFolder, recipe: Recipe) -> str:
    """Return a line for each key in which the folder's recipe and this one differ, but for the section `output`."""
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
