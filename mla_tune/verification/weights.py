"""The proof: a merged checkpoint, made by any tool, against its base and its adapters, number by number.

    proof_layout.py    keys, shapes, dtypes, config.json; where each tensor's numbers come from
    proof_numbers.py   tensors that are computed again, and how far they may be off
    proof_absorbed.py  the tensors of the absorbed file
    proof_values.py    reading, in torch

Tensors that no adapter reaches are equal byte for byte, or the base's numbers rounded once to another dtype.
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

from mla_tune.adapter.files import Adapter
from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.index import Checkpoint, Shard, TensorRef, matrix_shape
from mla_tune.errors import InputError
from mla_tune.verification.dequantize import FactorCache, Values
from mla_tune.verification.layout import Expected, Failure, LayoutCheck, Rules, expectations
from mla_tune.verification.read import PRECISION, TensorReader, same_bytes
from mla_tune.verification.tensors import TensorCheck

#: Bytes read at once: what is read is still in a core's cache when it is hashed and computed with.
_PIECE = 1 << 21
#: Failures that are listed; all are counted.
_LISTED = 100


@dataclass(frozen=True, slots=True)
class ProofReport:
    """`recomputed` tensors were computed again, of `numbers` numbers; `unchanged` ones were compared byte for byte, but
    for those in `same_files`, files that are the base's own.  `worst_ulp` is the largest distance from the exact sum,
    less the error of float sums, in units in the last place: 0.5 where every number is the nearest one.  `absorbed`
    counts attention modules.  `failed` counts all failures, `failures` lists the first."""

    strict: bool
    recomputed: int
    numbers: int
    unchanged: int
    same_files: int
    worst_ulp: float
    absorbed: int
    failed: int
    failures: tuple[Failure, ...]

    def to_json(self) -> dict[str, Any]:
        """The document under `proof` in the results of `verify` and `merge-absorb`."""
        return asdict(self) | {"failures": [asdict(failure) for failure in self.failures]}


@dataclass
class _Tally:
    """What one shard gave."""

    recomputed: int = 0
    numbers: int = 0
    unchanged: int = 0
    same: bool = False
    worst: float = 0.0
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
    """Compare `merged` with what base and adapters make; also returns the sha256 of each weight file (None for the
    base's own files, which are not read, and for those in `hashed`).

    `strict`: the output is merge-absorb's, made with `rounding`, `dtype` and, where `exact`, sums in float64.
    `progress` is told bytes of the output as they are done.
    Raises `FileError` and `InputError` for a base or an output that can't be read, and for sums that are not defined.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # every worker is a thread
    rules = Rules(strict, rounding, exact, dtype)
    prover = _Prover(base, arch, adapters, merged, rules, hashed, progress)
    try:
        with ThreadPoolExecutor(max(1, workers)) as pool:
            try:
                tallies = list(pool.map(prover.shard, merged.shards))
            except BaseException:
                prover.stop.set()
                raise
    finally:
        torch.set_num_threads(threads)
    failures = [*prover.problems, *prover.layout.failures(), *(f for t in tallies for f in t.failures)]
    report = ProofReport(
        strict=strict,
        recomputed=sum(t.recomputed for t in tallies),
        numbers=sum(t.numbers for t in tallies),
        unchanged=sum(t.unchanged for t in tallies),
        same_files=sum(t.same for t in tallies),
        worst_ulp=max((t.worst for t in tallies), default=0.0),
        absorbed=0,
        failed=len(failures),
        failures=tuple(failures[:_LISTED]),
    )
    return report, {merged.name(s): t.sha256 for s, t in zip(merged.shards, tallies, strict=True)}


def with_failures(report: ProofReport, more: Sequence[Failure], *, absorbed: int) -> ProofReport:
    """The report with what another check found."""
    failures = (*report.failures, *more)[:_LISTED]
    return replace(report, absorbed=absorbed, failed=report.failed + len(more), failures=failures)


class _Prover:
    def __init__(
        self,
        base: Checkpoint,
        arch: Architecture,
        adapters: Sequence[tuple[Adapter, float]],
        merged: Checkpoint,
        rules: Rules,
        hashed: Container[str],
        progress: Callable[[int], None] | None,
    ) -> None:
        self.base, self.merged, self.rules, self.hashed = base, merged, rules, hashed
        self.values = Values(base)
        self.expected = expectations(self.values, arch, adapters)
        self.problems: list[Failure] = []
        try:
            self.out_values = Values(merged)
        except InputError as error:
            self.problems.append(Failure("config.json", str(error)))
            self.out_values = Values(merged, {})
        self.layout = LayoutCheck(self.values, self.out_values, arch, self.expected, rules)
        self.out_scales = {scale.key: key for key, q in self.out_values.quantized.items() for scale in q.scales}
        self.reader, self.factors = TensorReader(), FactorCache()
        self.progress, self.lock, self.stop = progress, threading.Lock(), threading.Event()

    def shard(self, shard: Shard) -> _Tally:
        """All tensors of one file, in its order, read once."""
        tally = _Tally()
        if self._is_base(shard):
            touched = [key for key, ref in shard.tensors.items() if self.values.name(ref) in self.expected]
            tally.failures += [Failure(key, "the file is the base's own: the adapter is not in it") for key in touched]
            tally.same, tally.unchanged = True, len(shard.tensors) - len(touched)
            self._count(sum(ref.nbytes for ref in shard.tensors.values()))
            return tally
        digest = None if self.merged.name(shard) in self.hashed else hashlib.sha256()
        if digest:
            with shard.file.open("rb") as stream:
                digest.update(stream.read(min((ref.begin for ref in shard.tensors.values()), default=shard.stamp.size)))
        for key, ref in shard.tensors.items():
            self._tensor(key, ref, tally, digest)
        tally.sha256 = digest.hexdigest() if digest else None
        return tally

    def _is_base(self, shard: Shard) -> bool:
        """Whether the file is, by another name, the one that the base has these tensors in."""
        alias = self.base.folder / self.merged.name(shard)
        return (
            alias.is_file()
            and alias.samefile(shard.file)
            and all(key in self.base.tensors and self.base.tensors[key].file == alias for key in shard.tensors)
        )

    def _count(self, nbytes: int) -> None:
        if self.progress:
            with self.lock:
                self.progress(nbytes)

    def _tensor(self, key: str, out: TensorRef, tally: _Tally, digest: Any) -> None:
        """Compare one tensor; its bytes go through `digest`, where there is one, whatever comes of it."""
        name = self.out_values.name(out)
        expected = self.layout.source(name)
        weight = self.out_scales.get(key)
        fresh = weight is not None and weight in self.expected  # scales are proven by the numbers that they make
        if expected is not None and (self.values.shape(expected.source) != self.out_values.shape(out) or fresh):
            expected = None
        check = None
        if expected is not None and (expected.updates or expected.source.dtype != out.dtype):
            coded = self.values.name(expected.source) in self.values.quantized, name in self.out_values.quantized
            if all(c or d in PRECISION for c, d in zip(coded, (expected.source.dtype, out.dtype), strict=True)):
                check = self._check(out, expected)
            else:
                expected = None  # the layout has told of it
        equal = True
        for begin, end in _pieces(out):
            if self.stop.is_set():
                return
            raw = self.reader.rows(out, begin, end, "out")
            if digest:
                digest.update(raw.numpy().data)
            if expected is not None:
                source = self.reader.rows(expected.source, begin, end, "base")
                if check is not None:
                    check.piece(raw, source, begin, end)
                else:
                    equal = equal and same_bytes(raw, source)
            self._count(raw.numel())
        if check is not None and expected is not None:
            if check.unsure:
                check = self._check(out, expected, thorough=True)
                for begin, end in _pieces(out):
                    raw = self.reader.rows(out, begin, end, "out")
                    check.piece(raw, self.reader.rows(expected.source, begin, end, "base"), begin, end)
            tally.recomputed += 1
            tally.numbers += math.prod(self.out_values.shape(out))
            tally.worst = max(tally.worst, check.worst)
            what = check.verdict()
            if what:
                tally.failures.append(Failure(key, what))
        elif fresh:
            tally.recomputed += 1
        elif expected is not None:
            tally.unchanged += 1
            if not equal and (self.rules.strict or not self.layout.is_unread(key)):
                what = (
                    "is not the adapter's" if name in self.expected else "is not the base's, and no adapter changes it"
                )
                tally.failures.append(Failure(key, what))

    def _check(self, out: TensorRef, expected: Expected, thorough: bool = False) -> TensorCheck:
        return TensorCheck(out, expected, self.values, self.out_values, self.factors, self.rules, thorough)


def _pieces(ref: TensorRef) -> list[tuple[int, int]]:
    """Row ranges of about `_PIECE` bytes that do not cross from one expert to the next."""
    rows, _ = matrix_shape(ref.shape)
    matrices = ref.shape[0] if len(ref.shape) == 3 else 1
    step = max(1, _PIECE * rows // max(1, ref.nbytes))
    result = []
    for i in range(matrices):
        first, last = i * rows // matrices, (i + 1) * rows // matrices
        result += [(begin, min(begin + step, last)) for begin in range(first, last, step)]
    return result
