"""The proof of all weights: compare a merged checkpoint, tensor by tensor, with its base and adapters.

The checkpoint may be made by any tool.  Every tensor that an adapter changes is recomputed (`tensors`).  Every other
tensor must equal the base's byte for byte, or be the base's numbers rounded once to another dtype.  `layout` compares
headers and config.json.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from mla_tune.adapter.deltas import Adapter
from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.index import Checkpoint, Shard, TensorRef, matrix_shape
from mla_tune.errors import InputError
from mla_tune.verification.dequantize import DequantizedCheckpoint, FactorCache
from mla_tune.verification.layout import ExpectedTensor, Failure, LayoutCheck, ProofRules, expected_changes
from mla_tune.verification.read import PRECISION, TensorReader, same_bytes
from mla_tune.verification.tensors import TensorCheck

#: Bytes read at once: few enough that they are still in a core's cache when they are hashed and computed with.
_READ_BYTES = 1 << 21
#: At most so many failures are listed in a report; all are counted.
_LISTED = 100


@dataclass(frozen=True, slots=True)
class ProofReport:
    """What was compared, and what is wrong."""

    strict: bool
    """Every number had to be the one that merge-absorb writes; otherwise, one that any tool may write."""
    recomputed: int
    """Tensors that were recomputed from base and adapters."""
    numbers: int
    """Numbers in these tensors."""
    unchanged: int
    """Tensors that were compared with the base's byte for byte, or that are in a file of the base."""
    same_files: int
    """Files that are the base's own (hard links) and were not read."""
    worst_ulp: float
    """The largest distance of a number from the exact sum, less the error of float sums, in units in the last place:
    0.5 where every number is the nearest one."""
    absorbed: int
    """Attention modules whose absorbed tensors are right."""
    failed: int
    """Tensors and files that are wrong."""
    failures: tuple[Failure, ...]
    """The first of them."""

    def to_json(self) -> dict[str, Any]:
        """Return the document under `proof` in the results of `verify` and `merge-absorb`."""
        return asdict(self) | {"failures": [asdict(failure) for failure in self.failures]}


@dataclass
class _ShardResult:
    """What the comparison of one file found; the fields are those of `ProofReport`."""

    recomputed: int = 0
    numbers: int = 0
    unchanged: int = 0
    is_base_file: bool = False
    worst_ulp: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    sha256: str | None = None


