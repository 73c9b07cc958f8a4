"""The proof of absorbed tensors: each must be the split, or the product, of the matrices in the merged checkpoint.

`mla_tune.absorption.fold` explains the letters and layouts.
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
from mla_tune.verification.dequantize import DequantizedCheckpoint
from mla_tune.verification.layout import Failure
from mla_tune.verification.read import TORCH_DTYPES, TensorReader, same_bytes, ulp_of

#: Numbers of W_O in memory at once.
_BLOCK = 1 << 21


def prove_absorbed(
    arch: Architecture, merged: Checkpoint, tensors: Mapping[str, TensorRef], *, workers: int = 2
) -> tuple[int, list[Failure], dict[str, str]]:
    """Prove the absorbed `tensors` (from `absorbed_tensors`) against the matrices of `merged` that they are made from.

    Returns (count of attention modules that are right, failures, sha256 of each file by name).  W_UK and W_UV must be
    the split of kv_b_proj bit for bit; of an FP8 kv_b_proj, the split of its dequantized numbers, rounded once.  W_QK
    and W_VO must be the products, computed here in float64, rounded once after a float32 sum.
    """
    if not tensors:
        return 0, [], {}
    dequantized = DequantizedCheckpoint(merged)
    files = list(dict.fromkeys(ref.file for ref in tensors.values()))
    with ThreadPoolExecutor(max(1, workers)) as pool:
        digests = pool.map(sha256_of, files)
        modules = [_AbsorbedModule(arch, dequantized, path, tensors) for path in arch.attention_paths]
        found = list(pool.map(_AbsorbedModule.failures, modules))
        hashes = {file.name: digest for file, digest in zip(files, digests, strict=True)}
    failures = [failure for module in found for failure in module]
    known = {f"{path}.{name}" for path in arch.attention_paths for name in ("W_UK", "W_UV", "W_QK", "W_VO")}
    failures += [Failure(key, "is in the absorbed file, but not in the model") for key in tensors.keys() - known]
    return sum(not module for module in found), failures, hashes


class _AbsorbedModule:
    """One attention module and its absorbed tensors."""

    def __init__(
        self, arch: Architecture, merged: DequantizedCheckpoint, path: str, tensors: Mapping[str, TensorRef]
    ) -> None:
        self.merged, self.path, self.dims = merged, path, arch.dims_at(path)
        #: Name (`W_UK`) → the absorbed tensor.
        self.stored = {key.rpartition(".")[2]: ref for key, ref in tensors.items() if key.rpartition(".")[0] == path}
        self.fold = "W_QK" in self.stored or "W_VO" in self.stored
        query = Role.W_Q if self.dims.L is None else Role.W_UQ
        roles = (Role.W_UKV, query, Role.W_O) if self.fold else (Role.W_UKV,)
        sites = {site.role: site for site in arch if site.path.rpartition(".")[0] == path and site.role in roles}
        keys = [sites[role].disk_keys()[0] for role in roles]
        #: The matrices that the absorbed tensors are made from: W_UKV, and for `fold` the query's and W_O.
        self.sources = [merged.find(key) or merged.checkpoint[key] for key in keys]

    def failures(self) -> list[Failure]:
        """Return what is wrong with names, shapes and dtypes, or if these are right, with the numbers."""
        shapes = absorbed_shapes(self.dims, "fold" if self.fold else "split")
        dtypes = {ref.dtype if not self.merged.is_quantized(ref) else "BF16" for ref in self.sources}
        # `fold` multiplies matrices; of different dtypes it writes the wider float.
        dtype = dtypes.pop() if len(dtypes) == 1 else "F64" if "F64" in dtypes else "F32"
        wrong = []
        for name, shape in shapes.items():
            if name not in self.stored:
                wrong.append((name, "is missing in the absorbed file"))
            elif (self.stored[name].dtype, self.stored[name].shape) != (dtype, shape):
                ref = self.stored[name]
                wrong.append((name, f"has dtype and shape {ref.dtype} {ref.shape}; {dtype} {shape} is right"))
        wrong = wrong or list(dict(self._wrong_products() if self.fold else self._wrong_halves(dtype)).items())
        return [Failure(f"{self.path}.{name}", what) for name, what in wrong]

    def _wrong_halves(self, dtype: str) -> Iterator[tuple[str, str]]:
        """Yield (name, what is wrong) for W_UK and W_UV that are not the split of kv_b_proj."""
        (kv_b,) = self.sources
        rows = kv_b.shape[0]
        if self.merged.is_quantized(kv_b):
            weight = self._rows(kv_b, 0, rows, torch.float32).to(TORCH_DTYPES[dtype])
        else:
            weight = TensorReader().rows(kv_b, 0, rows, "kv_b").view(TORCH_DTYPES[kv_b.dtype]).view(kv_b.shape)
        for name, half in zip(("W_UK", "W_UV"), split_kv_b(weight, self.dims), strict=True):
            ref = self.stored[name]
            stored = TensorReader().bytes(ref, 0, ref.nbytes, name)
            if not same_bytes(stored, half.view(torch.uint8).flatten()):
                yield name, "is not the split of kv_b_proj"

    def _wrong_products(self) -> Iterator[tuple[str, str]]:
        """Yield (name, what is wrong) for heads of W_QK and W_VO that are not the product of two matrices."""
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
        """Compare the rows of head h that start at `begin` with a @ b."""
        ref, exact = self.stored[name], a @ b
        row_bytes = ref.nbytes // ref.shape[0] // ref.shape[1]
        raw = TensorReader().bytes(ref, (h * ref.shape[1] + begin) * row_bytes, len(a) * row_bytes, name)
        stored = raw.view(TORCH_DTYPES[ref.dtype]).view(exact.shape).double()
        # Sums of k terms are off by at most k·u·Σ|a||b| ≤ k·u·‖a‖‖b‖; float32 products are summed in float64.
        u = 2.0**-52 if ref.dtype in ("F32", "F64") else 2.0**-24
        norms = torch.outer(torch.linalg.vector_norm(a, dim=1), torch.linalg.vector_norm(b, dim=0))
        slack = (a.shape[1] + 2) * u * norms
        if not bool(((stored - exact).abs() <= ulp_of(exact.abs() + slack, ref.dtype) / 2 + slack).all()):
            yield name, f"head {h} is not the product of the two matrices"

    def _rows(self, ref: TensorRef, begin: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """Read and dequantize rows [begin, end)."""
        return self.merged.numbers(ref, TensorReader().rows(ref, begin, end, "source"), begin, end, dtype)
