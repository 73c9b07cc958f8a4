"""The proof of one output, numbers, absorbed tensors and logits: for `merge-absorb`, and for `verify` on any folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_tune import __version__
from mla_tune.adapter.files import CONFIG_FILE, WEIGHTS_FILE, Adapter
from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.files import read_json_object, sha256_of
from mla_tune.checkpoint.index import Checkpoint
from mla_tune.errors import CheckError, FileError, InputError
from mla_tune.merge.export import MANIFEST_FILE
from mla_tune.merge.locate import open_inputs
from mla_tune.merge.options import Options
from mla_tune.merge.plan import MergePlan
from mla_tune.merge.proof import ProofReport, prove, with_failures
from mla_tune.merge.proof_absorbed import absorbed_tensors, prove_absorbed
from mla_tune.merge.proof_layout import Failure

if TYPE_CHECKING:
    from mla_tune.merge.probe import ProbeReport


@dataclass(frozen=True, slots=True)
class Checked:
    """What was proven, what the logits said (None: not asked, or the proof failed), and the sha256 of each file of
    weights that was read."""

    proof: ProofReport
    probe: ProbeReport | None
    hashes: dict[str, str | None]


@dataclass(frozen=True, slots=True)
class Verified:
    """A finished `verify`.  `adapters` are paths and weights; `notes` what a user should know about the comparison."""

    output: str
    base: str
    adapters: list[tuple[str, float]]
    proof: ProofReport
    probe: ProbeReport | None
    notes: list[str]
    mla_tune: str = __version__

    @property
    def holds(self) -> bool:
        return not self.proof.failed

    def to_json(self) -> dict[str, Any]:
        adapters = [{"path": path, "weight": weight} for path, weight in self.adapters]
        return asdict(self) | {"holds": self.holds, "adapters": adapters}


def check(
    base: Checkpoint,
    arch: Architecture,
    adapters: Sequence[tuple[Adapter, float]],
    merged: Checkpoint,
    *,
    strict: bool,
    options: Options | None = None,
    with_probe: bool = True,
    files: Mapping[str, Mapping[str, Any]] | None = None,
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
) -> Checked:
    """Prove `merged` against base and adapters.  Failures are in the report; the probe runs where there are none.

    `options` are those of the merge where it is `strict`.  `files` are those of a manifest (see `write_manifest`): the
    output's must still be the same.
    """
    options = options or Options()
    report, hashes = prove(
        base,
        arch,
        adapters,
        merged,
        strict=strict,
        rounding=options.round,
        exact=options.exact,
        dtype=options.dtype,
        workers=workers,
        progress=progress,
    )
    absorbed = absorbed_tensors(merged)
    modules, failures, digests = prove_absorbed(arch, merged, absorbed, workers=workers)
    hashes |= digests
    failures += _changed_files(merged.folder, files or {}, hashes)
    report = with_failures(report, failures, absorbed=modules)
    probed = None
    if with_probe and not report.failed:
        # transformers and PEFT take seconds to load.
        from mla_tune.merge.probe import probe

        mode = "none" if not absorbed else "fold" if any(key.endswith("W_QK") for key in absorbed) else "split"
        folders = [(adapter.folder, weight) for adapter, weight in adapters]
        probed = probe(base, arch, folders, merged, absorbed or None, mode)
    return Checked(report, probed, hashes)


def prove_merge(
    plan: MergePlan,
    folder: Path,
    *,
    probe: bool,
    workers: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, str | None]]:
    """(proof, probe, hashes) of what a plan has written to `folder`.  Raises `CheckError` naming what differs."""
    done = check(
        plan.checkpoint,
        plan.architecture,
        plan.adapters,
        Checkpoint.open(folder),
        strict=True,
        options=plan.options,
        with_probe=probe,
        workers=workers,
        progress=progress,
    )
    if done.proof.failed:
        lines = "".join(f"\n  {failure.key}: {failure.what}" for failure in done.proof.failures[:10])
        more = f"\n  … and {done.proof.failed - 10} more" if done.proof.failed > 10 else ""
        raise CheckError(f"the output is not what it must be; nothing was published:{lines}{more}")
    return done.proof.to_json(), done.probe.to_json() if done.probe else None, done.hashes


def verify(
    out: Path,
    base: Path | str | None = None,
    adapters: Sequence[tuple[Path, float]] = (),
    *,
    probe: bool = True,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Verified:
    """Prove a merged checkpoint, made by any tool, against `base` and `adapters` (folders as for merge-absorb).

    What is not named is taken from the manifest of the output, if merge-absorb wrote it; the base, else, from what the
    adapter records.  Every number must be the nearest one where base, adapters and weights are those of the manifest,
    and near it otherwise.  `progress` is told bytes done and in all.
    Raises `FileError` and `InputError` for folders that are missing, damaged, or not told of.
    """
    merged = Checkpoint.open(out)
    manifest = _manifest(out)
    named = list(adapters) or [(Path(str(a["path"])), float(a["weight"])) for a in manifest.get("adapters", ())]
    if not named:
        raise InputError(
            f"{out}: has no {MANIFEST_FILE} that says what it was merged from: name the adapters with --adapter "
            "DIR[=WEIGHT], and their base with --base"
        )
    if base is None and manifest and not Path(manifest["base"]).is_dir():
        raise FileError(
            f"{out / MANIFEST_FILE}: the base was {manifest['base']}, which is gone: name its folder with --base"
        )
    inputs = open_inputs(named, manifest.get("base") if base is None else base, out)
    places, opened = inputs.places, inputs.adapters
    for adapter, _ in opened:
        adapter.check_finite()
    notes = _other_inputs(manifest, inputs.base, opened)
    total, done = merged.nbytes, 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress(done, total)

    found = check(
        inputs.base,
        inputs.arch,
        opened,
        merged,
        strict=bool(manifest) and not notes,
        options=Options(**manifest["options"]) if manifest else None,
        with_probe=probe,
        files=manifest.get("files"),
        workers=workers,
        progress=count,
    )
    used = [(str(adapter.folder), weight) for adapter, weight in opened]
    return Verified(str(out.absolute()), str(places.base.absolute()), used, found.proof, found.probe, notes)


def _manifest(out: Path) -> dict[str, Any]:
    """The manifest of an output of merge-absorb; empty where there is none."""
    file = out / MANIFEST_FILE
    if not file.is_file():
        return {}
    manifest = read_json_object(file, "the manifest of the merge")
    match manifest:
        case {"base": str(), "base_files": dict(), "adapters": [_, *_], "options": dict(options), "files": dict()}:
            if options.keys() == Options().to_json().keys():
                return manifest
    raise FileError(f"{file}: is damaged, or of another version of mla-tune: remove it and name --base and --adapter")


def _other_inputs(
    manifest: Mapping[str, Any], base: Checkpoint, adapters: Sequence[tuple[Adapter, float]]
) -> list[str]:
    """In what base, adapters and weights differ from those that the manifest names, by their content."""
    if not manifest:
        return []
    notes = []
    headers = {base.name(s): {"header_sha256": s.header_sha256, "bytes": s.stamp.size} for s in base.shards}
    if headers != manifest["base_files"]:
        notes.append(f"{base.folder} is not the base of the merge, or it has changed since")
    recorded = manifest["adapters"]
    if [weight for _, weight in adapters] != [entry["weight"] for entry in recorded]:
        notes.append("the adapters, or their weights, are not those of the merge")
        return notes
    for (adapter, _), entry in zip(adapters, recorded, strict=True):
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if sha256_of(adapter.folder / name) != entry[name]:
                notes.append(f"{adapter.folder / name} is not the file of the merge, or it has changed since")
    return notes


def _changed_files(
    folder: Path, files: Mapping[str, Mapping[str, Any]], hashes: Mapping[str, str | None]
) -> list[Failure]:
    """Files of a manifest that are not what they were when it was written."""
    failures = []
    for name, entry in files.items():
        file = folder / name
        if not file.is_file():
            failures.append(Failure(name, "was written by the merge and is missing"))
        elif (size := file.stat().st_size) != entry["bytes"]:
            failures.append(Failure(name, f"has {size:,} bytes, and had {entry['bytes']:,} when it was written"))
        elif entry["sha256"] and (hashes.get(name) or sha256_of(file)) != entry["sha256"]:
            failures.append(Failure(name, "has changed since it was written (its sha256 is another)"))
    return failures
