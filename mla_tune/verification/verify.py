"""The proof of one output, numbers, absorbed tensors and logits: for `merge-absorb`, and for `verify` on any folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from mla_tune.adapter.files import CONFIG_FILE, WEIGHTS_FILE, Adapter
from mla_tune.adapter.inputs import Inputs, open_inputs
from mla_tune.adapter.merge_options import MergeOptions
from mla_tune.checkpoint.absorbed import absorbed_tensors
from mla_tune.checkpoint.atomic_files import sha256_of
from mla_tune.checkpoint.index import Checkpoint
from mla_tune.checkpoint.manifest import MANIFEST_FILE, read_manifest
from mla_tune.errors import CheckError, FileError, InputError
from mla_tune.progress import Progress, counter
from mla_tune.verification.absorbed import prove_absorbed
from mla_tune.verification.layout import Failure
from mla_tune.verification.result import Proven, VerifyResult
from mla_tune.verification.weights import ProofReport, prove, with_failures

if TYPE_CHECKING:
    from mla_tune.verification.logits.compare import LogitsComparison
    from mla_tune.verification.logits.differences import LogitsReport


@dataclass(frozen=True, slots=True)
class Checked:
    """What was proven, what the logits said (None: not asked, or the proof failed), and the sha256 of each file of
    weights that was read."""

    proof: ProofReport
    logits: LogitsReport | None
    hashes: dict[str, str | None]


def check(
    inputs: Inputs,
    merged: Checkpoint,
    *,
    strict: bool,
    options: MergeOptions | None = None,
    comparison: LogitsComparison | None = None,
    files: Mapping[str, Mapping[str, Any]] | None = None,
    hashed: Sequence[str] = (),
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
) -> Checked:
    """Prove `merged` against base and adapters.  Failures are in the report; logits are compared where there are none.

    `options` are those of the merge where it is `strict`.  `files` are those of a manifest (see `write_manifest`): the
    output's must still be the same.  `hashed` are files of weights whose sha256 is not asked for.
    """
    options = options or MergeOptions()
    absorbed = absorbed_tensors(merged.folder)
    with ThreadPoolExecutor(1) as pool:
        compared = pool.submit(comparison.compare, merged, absorbed) if comparison else None
        try:
            report, hashes = prove(
                inputs.base,
                inputs.arch,
                inputs.adapters,
                merged,
                strict=strict,
                rounding=options.round,
                exact=options.exact,
                dtype=options.dtype,
                hashed=hashed,
                workers=workers,
                progress=progress,
            )
            modules, failures, digests = prove_absorbed(inputs.arch, merged, absorbed, workers=workers)
            hashes |= digests
            failures += _changed_files(merged.folder, files or {}, hashes)
            report = with_failures(report, failures, absorbed=modules)
        except BaseException:
            if comparison:
                comparison.stop()
            raise
        if comparison and report.failed:
            comparison.stop()
    return Checked(report, None if compared is None or report.failed else compared.result(), hashes)


class MergeProof:
    """The proof of what merge-absorb writes: `begin` computes the logits that need no output, `finish` all else."""

    def __init__(
        self, inputs: Inputs, options: MergeOptions, logits: bool, workers: int, progress: Progress | None
    ) -> None:
        self.inputs, self.options, self.workers, self.progress = inputs, options, workers, progress
        passed = counter(progress, "logits", 2 * inputs.base.nbytes)
        self.comparison = _comparison(inputs, options.absorb, passed) if logits else None

    def begin(self) -> None:
        """In a thread; `finish` waits for it, and tells what goes wrong."""
        if self.comparison:
            Thread(target=self._reference, args=(self.comparison,), daemon=True).start()

    def _reference(self, comparison: LogitsComparison) -> None:
        with suppress(Exception):  # it is raised again by what waits for it
            comparison.reference()

    def finish(self, folder: Path, hashed: Sequence[str] = ()) -> Proven:
        """Prove `folder`, without the sha256 of the files in `hashed`.  Raises `CheckError` naming what differs."""
        merged = Checkpoint.open(folder)
        count = counter(self.progress, "check", merged.nbytes)
        done = check(
            self.inputs,
            merged,
            strict=True,
            options=self.options,
            comparison=self.comparison,
            hashed=hashed,
            workers=self.workers,
            progress=count,
        )
        if done.proof.failed:
            lines = "".join(f"\n  {failure.key}: {failure.what}" for failure in done.proof.failures[:10])
            more = f"\n  … and {done.proof.failed - 10} more" if done.proof.failed > 10 else ""
            raise CheckError(f"the output is not what it must be; nothing was published:{lines}{more}")
        return Proven(done.proof.to_json(), done.logits.to_json() if done.logits else None, done.hashes)


def verify(
    out: Path | str,
    base: Path | str | None = None,
    adapters: Sequence[tuple[Path, float]] = (),
    *,
    logits: bool = True,
    workers: int = 2,
    progress: Progress | None = None,
) -> VerifyResult:
    """Prove a merged checkpoint, made by any tool, against `base` and `adapters` (folders as for merge-absorb).

    What is not named is taken from the manifest of the output, if merge-absorb wrote it; the base, else, from what the
    adapter records.  Every number must be the nearest one where base, adapters and weights are those of the manifest,
    and near it otherwise.
    Raises `FileError` and `InputError` for folders that are missing, damaged, or not told of.
    """
    out = Path(out)
    merged = Checkpoint.open(out)
    manifest = read_manifest(out, MergeOptions().to_json())
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
    mtp = bool(manifest["options"]["mtp"]) if manifest else True
    inputs = open_inputs(named, manifest.get("base") if base is None else base, out, mtp)
    places, opened = inputs.places, inputs.adapters
    for adapter, _ in opened:
        adapter.check_finite()
    notes = _other_inputs(manifest, inputs.base, opened)
    passed = counter(progress, "logits", inputs.base.nbytes + merged.nbytes)
    found = check(
        inputs,
        merged,
        strict=bool(manifest) and not notes,
        options=MergeOptions(**manifest["options"]) if manifest else None,
        comparison=_comparison(inputs, _mode(absorbed_tensors(merged.folder)), passed) if logits else None,
        files=manifest.get("files"),
        workers=workers,
        progress=counter(progress, "check", merged.nbytes),
    )
    used = [(str(adapter.folder), weight) for adapter, weight in opened]
    return VerifyResult(str(out.absolute()), str(places.base.absolute()), used, found.proof, found.logits, notes)


def _comparison(inputs: Inputs, absorb: str, progress: Callable[[int], None]) -> LogitsComparison:
    # transformers and PEFT take seconds to load.
    from mla_tune.verification.logits.compare import LogitsComparison

    return LogitsComparison(inputs.base, inputs.arch, inputs.adapters, absorb, progress=progress)


def _mode(absorbed: Iterable[str]) -> str:
    """What made these absorbed tensors."""
    names = {key.rpartition(".")[2] for key in absorbed}
    return "none" if not names else "fold" if "W_QK" in names else "split"


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
