"""The proof: a merged checkpoint, made by any tool, against its base and its adapters, number by number.

    S  the exact sum W + Σ w·s·B·A (for DoRA its rows scaled to the magnitude), computed here in torch, one precision
       above what is written: float32 for 16-bit and FP8 outputs, float64 for float32 ones
    O  the number that lies in the output           ulp  unit in the last place of the output's dtype

Strict, for outputs of `merge-absorb`: |O - S| ≤ ulp/2 (ulp for stochastic rounding) plus `slack`, the bound on the
error of both float computations (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1: a dot
product of r terms is off by at most γ_r |B||A|, γ_r ≈ r·u).  For other tools each number may be off by 1.5 ulp of the
largest of |W|, |Δ|, |S| and |O| (PEFT rounds the delta to bfloat16 first; its DoRA rounds four times), and, since a
whole adapter can hide below an ulp, the projection

    kept(O) = ⟨O - W, Δ⟩ / ‖Δ‖²    must equal kept(Q(S)) within 0.05 + 6σ,   σ² = Σ (ulp²/12) Δ² / ‖Δ‖⁴

where σ is the spread that rounding noise of ±ulp/2 gives to it.  A dropped adapter has kept = 0; an rsLoRA scaled by
alpha/r has 1/√r.  Tensors that no adapter reaches are equal byte for byte, or the base's number rounded once.
"""

from __future__ import annotations

import hashlib
import math
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from mla_tune.adapter.files import Adapter, AdapterDelta
from mla_tune.arch.site import Architecture, Site
from mla_tune.checkpoint.index import INDEX_FILE, Checkpoint, Shard, TensorRef
from mla_tune.errors import InputError
from mla_tune.merge.proof_values import PRECISION, TORCH, Factors, Reader, Values, matrix_shape, whole

#: Bytes read at once, and numbers computed at once: a few float32 arrays of the latter fit into a core's cache.
_PIECE, _BLOCK = 1 << 23, 1 << 17
#: Failures that are listed; all are counted.
_LISTED = 100
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class Failure:
    """One tensor, or one thing about the checkpoint, that is not as it must be."""

    key: str
    what: str


