"""`absorbed.safetensors`: the KV up-projection of every attention module in an absorbed form, from what was written.

    <attention path>.W_UK (H, C, P)   .W_UV (H, V, C)     split: the same numbers per head, bit for bit
    <attention path>.W_QK (H, Q, C)   .W_VO (H, D, C)     fold: multiplied into their neighbors, rounded once

Letters, formulas and costs: `mla_tune.absorption.fold`.  It is a by-product: inference engines load the standard
`kv_b_proj` and split it themselves.  The metadata of each file names the layout, the dimensions and the sha256 of each
tensor that it was made from, so that a reader can tell when it is out of date.  MTP layers, which are not part of the
model that config.json describes to transformers, have none.

Memory: a few heads at a time; `fold` keeps one module's W_UV as floats beside them (34 MB at DeepSeek-V3 size, and
about 100 MB in all for each worker).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from mla_tune.absorption.fold import (
    LAYOUTS,
    AttentionCost,
    attention_costs,
    fold_output,
    fold_query,
    latent_scales,
    model_costs,
    split_heads,
)
from mla_tune.arch.roles import Role
from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.absorbed import ABSORBED_FILE, ABSORBED_INDEX
from mla_tune.checkpoint.atomic_files import write_json
from mla_tune.checkpoint.dtypes import decode, encode
from mla_tune.checkpoint.index import Checkpoint, TensorRef, tensor_bytes
from mla_tune.checkpoint.quantized.base import QuantizedTensor
from mla_tune.checkpoint.tensor_io import read_raw, sha256
from mla_tune.checkpoint.writer import ShardWriter
from mla_tune.errors import CheckError
from mla_tune.merge.absorb_plan import AbsorbedPlan, plan_absorbed

#: Files of a shard set, finished ones.
_SHARDS = "absorbed-*-of-*.safetensors"
#: Numbers in memory at a time, of one source.
_BLOCK = 1 << 21
#: Rows of W_VO on which its rounding is measured.
_MEASURED_ROWS = 32


@dataclass(frozen=True, slots=True)
class AbsorbedReport:
    """The absorbed files and what they cost."""

    #: `split` or `fold`.
    mode: str
    #: Names of the files in the output folder.
    files: list[str]
    #: Attention modules that have absorbed tensors.
    modules: int
    #: Bytes of the tensors.
    bytes: int
    #: Cached tokens for which the costs are told.
    context: int
    #: Parameters and flops of every form of attention (`absorption.fold.attention_costs`), for one attention module.
    cost_module: tuple[AttentionCost, ...]
    #: The same for all attention modules.
    cost: tuple[AttentionCost, ...]
    #: By tensor name, the largest relative error ‖written - exact‖/‖exact‖ over the modules, each measured on one head
    #: against float64; empty where bits were only moved.
    rounding: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The fields as a dictionary that `json.dumps` takes."""
        return asdict(self)


