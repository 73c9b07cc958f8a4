"""config.json compared with the headers of a checkpoint: what `mla-tune inspect --check-weights` shows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from mla_tune.arch.roles import Role
from mla_tune.arch.site import Architecture, Site
from mla_tune.checkpoint.index import Checkpoint, TensorRef

#: Endings of the keys of tensors that belong to a quantized weight, beside its codes.
_SCALES = ("_scale", "_scale_inv", "scale", "_scale_2", "input_scale", "_packed", "_shape", "qzeros", "g_idx", "absmax")
#: Words in the keys of vision and audio towers, and of what connects them to the text model.
_TOWERS = ("vision", "visual", "audio", "projector", "patch_merger", "language_adapter")
#: Tensors of one kind that are named; of more only the count is given.
SHOWN = 10


def check_weights(arch: Architecture, folder: Path) -> dict[str, Any]:
    """Compare the headers of the checkpoint in `folder` with `arch`.  Returns a JSON document:

        holds        whether nothing is missing or of another shape
        found        count of matrices that are there in the shape that config.json gives (each expert's counts)
        missing      keys of matrices that are not there
        wrong_shape  key and both shapes of matrices that have another shape
        unexplained  keys of matrices in the checkpoint that config.json says nothing about
        mtp_layers   count of MTP layers that are there
        tensors      count of all tensors

    Matrices of a tower are compared where they have their name in transformers.  Packed codes (fewer numbers than
    weights) are only looked for.  Raises `FileError` and `InputError` for a checkpoint that can't be read.
    """
    checkpoint = Checkpoint.open(folder)
    tensors = checkpoint.tensors
    here = arch.located(tensors)
    missing: list[str] = []
    wrong: list[dict[str, Any]] = []
    found, known, mtp = 0, set[str](), set[int]()
    for site in here.stored_sites:
        absent = site.disk_keys()[0] not in tensors
        if absent and (site.role == Role.TOWER or (site.path == "lm_head" and arch.tied)):
            continue  # towers have other names in published files
        copies = [] if site.mtp and absent else [site.disk_keys(), *site.alias_keys()]
        for key in (k for keys in copies for k in keys):
            known.add(key)
            split = here.key_mapping.tensors(f"{site.path}.weight", tensors) if key not in tensors else [key]
            known.update(split)
            if any(k not in tensors for k in split):
                packed = [k for k in (f"{key}_packed", key.removesuffix("weight") + "qweight") if k in tensors]
                found += len(packed)
                known.update(packed)
                missing += [] if packed else [key]
                continue
            shapes = [tensors[k].shape for k in split]
            expected = _shape(site, len(split))
            if any(prod(shape) != prod(expected) or shape[0] != expected[0] for shape in shapes):
                wrong.append({"key": split[0], "config": list(expected), "checkpoint": list(shapes[0])})
                continue
            found += 1
            if site.mtp and site.layer is not None:
                mtp.add(site.layer)
    return {
        "folder": str(folder),
        "holds": not missing and not wrong,
        "found": found,
        "missing": missing,
        "wrong_shape": wrong,
        "mtp_layers": len(mtp),
        "unexplained": _unexplained(arch, here, tensors, known),
        "tensors": len(tensors),
    }


def _unexplained(
    arch: Architecture, here: Architecture, tensors: Mapping[str, TensorRef], known: set[str]
) -> list[str]:
    """Keys of matrices that `arch` does not explain; `here` is `arch` with the names of this checkpoint, and `known`
    holds the keys that were compared."""
    ends = set(here.key_mapping.candidates(arch.embedding))
    unexplained = [
        key
        for key, ref in tensors.items()
        if len(ref.shape) > 1 and min(ref.shape) > 1 and key not in known and key not in ends and not _beside(key)
    ]
    moe = arch.family.moe
    if moe and moe.identity_experts_key:  # transformers writes matrices for them, which nothing reads
        beyond = re.compile(r"\.experts\.(\d+)\.")
        count = max(site.count for site in arch)
        unexplained = [k for k in unexplained if not ((m := beyond.search(k)) and int(m[1]) >= count)]
    mtp = [f"layers.{arch.num_layers + i}." for i in range(arch.mtp_layers)]
    return [k for k in unexplained if not any(name in k for name in mtp)]


def _shape(site: Site, pieces: int) -> tuple[int, ...]:
    rows, columns = site.shape
    if site.disk == "fused":
        return (site.count, rows, columns)
    return (rows // site.disk_parts // pieces, columns)


def _beside(key: str) -> bool:
    """Whether a tensor is a scale or belongs to a tower."""
    return key.endswith(_SCALES) or any(word in key for word in _TOWERS)


def summary_lines(found: dict[str, Any]) -> list[str]:
    """The document of `check_weights` as lines of text."""
    said = [f"{found['folder']}: {found['found']:,} matrices are there in the shape that config.json gives"]
    if found["mtp_layers"]:
        said[0] += f", MTP layers among them: {found['mtp_layers']}"
    said += _listed("missing", found["missing"])
    shapes = [
        f"{w['key']}: config.json gives {tuple(w['config'])}, the file has {tuple(w['checkpoint'])}"
        for w in found["wrong_shape"]
    ]
    said += _listed("of another shape", shapes)
    said += _listed("in the files and not in config.json", found["unexplained"])
    return said


def _listed(what: str, items: list[str]) -> list[str]:
    if not items:
        return []
    more = [f"  … and {len(items) - SHOWN:,} more"] if len(items) > SHOWN else []
    return [f"{len(items):,} {what}:", *(f"  {item}" for item in items[:SHOWN]), *more]
