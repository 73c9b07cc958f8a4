"""The output folder: built beside its place, checked there, and renamed when everything holds."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mla_tune.checkpoint.files import read_json_object, replacing, sync_folder, write_json
from mla_tune.checkpoint.index import INDEX_FILE
from mla_tune.errors import FileError, InputError
from mla_tune.merge.plan import MergePlan

REPORT_FILE = "merge_report.json"
#: Weights: those of the checkpoint are written by the merge, any other would still be the base's.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
#: The one subfolder that belongs to a model: transformers' named chat templates.
_CARRIED_FOLDERS = ("additional_chat_templates",)


def check_output(out: Path, overwrite: bool, inputs: Iterable[Path], nbytes: int) -> None:
    """Refuse an output that can't or must not be written, before any work is done.

    Raises `FileError` for a place that is taken or a disk that is full, `InputError` where replacing `out` would
    delete one of the `inputs`.
    """
    if out.exists() and not out.is_dir():
        raise FileError(f"{out}: is a file: name a folder with --out")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise FileError(f"{out}: is not empty: name another folder with --out, or replace it with --overwrite")
        place = out.resolve()
        for folder in inputs:
            if place == folder.resolve() or place in folder.resolve().parents:
                raise InputError(f"{out}: holds {folder}, which the merge reads: name another folder with --out")
        if not (out / REPORT_FILE).is_file():
            raise FileError(
                f"{out}: was not written by merge-absorb (it has no {REPORT_FILE}): --overwrite does not delete it"
            )
    parent = next(p for p in out.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise FileError(f"{out}: {nbytes / 1e9:.1f} GB will be written, but only {free / 1e9:.1f} GB are free there")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into; it takes `out`'s place when the block ends well, and is gone otherwise."""
    out = out.resolve()
    staging = out.with_name(f".{out.name}.partial-{os.getpid()}")
    replaced = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    out.parent.mkdir(parents=True, exist_ok=True)
    staging.mkdir()
    try:
        yield staging
        if out.exists():
            out.rename(replaced)
        staging.rename(out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        raise
    sync_folder(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def copy_file(source: Path, target: Path) -> None:
    """Copy the contents, whole or not at all; a link is followed."""
    with source.open("rb") as read, replacing(target) as write:
        shutil.copyfileobj(read, write, 1 << 24)


def carry_files(plan: MergePlan, staging: Path) -> tuple[list[str], list[str]]:
    """Copy everything of the base that is not weights: tokenizer, generation config, chat templates, code.

    Returns the names that were copied and the names that were left behind; the weights that the merge has written
    itself are in neither list.  config.json gets the new dtype if there is one.
    """
    base = plan.checkpoint.folder
    written = {shard.file.relative_to(base).as_posix() for shard in plan.checkpoint.shards} | {INDEX_FILE}
    carried, left = [], []
    for path in sorted(base.iterdir()):
        if path.is_dir():
            if path.name not in _CARRIED_FOLDERS:
                left.append(f"{path.name}/")
                continue
            (staging / path.name).mkdir()
            files = sorted(p for p in path.iterdir() if p.is_file())
        else:
            files = [path]
        for file in files:
            name = file.relative_to(base).as_posix()
            if name.startswith(".") or name.endswith(_WEIGHTS) or name == REPORT_FILE:
                left += [] if name in written else [name]
                continue
            copy_file(file, staging / name)
            carried.append(name)
    if plan.dtype != "keep":
        _set_dtype(staging / "config.json", plan.dtype)
    return carried, left


def _set_dtype(file: Path, dtype: str) -> None:
    config = read_json_object(file, "the model's configuration")
    # transformers 4 wrote torch_dtype, transformers 5 writes dtype and reads both.
    present = [name for name in ("dtype", "torch_dtype") if name in config]
    write_json(file, {**config, **dict.fromkeys(present or ["dtype"], dtype)})