def prove(
    base: Checkpoint,
    arch: Architecture,
    adapters: Sequence[tuple[Adapter, float]],
    merged: Checkpoint,
    *,
    strict: bool,
    rounding: str = "nearest",
    exact: bool = False,
    dtype: str = "keep",
    hashed: Container[str] = (),
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
) -> tuple[ProofReport, dict[str, str | None]]:
    """Compare `merged` with the result of merging `adapters`, each with its weight, into `base`.

    Returns the report, and the sha256 of each weight file by name; None for the base's own files, which are not read,
    and for the files in `hashed`, whose sha256 the caller knows.

    `strict` says that merge-absorb wrote the output, with `rounding`, `dtype` and, if `exact`, sums in float64.
    `workers` is the number of threads.  `progress(n)` is called for every n bytes of the output that are done.
    Raises `FileError` and `InputError` for a base or output that can't be read, and for sums that are not defined.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # every worker is a thread
    rules = ProofRules(strict, rounding, exact, dtype)
    comparison = _WeightComparison(base, arch, adapters, merged, rules, hashed, progress)
    try:
        with ThreadPoolExecutor(max(1, workers)) as pool:
            try:
                shards = list(pool.map(comparison.compare_shard, merged.shards))
            except BaseException:
                comparison.stop.set()
                raise
    finally:
        torch.set_num_threads(threads)
    failures = [*comparison.failures, *comparison.layout.failures(), *(f for s in shards for f in s.failures)]
    report = ProofReport(
        strict=strict,
        recomputed=sum(s.recomputed for s in shards),
        numbers=sum(s.numbers for s in shards),
        unchanged=sum(s.unchanged for s in shards),
        same_files=sum(s.is_base_file for s in shards),
        worst_ulp=max((s.worst_ulp for s in shards), default=0.0),
        absorbed=0,
        failed=len(failures),
        failures=tuple(failures[:_LISTED]),
    )
    return report, {merged.name(shard): s.sha256 for shard, s in zip(merged.shards, shards, strict=True)}


def with_failures(report: ProofReport, more: Sequence[Failure], *, absorbed: int) -> ProofReport:
    """Return the report with the failures of another check, and the count of `absorbed` modules, added."""
    failures = (*report.failures, *more)[:_LISTED]
    return replace(report, absorbed=absorbed, failed=report.failed + len(more), failures=failures)


class _WeightComparison:
    """The state of one `prove`, shared by its threads."""

    def __init__(
        self,
        base: Checkpoint,
        arch: Architecture,
        adapters: Sequence[tuple[Adapter, float]],
        merged: Checkpoint,
        rules: ProofRules,
        hashed: Container[str],
        progress: Callable[[int], None] | None,
    ) -> None:
        self.rules, self.hashed = rules, hashed
        self.base = DequantizedCheckpoint(base)
        self.expected = expected_changes(self.base, arch, adapters)
        #: What is wrong with the output as a whole.
        self.failures: list[Failure] = []
        try:
            self.merged = DequantizedCheckpoint(merged)
        except InputError as error:
            self.failures.append(Failure("config.json", str(error)))
            self.merged = DequantizedCheckpoint(merged, {})
        self.layout = LayoutCheck(self.base, self.merged, arch, self.expected, rules)
        #: Key of each scale in the output → key of its weight.
        self.scales = {scale.key: key for key, tensor in self.merged.quantized.items() for scale in tensor.scales}
        self.reader, self.factors = TensorReader(), FactorCache()
        self.progress, self.lock = progress, threading.Lock()
        #: Set where another thread failed, so that this one ends too.
        self.stop = threading.Event()

    def compare_shard(self, shard: Shard) -> _ShardResult:
        """Compare all tensors of one file in the order of the file, which is read once."""
        result = _ShardResult()
        if self._is_base_file(shard):
            changed = [key for key, ref in shard.tensors.items() if self.base.weight_key(ref) in self.expected]
            what = "the file is the base's own: the adapter is not merged into it"
            result.failures += [Failure(key, what) for key in changed]
            result.is_base_file, result.unchanged = True, len(shard.tensors) - len(changed)
            self._report_progress(sum(ref.nbytes for ref in shard.tensors.values()))
            return result
        digest = None if self.merged.checkpoint.name(shard) in self.hashed else hashlib.sha256()
        if digest:
            with shard.file.open("rb") as stream:
                digest.update(stream.read(min((ref.begin for ref in shard.tensors.values()), default=shard.stamp.size)))
        for key, ref in shard.tensors.items():
            self._compare_tensor(key, ref, result, digest)
        result.sha256 = digest.hexdigest() if digest else None
        return result

    def _is_base_file(self, shard: Shard) -> bool:
        """Tell whether the file is a hard link to the file in which the base has these tensors."""
        base = self.base.checkpoint
        file = base.folder / self.merged.checkpoint.name(shard)
        return (
            file.is_file()
            and file.samefile(shard.file)
            and all(key in base.tensors and base.tensors[key].file == file for key in shard.tensors)
        )

    def _report_progress(self, nbytes: int) -> None:
        if self.progress:
            with self.lock:
                self.progress(nbytes)

    def _compare_tensor(self, key: str, out: TensorRef, result: _ShardResult, digest: Any) -> None:
        """Compare one tensor and add what is found to `result`.

        All bytes of the tensor go through `digest`, if there is one, even if nothing is compared.
        """
        name = self.merged.weight_key(out)
        # The scale of a changed weight has no counterpart in the base: it is proven by the numbers that it makes.
        is_new_scale = self.scales.get(key) in self.expected
        expected = None if is_new_scale else self._comparable(name, out)
        check = None
        if expected is not None and (expected.updates or expected.source.dtype != out.dtype):
            check = self._check(out, expected)
        equal = True
        for begin, end in _row_ranges(out):
            if self.stop.is_set():
                return
            raw = self.reader.rows(out, begin, end, "out")
            if digest:
                digest.update(raw.numpy().data)
            if expected is not None:
                source = self.reader.rows(expected.source, begin, end, "base")
                if check is not None:
                    check.add_rows(raw, source, begin, end)
                else:
                    equal = equal and same_bytes(raw, source)
            self._report_progress(raw.numel())
        if check is not None and expected is not None:
            if check.is_undecided:
                check = self._check_thoroughly(out, expected)
            result.recomputed += 1
            result.numbers += math.prod(self.merged.shape(out))
            result.worst_ulp = max(result.worst_ulp, check.worst)
            what = check.failure()
            if what:
                result.failures.append(Failure(key, what))
        elif is_new_scale:
            result.recomputed += 1
        elif expected is not None:
            result.unchanged += 1
            if not equal and (self.rules.strict or not self.layout.is_unread(key)):
                in_adapter = name in self.expected
                what = "differs from the adapter's" if in_adapter else "differs from the base's; no adapter changes it"
                result.failures.append(Failure(key, what))

    def _comparable(self, name: str, out: TensorRef) -> ExpectedTensor | None:
        """Return what the weight `name` must be; None where shape or dtype rule out a comparison.

        `LayoutCheck` reports those tensors.
        """
        expected = self.layout.expected_tensor(name)
        if expected is None or self.base.shape(expected.source) != self.merged.shape(out):
            return None
        if expected.updates or expected.source.dtype != out.dtype:
            is_float = (
                self.base.is_quantized(expected.source) or expected.source.dtype in PRECISION,
                name in self.merged.quantized or out.dtype in PRECISION,
            )
            return expected if all(is_float) else None
        return expected

    def _check(self, out: TensorRef, expected: ExpectedTensor, *, thorough: bool = False) -> TensorCheck:
        return TensorCheck(out, expected, self.base, self.merged, self.factors, self.rules, thorough=thorough)

    def _check_thoroughly(self, out: TensorRef, expected: ExpectedTensor) -> TensorCheck:
        """Read the tensor again for a check that does not take the quick way."""
        check = self._check(out, expected, thorough=True)
        for begin, end in _row_ranges(out):
            raw = self.reader.rows(out, begin, end, "out")
            check.add_rows(raw, self.reader.rows(expected.source, begin, end, "base"), begin, end)
        return check


def _row_ranges(ref: TensorRef) -> list[tuple[int, int]]:
    """Return ranges of rows of about `_READ_BYTES` bytes that do not cross from one expert to the next."""
    rows, _ = matrix_shape(ref.shape)
    matrices = ref.shape[0] if len(ref.shape) == 3 else 1
    step = max(1, _READ_BYTES * rows // max(1, ref.nbytes))
    result = []
    for i in range(matrices):
        first, last = i * rows // matrices, (i + 1) * rows // matrices
        result += [(begin, min(begin + step, last)) for begin in range(first, last, step)]
    return result
