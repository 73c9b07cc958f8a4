"""Find and open what a merge reads: the adapters that a user names, their base model, and the output folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mla_tune.adapter.deltas import Adapter
from mla_tune.adapter.files import ADAPTER_SUBFOLDER, CONFIG_FILE, adapter_folder, open_adapter
from mla_tune.arch.build import architecture
from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.index import Checkpoint
from mla_tune.errors import FileError, InputError
from mla_tune.resources import EMBEDDED_MODEL
from mla_tune.runs.record import RUN_FILE, RunRecord
from mla_tune.user_files import read_json_object

#: Name of the default output folder, inside the run folder or the adapter folder.
MERGED_SUBFOLDER = "merged"
#: The word for the model that ships with mla-tune, where a base model is named.
EMBEDDED = "embedded"
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True)
class MergePaths:
    """The folders of one merge."""

    adapters: tuple[Path, ...]
    """Folders with an adapter_config.json, in the order in which the user named them."""
    base: Path
    """Folder of the base model."""
    out: Path
    """Folder that the merged model is written to; it need not exist."""


@dataclass(frozen=True, slots=True)
class MergeInputs:
    """The opened inputs of one merge: headers and configurations are read, no weights."""

    paths: MergePaths
    """The folders."""
    base: Checkpoint
    """The base model."""
    arch: Architecture
    """The base model's architecture, with each matrix at its place in the checkpoint."""
    adapters: list[tuple[Adapter, float]]
    """Each adapter with its weight in the merge."""


def open_inputs(
    adapters: Sequence[tuple[Path, float]], base: Path | str | None, out: Path | None, mtp: bool = False
) -> MergeInputs:
    """Find the folders of a merge (`find_paths`) and open base and adapters; each adapter comes with its weight.

    `mtp`: allow adapters on MTP layers.  Raises `FileError` and `InputError`.
    """
    paths = find_paths([path for path, _ in adapters], base, out)
    checkpoint = Checkpoint.open(paths.base)
    arch = architecture(checkpoint.config, str(paths.base / "config.json")).located(checkpoint.tensors)
    opened = [
        (open_adapter(folder, arch, checkpoint.tensors, mtp), weight)
        for folder, (_, weight) in zip(paths.adapters, adapters, strict=True)
    ]
    return MergeInputs(paths, checkpoint, arch, opened)


def find_paths(named: Sequence[Path], base: Path | str | None, out: Path | None) -> MergePaths:
    """Find the adapters in `named` (adapter folders or run folders), their base model and the output folder.

    The base is `base`, else what belongs to the first adapter: run.json's `base_path`, or adapter_config.json's
    `base_model_name_or_path`.  Each may be a folder, the word `embedded`, or a hub id whose files are in the hub's
    cache on this computer (nothing is downloaded).

    The output folder is `out`, else `merged` in the run folder if the first adapter is the run's result, and `merged`
    in the adapter's own folder if it is not (a checkpoint of the run, an adapter from elsewhere).

    Raises `FileError` and `InputError`.
    """
    if not named:
        raise InputError("no adapter: name an adapter folder or a run folder, or one or more with --adapter")
    folders = [path.expanduser().absolute() for path in named]  # `.` has no parent to look into
    adapters = tuple(adapter_folder(path) for path in folders)
    if len(set(adapters)) < len(adapters):
        raise InputError(f"{adapters[0]}: the same adapter is named twice")
    first = adapters[0]
    # A run folder holds its result in adapter/ and its checkpoints in checkpoints/checkpoint-N/.
    run = next((folder for folder in (first.parent, first.parent.parent) if (folder / RUN_FILE).is_file()), None)
    if out is None:
        # A checkpoint must not be merged into the run's own `merged`.
        is_result = first != folders[0] or (run is not None and first == run / ADAPTER_SUBFOLDER)
        out = (first.parent if is_result else first) / MERGED_SUBFOLDER
    base_folder = _existing_base(str(base), "--base", None) if base is not None else _recorded_base(first, run)
    return MergePaths(adapters, base_folder, out)


def _recorded_base(adapter: Path, run: Path | None) -> Path:
    """Return the folder of the base that the run (if there is one) or adapter_config.json says was trained on.

    Raises `InputError` if neither names a base, and `FileError` if it is not on this computer.
    """
    settings = read_json_object(adapter / CONFIG_FILE, "the adapter's configuration")
    name, source = settings.get("base_model_name_or_path"), adapter / CONFIG_FILE
    if run is not None and (base_path := RunRecord.read(run / RUN_FILE).base_path):
        name, source = base_path, run / RUN_FILE
    if not name:
        raise InputError(f"{source}: does not say which base model the adapter belongs to: name its folder with --base")
    return _existing_base(str(name), str(source), settings.get("revision"))


def _existing_base(name: str, source: str, revision: str | None) -> Path:
    """Return the folder of a base model; `source` says in an error who named it.

    Raises `FileError` if it is not on this computer.
    """
    folder = EMBEDDED_MODEL if name == EMBEDDED else Path(name).expanduser()
    if folder.is_dir():
        return folder
    if _HUB_ID.fullmatch(name):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        with suppress(LocalEntryNotFoundError):
            return Path(snapshot_download(name, revision=revision, local_files_only=True))
    raise FileError(
        f"{source}: the base model is '{name}', and there is no such folder on this computer. "
        "Give the folder that holds it (downloaded, or where it was moved to) with --base"
    )
