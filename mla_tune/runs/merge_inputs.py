"""From what the user names to the folders of a merge: adapters, base, output."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mla_tune.adapter.deltas import Adapter
from mla_tune.adapter.files import CONFIG_FILE, RUN_SUBFOLDER, adapter_folder, open_adapter
from mla_tune.arch.build import architecture
from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.index import Checkpoint
from mla_tune.errors import FileError, InputError
from mla_tune.resources import EMBEDDED_MODEL
from mla_tune.user_files import read_json_object

#: What `mla-tune train` records about a run; its `base_path` is the base model's folder.
RUN_FILE = "run.json"
#: Name of the default output folder.
OUT_NAME = "merged"
#: The word for the model that ships with mla-tune.
EMBEDDED = "embedded"
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True)
class MergePaths:
    """The folders of one merge."""

    adapters: tuple[Path, ...]
    base: Path
    out: Path


def find_paths(named: Sequence[Path], base: Path | str | None, out: Path | None) -> MergePaths:
    """Find the adapters in `named` (adapter folders or run folders), their base and the output folder.

    The base is `base`, else what the first one records: run.json's `base_path`, or adapter_config.json's
    `base_model_name_or_path`: a folder, the word `embedded`, or a hub id whose files are in the hub's cache on this
    computer (nothing is downloaded).  The output is `out`, else `merged` in the first one's run folder, or in the
    adapter's where it is not the run's result.  Raises `FileError` and `InputError`.
    """
    if not named:
        raise InputError("no adapter: name an adapter folder or a run folder, or one or more with --adapter")
    folders = [path.expanduser().absolute() for path in named]  # `.` has no parent to look into
    adapters = tuple(adapter_folder(path) for path in folders)
    if len(set(adapters)) < len(adapters):
        raise InputError(f"{adapters[0]}: the same adapter is named twice")
    adapter = adapters[0]
    # A run holds its result in adapter/ and its checkpoints in checkpoints/checkpoint-N/.
    run = next((f for f in (adapter.parent, adapter.parent.parent) if (f / RUN_FILE).is_file()), None)
    if out is None:
        # A checkpoint must not land in the run's own `merged`.
        is_result = adapter != folders[0] or (run is not None and adapter == run / RUN_SUBFOLDER)
        out = (adapter.parent if is_result else adapter) / OUT_NAME
    if base is not None:
        return MergePaths(adapters, _folder(str(base), "--base", None), out)
    settings = read_json_object(adapter / CONFIG_FILE, "the adapter's configuration")
    recorded, source = settings.get("base_model_name_or_path"), adapter / CONFIG_FILE
    if run is not None:
        in_run = read_json_object(run / RUN_FILE, "the record of the run").get("base_path")
        recorded, source = (in_run, run / RUN_FILE) if in_run else (recorded, source)
    if not recorded:
        raise InputError(f"{source}: does not say which base model the adapter belongs to: name its folder with --base")
    return MergePaths(adapters, _folder(str(recorded), str(source), settings.get("revision")), out)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a merge is made from: headers read, nothing else."""

    places: MergePaths
    base: Checkpoint
    arch: Architecture
    adapters: list[tuple[Adapter, float]]


def open_inputs(
    adapters: Sequence[tuple[Path, float]], base: Path | str | None, out: Path | None, mtp: bool = False
) -> Inputs:
    """Find the folders (`find_paths`) and open them; each adapter stands with its weight.

    `mtp`: adapters may be on MTP layers.  Raises `FileError` and `InputError`."""
    places = find_paths([path for path, _ in adapters], base, out)
    checkpoint = Checkpoint.open(places.base)
    arch = architecture(checkpoint.config, str(places.base / "config.json")).located(checkpoint.tensors)
    opened = [
        (open_adapter(folder, arch, checkpoint.tensors, mtp), weight)
        for folder, (_, weight) in zip(places.adapters, adapters, strict=True)
    ]
    return Inputs(places, checkpoint, arch, opened)


def _folder(name: str, source: str, revision: str | None) -> Path:
    """The folder of a base model; `source` says in an error who named it."""
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
