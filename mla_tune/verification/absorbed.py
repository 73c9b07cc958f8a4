"""The proof of absorbed tensors: split bit for bit from, or the product of, the matrices that lie in the checkpoint.

Letters and layouts: `mla_tune.absorption.fold`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from mla_tune.absorption.fold import absorbed_shapes
from mla_tune.absorption.split import split_kv_b
from mla_tune.arch.roles import Role
from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.atomic_files import sha256_of
from mla_tune.checkpoint.index import Checkpoint, TensorRef
from mla_tune.verification.dequantize import Values
from mla_tune.verification.layout import Failure
from mla_tune.verification.read import TORCH, TensorReader, same_bytes, ulp_of

#: Numbers of W_O that are held at once.
_BLOCK = 1 << 21


def prove_absorbed(
    arch: Architecture, merged: Checkpoint, tensors: Mapping[str, TensorRef], *, workers: int = 2
) -> tuple[int, list[Failure], dict[str, str]]:
    """(modules proven, failures, sha256 of each file).  `tensors` are those of `absorbed_tensors`.

    W_UK and W_UV must be the split of kv_b_proj as written, bit for bit (of its dequantized numbers, rounded once, for
    FP8); W_QK and W_VO the products, computed in float64, rounded once after float32 sums.
    """
    if not tensors:
        return 0, [], {}
    values = Values(merged)
    files = list(dict.fromkeys(ref.file for ref in tensors.values()))
    with ThreadPoolExecutor(max(1, workers)) as pool:
        digests = pool.map(sha256_of, files)
        found = list(pool.map(lambda path: _Module(arch, values, path, tensors).failures(), arch.attention_paths))
        hashes = {file.name: digest for file, digest in zip(files, digests, strict=True)}
    failures = [failure for module in found for failure in module]
    known = {f"{path}.{name}" for path in arch.attention_paths for name in ("W_UK", "W_UV", "W_QK", "W_VO")}
    failures += [Failure(key, "is in the absorbed file and no part of the model") for key in tensors.keys() - known]
    return sum(not module for module in found), failures, hashes


class _Module:
    """One attention module and its absorbed tensors."""

    def __init__(self, arch: Architecture, values: Values, path: str, tensors: Mapping[str, TensorRef]) -> None:
        self.values, self.path, self.dims = values, path, arch.dims_at(path)
        self.here = {key.rpartition(".")[2]: ref for key, ref in tensors.items() if key.rpartition(".")[0] == path}
        self.fold = "W_QK" in self.here or "W_VO" in self.here
        query = Role.W_Q if self.dims.L is None else Role.W_UQ
        roles = (Role.W_UKV, query, Role.W_O) if self.fold else (Role.W_UKV,)
        sites = {site.role: site for site in arch if site.path.rpartition(".")[0] == path and site.role in roles}
        keys = [sites[role].disk_keys()[0] for role in roles]
        self.sources = [values.ref(key) or values.checkpoint[key] for key in keys]

    def failures(self) -> list[Failure]:
        shapes = absorbed_shapes(self.dims, "fold" if self.fold else "split")
        dtypes = {ref.dtype if self.values.name(ref) not in self.values.quantized else "BF16" for ref in self.sources}
        dtype = dtypes.pop() if len(dtypes) == 1 else "F64" if "F64" in dtypes else "F32"
        wrong = []
        for name, shape in shapes.items():
            if name not in self.here:
                wrong.append((name, "is missing in the absorbed file"))
            elif (self.here[name].dtype, self.here[name].shape) != (dtype, shape):
                ref = self.here[name]
                wrong.append((name, f"is {ref.dtype} {ref.shape}, and {dtype} {shape} is right"))
        wrong = wrong or list(dict(self._products() if self.fold else self._halves(dtype)).items())
        return [Failure(f"{self.path}.{name}", what) for name, what in wrong]

    def _halves(self, dtype: str) -> Iterator[tuple[str, str]]:
        (kv_b,) = self.sources
        rows = kv_b.shape[0]
        if self.values.name(kv_b) in self.values.quantized:
            weight = self._rows(kv_b, 0, rows, torch.float32).to(TORCH[dtype])
        else:
            weight = TensorReader().rows(kv_b, 0, rows, "kv_b").view(TORCH[kv_b.dtype]).view(kv_b.shape)
        for name, half in zip(("W_UK", "W_UV"), split_kv_b(weight, self.dims), strict=True):
            ref = self.here[name]
            stored = TensorReader().bytes(ref, 0, ref.nbytes, name)
            if not same_bytes(stored, half.view(torch.uint8).flatten()):
                yield name, "is not the split of kv_b_proj"

    def _products(self) -> Iterator[tuple[str, str]]:
        kv_b, query, output = self.sources
        d = self.dims
        per_head = self._rows(kv_b, 0, d.H * (d.P + d.V), torch.float64).view(d.H, d.P + d.V, d.C)
        for h in range(d.H):
            first = h * (d.P + d.R)
            W_UQ = self._rows(query, first, first + d.P, torch.float64)
            yield from self._compare("W_QK", h, 0, W_UQ.T, per_head[h, : d.P])
        step = max(1, _BLOCK // (d.H * d.V))
        for begin in range(0, d.D, step):
            W_O = self._rows(output, begin, min(begin + step, d.D), torch.float64).view(-1, d.H, d.V)
            for h in range(d.H):
                yield from self._compare("W_VO", h, begin, W_O[:, h], per_head[h, d.P :])

    def _compare(self, name: str, h: int, begin: int, a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[str, str]]:
        """Rows from `begin` on of one head against a @ b."""
        ref, exact = self.here[name], a @ b
        row = ref.nbytes // ref.shape[0] // ref.shape[1]
        raw = TensorReader().bytes(ref, (h * ref.shape[1] + begin) * row, len(a) * row, name)
        stored = raw.view(TORCH[ref.dtype]).view(exact.shape).double()
        # Sums of k terms are off by at most k·u·Σ|a||b| ≤ k·u·‖a‖‖b‖; float32 products are summed in float64.
        u = 2.0**-52 if ref.dtype in ("F32", "F64") else 2.0**-24
        norms = torch.outer(torch.linalg.vector_norm(a, dim=1), torch.linalg.vector_norm(b, dim=0))
        slack = (a.shape[1] + 2) * u * norms
        if not bool(((stored - exact).abs() <= ulp_of(exact.abs() + slack, ref.dtype) / 2 + slack).all()):
            yield name, f"head {h} is not the product of the two matrices"

    def _rows(self, ref: TensorRef, begin: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        return self.values.of(ref, TensorReader().rows(ref, begin, end, "source"), begin, end, dtype)