@dataclass(frozen=True, slots=True)
class ProofReport:
    """`recomputed` tensors were computed again, of `numbers` numbers, `unchanged` ones compared byte for byte;
    `same_files` are the base's own.  `worst_ulp` is the largest |O - S| in ulp, 0.5 where every number is the nearest
    one.  `absorbed` counts attention modules.  `failed` counts all failures, `failures` lists the first."""

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
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Expected:
    """What a tensor must be: `source` (the base's, or an adapter's whole tensor) plus updates on rows of `site`."""

    source: TensorRef
    updates: tuple[tuple[AdapterDelta, float], ...] = ()
    site: Site | None = None
    is_bias: bool = False


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
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
) -> tuple[ProofReport, dict[str, str | None]]:
    """Compare `merged` with what base and adapters make; also returns the sha256 of each weight file (None for the
    base's own files, which are not read).

    `exact` says that sums were made in float64.  Raises `FileError` and `InputError` for a base that can't be read.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        prover = _Prover(base, arch, adapters, merged, strict, rounding, exact, progress)
        failures = prover.check_keys()
        with ThreadPoolExecutor(max(1, workers)) as pool:
            tallies = list(pool.map(prover.shard, merged.shards))
    finally:
        torch.set_num_threads(threads)
    failures += [f for t in tallies for f in t.failures]
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


def expectations(
    base: Checkpoint, arch: Architecture, adapters: Sequence[tuple[Adapter, float]]
) -> dict[str, Expected]:
    """Every tensor that the adapters change, by checkpoint key."""
    result: dict[str, Expected] = {}
    for adapter, weight in adapters:
        for saved in adapter.saved:
            tied = arch.tied and saved.key == _HEAD and adapter.settings.get("ensure_weight_tying")
            result[_EMBEDDING if tied else saved.key] = Expected(saved.ref)
        for delta in adapter.deltas:
            site = delta.site
            keys = site.disk_keys()
            if delta.expert is not None and site.disk == "per_expert":
                keys = [key for key in keys if f".experts.{delta.expert}." in key]
                if delta.rows is not None:
                    name = "gate_proj" if delta.rows[0] == 0 else "up_proj"
                    keys = [key for key in keys if key.endswith(f".{name}.weight")]
            touched = [(key, False) for key in keys] + ([(f"{site.path}.bias", True)] if delta.bias is not None else [])
            for key, is_bias in touched:
                ref = base.tensors.get(key) or base[_EMBEDDING if key == _HEAD and arch.tied else key]
                known = result.get(key, Expected(ref))
                result[key] = Expected(known.source, (*known.updates, (delta, weight)), site, is_bias)
    return result


class _Prover:
    def __init__(
        self,
        base: Checkpoint,
        arch: Architecture,
        adapters: Sequence[tuple[Adapter, float]],
        merged: Checkpoint,
        strict: bool,
        rounding: str,
        exact: bool,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.base, self.merged, self.strict, self.exact = base, merged, strict, exact
        self.limit = 1.0 if rounding == "stochastic" else 0.5
        self.expected = expectations(base, arch, adapters)
        self.tied = arch.tied
        self.values = Values(base)
        self.problem: Failure | None = None
        try:
            self.out_values = Values(merged)
        except InputError as error:
            self.problem = Failure("config.json", str(error))
            self.out_values = Values(merged, {})
        self.scales = {q.scale.key: key for key, q in self.values.quantised.items()}
        self.out_scales = {q.scale.key: key for key, q in self.out_values.quantised.items()}
        self.reader, self.factors = Reader(), Factors()
        self.progress, self.lock = progress, threading.Lock()

    def check_keys(self) -> list[Failure]:
        """Tensors that are missing, too many, or of another shape, and a size in the index that is not in bytes."""
        failures = [self.problem] if self.problem else []
        base, merged = self.base.tensors, self.merged.tensors
        raised = self.values.quantised.keys() - self.out_values.quantised.keys()
        gone = {k for w in raised for k in (self.values.quantised[w].scale.key, *self.values.quantised[w].companions)}
        untied = _HEAD in merged and _HEAD not in base and not self.merged.config.get("tie_word_embeddings", self.tied)
        for key in base:
            if key not in merged and key not in gone:
                failures.append(Failure(key, "is in the base and missing in the output"))
        for key, ref in merged.items():
            if key in gone:
                failures.append(Failure(key, "scales of a weight that is not quantised any more"))
            elif key not in base and not (key == _HEAD and untied):
                failures.append(Failure(key, "is in the output and not in the base"))
            elif key in base and base[key].shape != ref.shape:
                failures.append(Failure(key, f"is {ref.shape}, and {base[key].shape} in the base"))
        for key in self.expected:
            if key not in base and key not in merged:
                failures.append(Failure(key, "is changed by the adapter and missing in the output"))
        size = ((self.merged.index or {}).get("metadata") or {}).get("total_size")
        if size is not None and size != self.merged.nbytes:
            failures.append(
                Failure(
                    "model.safetensors.index.json",
                    f"total_size is {size:,}; the tensors have {self.merged.nbytes:,} bytes",
                )
            )
        return failures

    def shard(self, shard: Shard) -> _Tally:
        """All tensors of one file, in its order, read once."""
        tally = _Tally()
        twin = self.base.folder / self.merged.name(shard)
        if twin.is_file() and twin.resolve().samefile(shard.file.resolve()):
            touched = [k for k in shard.tensors if k in self.expected]
            tally.failures += [Failure(k, "the file is the base's own: the adapter is not in it") for k in touched]
            tally.same, tally.unchanged = True, len(shard.tensors) - len(touched)
            self._count(sum(ref.nbytes for ref in shard.tensors.values()))
            return tally
        digest = hashlib.sha256()
        with shard.file.open("rb") as stream:
            first = min((ref.begin for ref in shard.tensors.values()), default=shard.stamp.size)
            digest.update(stream.read(first))
        for key, ref in shard.tensors.items():
            self._tensor(key, ref, tally, digest)
        tally.sha256 = digest.hexdigest()
        return tally

    def _count(self, nbytes: int) -> None:
        if self.progress:
            with self.lock:
                self.progress(nbytes)

    def _tensor(self, key: str, out: TensorRef, tally: _Tally, digest: Any) -> None:
        expected = self.expected.get(key)
        base = self.base.tensors.get(key)
        if expected is None:
            if base is None:  # an untied head starts as the embedding
                base = self.base.tensors.get(_EMBEDDING) if key == _HEAD and self.tied else None
            expected = Expected(base) if base is not None else None
        weight = self.out_scales.get(key)
        fresh = weight is not None and weight in self.expected  # proven by the weight that they belong to
        comparable = expected is not None and expected.source.shape == out.shape and not fresh
        check: _Check | None = None
        same_bytes = False
        if comparable and expected is not None:
            quantised = self._is_quantised(expected.source), key in self.out_values.quantised
            same_bytes = not expected.updates and expected.source.dtype == out.dtype and quantised[0] == quantised[1]
            if not same_bytes and (out.dtype not in PRECISION or expected.source.dtype not in PRECISION):
                tally.failures.append(Failure(key, f"is {out.dtype}, and {expected.source.dtype} in the base"))
                comparable = False
            elif not same_bytes:
                check = _Check(self, key, out, expected)
        equal = True
        for begin, end in _pieces(out):
            raw = self.reader.rows(out, begin, end, "out")
            digest.update(memoryview(raw.numpy()))
            if comparable and expected is not None:
                source = self.reader.rows(expected.source, begin, end, "base")
                if check is not None:
                    check.piece(raw, source, begin, end)
                else:
                    equal = equal and torch.equal(raw, source)
            self._count(raw.numel())
        if check is not None:
            tally.recomputed += 1
            tally.numbers += math.prod(out.shape)
            tally.worst = max(tally.worst, check.worst)
            what = check.verdict()
            if what:
                tally.failures.append(Failure(key, what))
        elif comparable:
            tally.unchanged += 1
            if not equal:
                tally.failures.append(Failure(key, "no adapter changes it, and it is not the base's"))

    def _is_quantised(self, ref: TensorRef) -> bool:
        return ref.key in self.values.quantised and self.base.tensors.get(ref.key) is ref


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


class _Check:
    """One tensor that was computed again."""

    def __init__(self, prover: _Prover, key: str, out: TensorRef, expected: Expected) -> None:
        self.prover, self.key, self.out, self.expected = prover, key, out, expected
        self.dtype = torch.float64 if out.dtype in ("F32", "F64") else torch.float32
        self.quant = prover.out_values.scaled(key)
        self.dora = any(d.magnitude is not None for d, _ in expected.updates)
        self.first_row, self.expert = _place(key, expected.site)
        self.worst, self.wrong, self.example = 0.5, 0, ""
        # Sums for the projection: ⟨O - W, Δ⟩, ⟨Q(S) - W, Δ⟩, ‖Δ‖², and the spread of the first.
        self.got = self.due = self.delta2 = self.spread = 0.0
        # Unit roundoff of the sums that made the output, and of those made here.
        self.u = (2.0**-53 if prover.exact or out.dtype == "F64" else 2.0**-24) + (
            2.0**-53 if self.dtype == torch.float64 else 2.0**-24
        )

    def piece(self, raw: torch.Tensor, source: torch.Tensor, begin: int, end: int) -> None:
        rows, width, source_width = end - begin, raw.numel(), source.numel()
        columns = matrix_shape(self.out.shape)[1]
        step = max(1, _BLOCK // max(1, columns))
        for a in range(0, rows, step):
            b = min(a + step, rows)
            O_raw = raw[a * width // rows : b * width // rows]
            W_raw = source[a * source_width // rows : b * source_width // rows]
            self._block(O_raw, W_raw, begin + a, begin + b)

    def _block(self, O_raw: torch.Tensor, W_raw: torch.Tensor, begin: int, end: int) -> None:
        W = self.prover.values.of(self.expected.source, W_raw, begin, end, self.dtype)
        S = self._sum(W, begin, end)
        nearest = self.prover.strict and self.prover.limit == 0.5 and self.out.dtype in ("BF16", "F16")
        if nearest and torch.equal(S.to(TORCH[self.out.dtype]).view(torch.int16).flatten(), O_raw.view(torch.int16)):
            return  # every number is the nearest one: there is nothing to look at
        out = self.prover.out_values.of(self.out, O_raw, begin, end, self.dtype)
        unit = torch.ones((), dtype=self.dtype)
        if self.quant is not None:
            unit = self.quant.spread(begin, end, self.out.shape).to(self.dtype)
        if self.prover.strict:
            ulp = _ulp(torch.maximum(S.abs(), out.abs()) / unit, self.out.dtype) * unit
            allowed = self.prover.limit * ulp + self._slack(W, S, begin, end)
        else:
            largest = torch.stack((W.abs(), (S - W).abs(), S.abs(), out.abs())).amax(0)
            ulp = _ulp(largest / unit, self.out.dtype) * unit
            allowed = (4.0 if self.dora else 1.5) * ulp + self._slack(W, S, begin, end)
            self._project(W, S, out, _ulp(out / unit, self.out.dtype) * unit)
        error = (out - S).abs()
        bad = ~(error <= allowed)  # a NaN is bad
        self.worst = max(self.worst, float((error / ulp).nan_to_num(math.inf).max()))
        count = int(bad.sum())
        if count and not self.wrong:
            row, column = (int(i) for i in bad.nonzero()[0])
            at, value = (
                f"[{begin + row}, {column}]",
                (float(O[row, column]), float(S[row, column]), float(W[row, column])),
            )
            self.example = f"at {at} it is {value[0]:.6g}, and {value[1]:.6g} is right (base: {value[2]:.6g})"
        self.wrong += count

    def _sum(self, W: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        S = W
        for rows, A, B in self._factors(begin, end):
            if rows == slice(0, end - begin):
                S = torch.addmm(S, B, A)
            else:
                S = S.clone() if S is W else S
                S[rows] += B @ A
        if self.expected.is_bias:
            for delta, weight in self.expected.updates:
                assert delta.bias is not None
                S = S + whole(delta.bias, self.dtype) * (delta.scale * weight)
        if self.dora:
            m = self._magnitude(begin, end)
            S = S * (m / torch.linalg.vector_norm(S, dim=1)).unsqueeze(1)
        return S

    def _factors(self, begin: int, end: int) -> list[tuple[slice, torch.Tensor, torch.Tensor]]:
        """(rows of the block, scaled A, B of these rows) of each update that reaches the block."""
        if self.expected.is_bias:
            return []
        result = []
        for delta, weight in self.expected.updates:
            assert self.expected.site is not None
            expert, row = self.expert, self.first_row + begin
            if self.expected.site.is_experts and expert is None:
                expert, row = divmod(begin, self.expected.site.shape[0])
            if delta.expert is not None and delta.expert != expert:
                continue
            low, high = delta.rows or (0, self.expected.site.shape[0])
            first, last = max(row, low), min(row + end - begin, high)
            if first >= last:
                continue
            A, B = self.prover.factors.of(delta, weight, self.dtype)
            which = expert if delta.experts > 1 and expert is not None else 0
            result.append((slice(first - row, last - row), A[which], B[which, first - low : last - low]))
        return result

    def _magnitude(self, begin: int, end: int) -> torch.Tensor:
        (delta, _), *_ = self.expected.updates
        assert delta.magnitude is not None
        first = self.first_row + begin - (delta.rows[0] if delta.rows else 0)
        return whole(delta.magnitude, self.dtype)[first : first + end - begin]

    def _slack(self, W: torch.Tensor, S: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """How far float sums may lie from the exact one: (r + 3)·u·|B||A| + 3u(|W| + |S|), and for DoRA the norm's."""
        slack = 3 * (W.abs() + S.abs())
        for rows, A, B in self._factors(begin, end):
            slack[rows] += (A.shape[0] + 3) * (B.abs() @ A.abs())
        if self.dora:
            slack = slack * (S.abs().amax(1) / W.abs().amax(1).clamp_min(1e-30)).clamp_min(1).unsqueeze(1)
            slack += (S.shape[1] + 8) * S.abs()
        return slack * self.u

    def _project(self, W: torch.Tensor, S: torch.Tensor, out: torch.Tensor, ulp: torch.Tensor) -> None:
        D = (S - W).double()
        Q = S if self.quant is not None else S.to(TORCH[self.out.dtype]).to(self.dtype)
        self.got += float(((out - W).double() * D).sum())
        self.due += float(((Q - W).double() * D).sum())
        self.delta2 += float((D * D).sum())
        self.spread += float((ulp.double() ** 2 / 12 * D * D).sum())
        if self.dora:  # PEFT rounds the factor of each row: an error along the row
            self.spread += float(((S.double() * D).sum(1) * 2.0 ** (1 - PRECISION[self.out.dtype][0])).square().sum())

    def verdict(self) -> str:
        """What is wrong with the tensor; empty where nothing is."""
        if self.wrong:
            return f"{self.wrong:,} of {math.prod(self.out.shape):,} numbers are wrong: {self.example}"
        if self.prover.strict or not self.delta2:
            return ""
        got, due = self.got / self.delta2, self.due / self.delta2
        tolerance = 0.05 + 6 * math.sqrt(self.spread) / self.delta2
        if abs(got - due) > tolerance:
            return f"holds {got:.1%} of the adapter's change, and {due:.1%} is right (± {tolerance:.1%})"
        return ""


def _place(key: str, site: Site | None) -> tuple[int, int | None]:
    """(first row of the site's matrix, expert) that a tensor holds."""
    match = re.search(r"\.experts\.(\d+)\.(\w+)\.weight$", key)
    if match is None or site is None or not site.is_experts:
        return 0, None
    return (site.shape[0] // 2 if match[2] == "up_proj" else 0), int(match[1])


def _ulp(x: torch.Tensor, dtype: str) -> torch.Tensor:
    """The unit in the last place of `dtype` at |x|."""
    bits, smallest = PRECISION[dtype]
    exponent = torch.frexp(x)[1] - 1
    return torch.ldexp(torch.ones((), dtype=x.dtype), exponent.clamp_min(smallest) - bits + 1)
