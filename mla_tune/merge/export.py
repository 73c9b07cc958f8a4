"""What lies in an output folder beside the weights: index, config.json, the base's other files, the manifest."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mla_tune import __version__
from mla_tune.absorption.fold import LAYOUTS
from mla_tune.adapter.methods import title_of
from mla_tune.checkpoint.atomic_files import copy_file, sha256_of, write_json
from mla_tune.checkpoint.index import INDEX_FILE
from mla_tune.checkpoint.manifest import MANIFEST_FILE
from mla_tune.checkpoint.quantized.config import edit_config
from mla_tune.errors import FileError, InputError
from mla_tune.merge.output import MergePlan
from mla_tune.merge.staging import JOURNAL_FILE, STATE_FILE, Staging, partial_folder

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
    # What an earlier run has left is gone on with, or deleted first.
    left = partial_folder(out.absolute())
    free = shutil.disk_usage(parent).free + sum(_own_size(p) for p in left.rglob("*"))
    if free < nbytes:
        raise FileError(f"{out}: {nbytes / 1e9:.1f} GB will be written, but only {free / 1e9:.1f} GB are free there")


def _own_size(path: Path) -> int:
    """Bytes that are free when the file is deleted: 0 of a link, and of one that another merge has just renamed."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0
    return found.st_size if found.st_nlink == 1 else 0


def write_index_of(plan: MergePlan, folder: Path) -> None:
    """The index of the merged files: keys in the order of the base's, `total_size` in bytes.

    It is written beside absorbed tensors even where the base is a single file: without an index, vLLM and SGLang load
    every *.safetensors file of a folder, the absorbed one too.
    """
    base = plan.checkpoint
    if base.index is None and plan.absorbed is None:
        return
    files = {out.key: shard.name for shard in plan.shards for out in shard.tensors}
    # A weight that leaves its format may have had codes under another name; an untied head is new.
    weights = {plan.quantized[key].codes.key: key for key in plan.dequantized}
    listed = dict.fromkeys([weights.get(key, key) for key in base.tensors] + [plan.architecture.head_key])
    document = dict(base.index or {})
    document["metadata"] = {**document.get("metadata", {}), "total_size": plan.model_bytes}
    document["weight_map"] = {key: files[key] for key in listed if key in files}
    write_json(folder / INDEX_FILE, document)


def copy_auxiliary_files(plan: MergePlan, staging: Path) -> tuple[list[str], list[str]]:
    """Copy everything of the base that is not weights: tokenizer, generation config, chat templates, code.

    Returns the names that were copied and the names that were left behind; the weights that the merge has written
    itself are in neither list.  config.json tells of a new dtype, of weights that are no longer quantized, and of an
    output head that is no longer tied.
    """
    base = plan.checkpoint.folder
    written = {plan.checkpoint.name(shard) for shard in plan.checkpoint.shards} | {INDEX_FILE}
    carried, left = [], []
    for path in sorted(base.iterdir()):
        if path.is_dir():
            if path.name not in _CARRIED_FOLDERS:
                left.append(f"{path.name}/")
                continue
            (staging / path.name).mkdir(exist_ok=True)
            files = sorted(p for p in path.iterdir() if p.is_file())
        else:
            files = [path]
        for file in files:
            name = file.relative_to(base).as_posix()
            if name.startswith(".") or name.endswith(_WEIGHTS) or name in (REPORT_FILE, MANIFEST_FILE):
                left += [] if name in written else [name]
                continue
            copy_file(file, staging / name)
            carried.append(name)
    config = _config(plan)
    if config != plan.checkpoint.config:
        write_json(staging / "config.json", config)
    return carried, left


def _config(plan: MergePlan) -> dict[str, Any]:
    """The base's config.json with what the merge has changed."""
    config = dict(plan.checkpoint.config)
    if plan.dequantized:
        # In the checkpoint's order: that of a set differs from process to process.
        config = edit_config(config, [key for key in plan.quantized if key in plan.dequantized], plan.quantized)
    if plan.options.dtype != "keep":
        # transformers 4 wrote torch_dtype, transformers 5 writes dtype and reads both.
        present = [name for name in ("dtype", "torch_dtype") if name in config]
        config |= dict.fromkeys(present or ["dtype"], plan.options.dtype)
    if plan.untied:
        config["tie_word_embeddings"] = False
    return config


def write_manifest(plan: MergePlan, staging: Staging, hashes: Mapping[str, str | None]) -> None:
    """What the output was made of, and the bytes and sha256 of each of its files.

    `hashes` are those that the proof computed: a file of weights that it did not read has none.
    """
    folder, base = staging.folder, staging.identity
    weights = {shard.name for shard in plan.shards}
    entries = {}
    ours = (STATE_FILE, JOURNAL_FILE, REPORT_FILE, MANIFEST_FILE)
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in ours):
        name = file.relative_to(folder).as_posix()
        how = staging.finished.get(name, {}).get("how", "written")
        # Only weights are large: the proof has read them, or they are the base's own files.
        sha256 = hashes.get(name) if name in weights or name.endswith(".safetensors") else sha256_of(file)
        entries[name] = {"bytes": file.stat().st_size, "sha256": sha256, "linked": how in ("linked", "reflinked")}
    changed = plan.changed
    document = {
        "mla_tune": __version__,
        "base": str(plan.checkpoint.folder.absolute()),
        "base_files": {
            name: {"header_sha256": header, "bytes": size}
            for name, (header, size, *_) in base["base"]["shards"].items()
        },
        "adapters": [
            {"path": str(adapter.folder.absolute()), "method": title_of(adapter.settings), **entry}
            for (adapter, _), entry in zip(plan.adapters, base["adapters"], strict=True)
        ],
        "model_type": plan.architecture.model_type,
        "options": plan.options.to_json(),
        "roles": sorted({str(out.site.role) for out in changed if out.site is not None}),
        "dtypes": dict(Counter(out.dtype for shard in plan.shards for out in shard.tensors)),
        "replaced": sorted(plan.replaced),
        "dequantized": sorted(plan.dequantized),
        "absorbed": None
        if plan.absorbed is None
        else {"mode": plan.absorbed.mode, "layout": LAYOUTS[plan.absorbed.mode], "files": list(plan.absorbed.shards)},
        "files": entries,
    }
    write_json(folder / MANIFEST_FILE, document)