def write_absorbed(
    arch: Architecture,
    merged: Checkpoint,
    folder: Path,
    mode: str,
    *,
    max_shard_bytes: int = 5_000_000_000,
    quantized: Mapping[str, QuantizedTensor] | None = None,
    exact: bool = False,
    context: int = 4096,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> AbsorbedReport:
    """Write the absorbed tensors of the `merged` checkpoint, as it lies on the disk, into `folder`.

    `quantized` tells how quantized weights are to be read.  `fold` multiplies in float32; in float64 with `exact`, and
    for float32 weights.  `context` is the S of the costs.  `workers` tensors are made at a time, one thread each.
    numpy's own threads should be off (OPENBLAS_NUM_THREADS=1): they wait for each other at every head.  `progress` is
    told the bytes of each piece written.  Files of an earlier run go first; the index, where there are several files,
    is written last.

    Raises what `plan_absorbed` raises, and `CheckError` where a product does not fit the dtype of the weights.
    """
    known = quantized or {}
    headers = {key: (ref.dtype, ref.shape) for key, ref in merged.tensors.items()}
    headers |= {key: (tensor.codes.dtype, tensor.shape) for key, tensor in known.items()}
    where = str(merged.folder)
    plan = plan_absorbed(arch, headers, mode, quantized=known, max_shard_bytes=max_shard_bytes, where=where)
    for old in (folder / ABSORBED_FILE, folder / ABSORBED_INDEX, *folder.glob(_SHARDS)):
        old.unlink(missing_ok=True)
    job = _Job(arch, merged, plan, known, exact, progress or (lambda _: None))
    for name, keys in plan.shards.items():
        metadata = job.metadata(keys)
        layout = {key: plan.layout[key] for key in keys}
        with ShardWriter(folder / name, layout, metadata) as writer, ThreadPoolExecutor(workers) as pool:
            tasks = [pool.submit(job.write, key, writer) for key in keys]
            try:
                for task in tasks:
                    task.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    if len(plan.shards) > 1:
        weight_map = {key: name for name, keys in plan.shards.items() for key in keys}
        about = {"total_size": plan.bytes, "layout": LAYOUTS[mode]}
        write_json(folder / ABSORBED_INDEX, {"metadata": about, "weight_map": weight_map})
    modules = len(plan.sources)
    return AbsorbedReport(
        mode=mode,
        files=list(plan.shards),
        modules=modules,
        bytes=plan.bytes,
        context=context,
        cost_module=attention_costs(arch.dims, context),
        cost=model_costs([a.dims for a in arch.attention], context),
        rounding=job.rounding,
    )


class _Job:
    """Computes and writes the tensors of one plan."""

    def __init__(
        self,
        arch: Architecture,
        merged: Checkpoint,
        plan: AbsorbedPlan,
        quantized: Mapping[str, QuantizedTensor],
        exact: bool,
        progress: Callable[[int], None],
    ) -> None:
        self.arch, self.merged, self.plan = arch, merged, plan
        self.dims = {a.path: a.dims for a in arch.attention}
        self.quantized, self.exact, self.progress = quantized, exact, progress
        self._lock = Lock()
        self.rounding: dict[str, float] = {}
        self._digests: dict[str, dict[str, str]] = {}
        # On one head of each module the rounding is measured: another head each time, so that none is never looked at.
        self.measured = {path: i % self.dims[path].H for i, path in enumerate(plan.sources)}

    def float_type(self, dtype: str) -> type:
        """What a product is computed in: more than the `dtype` that it is rounded to has."""
        return np.float64 if self.exact or dtype in ("F32", "F64") else np.float32

    def matrix(self, key: str) -> _Matrix:
        how = self.quantized.get(key)
        return _Matrix(self.merged[key] if how is None else how.codes, how)

    def digests(self, key: str) -> dict[str, str]:
        """Of a weight and of its scales.  Kept: a module's tensors may lie in two files."""
        if key not in self._digests:
            how = self.quantized.get(key)
            refs = [self.merged[key]] if how is None else [how.codes, *how.scales]
            self._digests[key] = {ref.key: sha256(ref) for ref in refs}
        return self._digests[key]

    def metadata(self, keys: tuple[str, ...]) -> dict[str, str]:
        """What a file of these tensors says about itself."""
        paths = dict.fromkeys(key.rpartition(".")[0] for key in keys)
        sources = [source for path in paths for source in self.plan.sources[path].values()]
        about = {
            "format": "pt",
            "mode": self.plan.mode,
            "layout": LAYOUTS[self.plan.mode],
            "dims": json.dumps(self._dims(list(paths))),
            "source_sha256": json.dumps({k: v for source in sources for k, v in self.digests(source).items()}),
        }
        if self.plan.mode == "fold":
            about["stays"] = "the R rope rows of each head in q_b_proj (q_proj): they can't be folded"
            about["latent_scales"] = json.dumps(latent_scales(self.arch.family, self.arch.dims))
        return about

    def _dims(self, paths: list[str]) -> dict[str, Any]:
        """The dimensions of these modules; by path where they differ."""
        if len({self.dims[path] for path in paths}) == 1:
            return asdict(self.dims[paths[0]])
        return {path: asdict(self.dims[path]) for path in paths}

    def write(self, key: str, writer: ShardWriter) -> None:
        path, _, name = key.rpartition(".")
        {"W_UK": self._halves, "W_UV": self._halves, "W_QK": self._query, "W_VO": self._output}[name](path, key, writer)

    def _halves(self, path: str, key: str, writer: ShardWriter) -> None:
        """One of the two halves, a few heads at a time."""
        d, name, dtype = self.dims[path], key.rpartition(".")[2], self.plan.layout[key][0]
        source = self.matrix(self.plan.sources[path][Role.W_UKV])
        at, rows = 0, d.P + d.V
        for first, last in _blocks(d.H, rows * d.C):
            codes = source.codes(first * rows, last * rows, dtype)
            half = split_heads(codes, d)[name == "W_UV"]
            self._put(writer, key, half, at)
            if source.scale is not None and first <= self.measured[path] < last:
                exact = split_heads(source.floats(first * rows, last * rows, np.float64), d)[name == "W_UV"]
                self._measure(name, half, dtype, exact)
            at += half.nbytes

    def _query(self, path: str, key: str, writer: ShardWriter) -> None:
        """W_QK, head by head."""
        d, sources, dtype = self.dims[path], self.plan.sources[path], self.plan.layout[key][0]
        query = self.matrix(sources[Role.W_Q if d.L is None else Role.W_UQ])
        kv_b = self.matrix(sources[Role.W_UKV])

        def product(h: int, float_type: type) -> np.ndarray:
            W_UQ = query.floats(h * (d.P + d.R), h * (d.P + d.R) + d.P, float_type)
            W_UK, _ = split_heads(kv_b.floats(h * (d.P + d.V), (h + 1) * (d.P + d.V), float_type), d)
            return fold_query(W_UQ, W_UK[0])

        at = 0
        for h in range(d.H):
            codes = self._round(key, product(h, self.float_type(dtype)), dtype)
            self._put(writer, key, codes, at)
            if h == self.measured[path]:
                self._measure("W_QK", codes, dtype, product(h, np.float64))
            at += codes.nbytes

    def _output(self, path: str, key: str, writer: ShardWriter) -> None:
        """W_VO: o_proj is read once, a few rows of all heads at a time."""
        d, sources, dtype = self.dims[path], self.plan.sources[path], self.plan.layout[key][0]
        kv_b, o_proj = self.matrix(sources[Role.W_UKV]), self.matrix(sources[Role.W_O])

        def value(h: int, float_type: type) -> np.ndarray:
            return split_heads(kv_b.floats(h * (d.P + d.V), (h + 1) * (d.P + d.V), float_type), d)[1][0]

        float_type = self.float_type(dtype)
        W_UV = [value(h, float_type) for h in range(d.H)]
        row_bytes = tensor_bytes(dtype, (d.C,))
        for first, last in _blocks(d.D, d.H * d.V):
            rows = o_proj.floats(first, last, float_type)
            for h in range(d.H):
                codes = self._round(key, fold_output(rows[:, h * d.V : (h + 1) * d.V], W_UV[h]), dtype)
                self._put(writer, key, codes, (h * d.D + first) * row_bytes)
                if first == 0 and h == self.measured[path]:
                    few = min(last, _MEASURED_ROWS)
                    columns = o_proj.floats(0, few, np.float64)[:, h * d.V : (h + 1) * d.V]
                    self._measure("W_VO", codes[:few], dtype, fold_output(columns, value(h, np.float64)))

    def _put(self, writer: ShardWriter, key: str, codes: np.ndarray, at: int) -> None:
        writer.write(key, codes, at)
        with self._lock:
            self.progress(codes.nbytes)

    def _round(self, key: str, product: np.ndarray, dtype: str) -> np.ndarray:
        codes = encode(product, dtype)
        with np.errstate(invalid="ignore", over="ignore"):  # a sum is a cheap look for infinities and NaN
            written = decode(codes, dtype)
            suspicious = not np.isfinite(written.sum())
        if suspicious and not np.isfinite(written).all():
            raise CheckError(
                f"{self.merged.folder}: {key} has numbers that {dtype} can't hold (infinite or not a number): use "
                "--absorb split, or --dtype bfloat16 or float32 where float16 is too small"
            )
        return codes

    def _measure(self, name: str, codes: np.ndarray, dtype: str, exact: np.ndarray) -> None:
        norm = float(np.linalg.norm(exact))
        error = float(np.linalg.norm(decode(codes, dtype, np.float64) - exact)) / norm if norm else 0.0
        with self._lock:
            self.rounding[name] = max(self.rounding.get(name, 0.0), error)


class _Matrix:
    """Rows of one stored matrix, as floats or as codes."""

    def __init__(self, ref: TensorRef, how: QuantizedTensor | None) -> None:
        self.ref, self.how = ref, how
        self.scale = None if how is None else how.format.read_scales(how)

    def floats(self, begin: int, end: int, float_type: type) -> np.ndarray:
        raw = read_raw(self.ref, begin, end)
        if self.how is None or self.scale is None:
            return decode(raw, self.ref.dtype, float_type)
        return self.how.format.decode(raw, self.scale, self.how, row=begin, float_type=float_type)

    def codes(self, begin: int, end: int, dtype: str) -> np.ndarray:
        """The stored bits; those of a quantized matrix are decoded and rounded to `dtype`."""
        if self.how is None:
            return read_raw(self.ref, begin, end)
        return encode(self.floats(begin, end, np.float32), dtype)


def _blocks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Row ranges of at most `_BLOCK` numbers, or of one row."""
    step = max(1, _BLOCK // width)
    return ((first, min(first + step, rows)) for first in range(0, rows, step))
