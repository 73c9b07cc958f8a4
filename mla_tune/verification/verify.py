"""`verify`: prove the weights, absorbed tensors and logits of a merged checkpoint.

`merge-absorb` proves its output with the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from mla_tune.adapter.deltas import Adapter
from mla_tune.adapter.files import CONFIG_FILE, WEIGHTS_FILE
from mla_tune.adapter.merge_options import MergeOptions
from mla_tune.checkpoint.absorbed import absorbed_tensors
from mla_tune.checkpoint.atomic_files import sha256_of
from mla_tune.checkpoint.index import Checkpoint
from mla_tune.checkpoint.manifest import MANIFEST_FILE, read_manifest
from mla_tune.errors import CheckError, FileError, InputError
from mla_tune.progress import Progress, counter
from mla_tune.runs.merge_inputs import MergeInputs, open_inputs
from mla_tune.verification.absorbed import prove_absorbed
from mla_tune.verification.layout import Failure
from mla_tune.verification.result import ProofDocuments, VerifyResult
from mla_tune.verification.weights import ProofReport, prove, with_failures

if TYPE_CHECKING:
    from mla_tune.verification.logits.compare import LogitsComparison
    from mla_tune.verification.logits.differences import LogitsReport


@dataclass(frozen=True, slots=True)
class OutputProof:
    """What the proof of one output found."""

    proof: ProofReport
    """The comparison of tensors and files."""
    logits: LogitsReport | None
    """The comparison of logits; None if it was not asked for, or if tensors or files are wrong."""
    hashes: dict[str, str | None]
    """Name of each weight file → its sha256; None where it was not computed."""


def prove_output(
    inputs: MergeInputs,
    merged: Checkpoint,
    *,
    strict: bool,
    options: MergeOptions | None = None,
    comparison: LogitsComparison | None = None,
    files: Mapping[str, Mapping[str, Any]] | None = None,
    hashed: Sequence[str] = (),
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
) -> OutputProof:
    """Compare `merged` with the merge of `inputs`: weights, absorbed tensors, files and, if nothing is wrong, logits.

    `strict` says that merge-absorb wrote `merged`, with `options`.  `comparison` compares the logits; None: they are
    not compared.  `files` are those of the manifest (`write_manifest`), which must be unchanged.  `hashed` are weight
    files whose sha256 is not needed.  `workers` is the number of threads.  `progress(n)` is called for every n bytes
    of weights that are done.
    """
    options = options or MergeOptions()
    absorbed = absorbed_tensors(merged.folder)
    with ThreadPoolExecutor(1) as pool:
        logits = pool.submit(comparison.compare, merged, absorbed) if comparison else None
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
    return OutputProof(report, None if logits is None or report.failed else logits.result(), hashes)


class MergeProof:
    """The proof of an output of merge-absorb.

    `begin`, called while the merge runs, computes the logits of base + adapters; `finish` proves what was written.
    """

    def __init__(
        self, inputs: MergeInputs, options: MergeOptions, *, logits: bool, workers: int, progress: Progress | None
    ) -> None:
        self.inputs, self.options, self.workers, self.progress = inputs, options, workers, progress
        count = counter(progress, "logits", 2 * inputs.base.nbytes)
        self.comparison = _logits_comparison(inputs, options.absorb, count) if logits else None

    def begin(self) -> None:
        """Start a thread that computes the logits of base + adapters.  `finish` waits for it and raises its errors."""
        if self.comparison:
            Thread(target=self._compute_reference, args=(self.comparison,), daemon=True).start()

    def _compute_reference(self, comparison: LogitsComparison) -> None:
        with suppress(Exception):  # `LogitsComparison.compare` computes the reference again, which raises the error
            comparison.compute_reference()

    def finish(self, folder: Path, hashed: Sequence[str] = ()) -> ProofDocuments:
        """Prove the checkpoint in `folder`; the sha256 of the files in `hashed` is not computed.

        Raises `CheckError` that names the first tensors and files that are wrong.
        """
        merged = Checkpoint.open(folder)
        count = counter(self.progress, "check", merged.nbytes)
        found = prove_output(
            self.inputs,
            merged,
            strict=True,
            options=self.options,
            comparison=self.comparison,
            hashed=hashed,
            workers=self.workers,
            progress=count,
        )
        if found.proof.failed:
            lines = "".join(f"\n  {failure.key}: {failure.what}" for failure in found.proof.failures[:10])
            more = f"\n  … and {found.proof.failed - 10} more" if found.proof.failed > 10 else ""
            n = found.proof.failed
            what = "1 tensor or file of the output is" if n == 1 else f"{n:,} tensors or files of the output are"
            raise CheckError(f"{what} wrong; nothing was published:{lines}{more}")
        return ProofDocuments(found.proof.to_json(), found.logits.to_json() if found.logits else None, found.hashes)


def verify(
    out: Path | str,
    base: Path | str | None = None,
    adapters: Sequence[tuple[Path, float]] = (),
    *,
    logits: bool = True,
    workers: int = 2,
    progress: Progress | None = None,
) -> VerifyResult:
    """Prove that the checkpoint in folder `out`, made by any tool, is `base` with `adapters` merged in.

    `base` and `adapters` (folder, weight) are folders as for merge-absorb.  By default they are those in the manifest
    that merge-absorb wrote into `out`; without a manifest, the base is the one that the adapter's run recorded.
    `logits`: compare logits too.  `workers`: number of threads.  `progress(stage, bytes done, bytes in all)` is called
    while it runs.

    If base, adapters and their weights are those of the manifest, every number must be one that merge-absorb writes.
    Otherwise it may be off by what other tools round (`mla_tune.verification.tensors`).  Tensors that are wrong are in
    the result, not an error.
    Raises `FileError` and `InputError` for folders that are missing, damaged, or not named.
    """
    out = Path(out)
    merged = Checkpoint.open(out)
    manifest = read_manifest(out, MergeOptions().to_json())
    named = list(adapters) or [(Path(str(a["path"])), float(a["weight"])) for a in manifest.get("adapters", ())]
    if not named:
        raise InputError(
            f"{out}: has no {MANIFEST_FILE} that says what it was merged from: name the adapters with --adapter "
            "DIR[=WEIGHT], and their base with --base DIR"
        )
    if base is None and manifest and not Path(manifest["base"]).is_dir():
        raise FileError(
            f"{out / MANIFEST_FILE}: the base was {manifest['base']}, which is gone: name its folder with --base DIR"
        )
    mtp = bool(manifest["options"]["mtp"]) if manifest else True
    inputs = open_inputs(named, manifest.get("base") if base is None else base, out, mtp)
    places, opened = inputs.paths, inputs.adapters
    for adapter, _ in opened:
        adapter.check_finite()
    notes = _changed_inputs(manifest, inputs.base, opened)
    count = counter(progress, "logits", inputs.base.nbytes + merged.nbytes)
    found = prove_output(
        inputs,
        merged,
        strict=bool(manifest) and not notes,
        options=MergeOptions(**manifest["options"]) if manifest else None,
        comparison=_logits_comparison(inputs, _absorb_mode(absorbed_tensors(merged.folder)), count) if logits else None,
        files=manifest.get("files"),
        workers=workers,
        progress=counter(progress, "check", merged.nbytes),
    )
    used = [(str(adapter.folder), weight) for adapter, weight in opened]
    return VerifyResult(str(out.absolute()), str(places.base.absolute()), used, found.proof, found.logits, notes)


def _logits_comparison(inputs: MergeInputs, absorb: str, progress: Callable[[int], None]) -> LogitsComparison:
    # transformers and PEFT take seconds to load.
    from mla_tune.verification.logits.compare import LogitsComparison

    return LogitsComparison(inputs.base, inputs.arch, inputs.adapters, absorb, progress=progress)


def _absorb_mode(absorbed: Iterable[str]) -> str:
    """Return the value of `--absorb` that writes tensors of these names."""
    names = {key.rpartition(".")[2] for key in absorbed}
    return "none" if not names else "fold" if "W_QK" in names else "split"


def _changed_inputs(
    manifest: Mapping[str, Any], base: Checkpoint, adapters: Sequence[tuple[Adapter, float]]
) -> list[str]:
    """Say, a sentence each, where base, adapters and weights differ from those of the manifest; files by content."""
    if not manifest:
        return []
    notes = []
    headers = {base.name(s): {"header_sha256": s.header_sha256, "bytes": s.stamp.size} for s in base.shards}
    if headers != manifest["base_files"]:
        notes.append(f"{base.folder} is not the base that merge-absorb read, or has changed since")
    recorded = manifest["adapters"]
    if [weight for _, weight in adapters] != [entry["weight"] for entry in recorded]:
        notes.append("the adapters, or their weights, are not those that merge-absorb merged")
        return notes
    for (adapter, _), entry in zip(adapters, recorded, strict=True):
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if sha256_of(adapter.folder / name) != entry[name]:
                notes.append(f"{adapter.folder / name} is not the file that merge-absorb read, or has changed since")
    return notes


def _changed_files(
    folder: Path, files: Mapping[str, Mapping[str, Any]], hashes: Mapping[str, str | None]
) -> list[Failure]:
    """Return the files of a manifest that are missing or have changed since it was written."""
    failures = []
    for name, entry in files.items():
        file = folder / name
        if not file.is_file():
            failures.append(Failure(name, "was written by the merge and is missing"))
        elif (size := file.stat().st_size) != entry["bytes"]:
            failures.append(Failure(name, f"has {size:,} bytes, but had {entry['bytes']:,} when it was written"))
        elif entry["sha256"] and (hashes.get(name) or sha256_of(file)) != entry["sha256"]:
            failures.append(Failure(name, "has changed since it was written (its sha256 differs)"))
    return failures
