"""The proof of absorbed tensors: split bit for bit from, or the product of, the matrices that lie in the checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch

from mla_tune.arch.roles import Role
from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.files import read_json_object
from mla_tune.checkpoint.index import Checkpoint, TensorRef, read_shard
from mla_tune.checkpoint.shards import same_bits
from mla_tune.errors import FileError
from mla_tune.merge.absorb import ABSORBED_FILE, ABSORBED_INDEX
from mla_tune.merge.proof import Failure
from mla_tune.merge.proof_values import PRECISION, TORCH, Values, matrix_shape, whole
from mla_tune.mla.heads import split_kv_b


def absorbed_tensors(folder: Checkpoint) -> dict[str, TensorRef]:
    """The tensors of the absorbed file or files beside a checkpoint; empty where there are none."""
    index, single = folder.folder / ABSORBED_INDEX, folder.folder / ABSORBED_FILE
    if index.is_file():
        names = dict.fromkeys(read_json_object(index, "the index of the absorbed tensors")["weight_map"].values())
    else:
        names = dict.fromkeys([ABSORBED_FILE] if single.is_file() else [])
    return {key: ref for name in names for key, ref in read_shard(folder.folder / name).tensors.items()}


def prove_absorbed(
    arch: Architecture, merged: Checkpoint, tensors: Mapping[str, TensorRef]
) -> tuple[int, list[Failure], dict[str, str]]:
    """(modules proven, failures, sha256 of each file).  `tensors` are those of `absorbed_tensors`.

    W_UK and W_UV must be the split of kv_b_proj as written, bit for bit (of its dequantised numbers, rounded once, for
    FP8); W_QK and W_VO the products, computed in float64, within an ulp.
    """
    if not tensors:
        return 0, [], {}
    values, failures, proven = Values(merged), [], 0
    for path in arch.attention_paths:
        here = {key.rpartition(".")[2]: ref for key, ref in tensors.items() if key.rpartition(".")[0] == path}
        wrong = [Failure(f"{path}.{name}", what) for name, what in _module(arch, values, path, here)]
        failures += wrong
        proven += not wrong
    known = {f"{path}.{name}" for path in arch.attention_paths for name in ("W_UK", "W_UV", "W_QK", "W_VO")}
    failures += [
        Failure(key, "is in the absorbed file and no part of the model") for key in tensors if key not in known
    ]
    return proven, failures, {f.name: _sha256(f) for f in dict.fromkeys(ref.file for ref in tensors.values())}


def _module(arch: Architecture, values: Values, path: str, here: Mapping[str, TensorRef]) -> list[tuple[str, str]]:
    fold = "W_QK" in here or "W_VO" in here
    names = ("W_QK", "W_VO") if fold else ("W_UK", "W_UV")
    missing = [(name, "is missing in the absorbed file") for name in names if name not in here]
    if missing:
        return missing
    kinds = torch.float64 if fold else None
    kv_b = _matrix(arch, values, path, Role.W_UKV, kinds)
    W_UK, W_UV = split_kv_b(kv_b, arch.dims)  # (H, C, P), (H, V, C)
    if not fold:
        found = (_stored(here["W_UK"]), _stored(here["W_UV"]))
        pairs = zip(names, found, (W_UK, W_UV), strict=True)
        return [(n, "is not the split of kv_b_proj") for n, a, b in pairs if not same_bits(a, b.to(a.dtype))]
    d = arch.dims
    query = _matrix(arch, values, path, Role.W_Q if d.L is None else Role.W_UQ, kinds).view(d.H, d.P + d.R, -1)
    output = _matrix(arch, values, path, Role.W_O, kinds).view(d.D, d.H, d.V)
    wrong = []
    for h in range(d.H):
        products = {"W_QK": query[h, : d.P].T @ W_UK[h].T, "W_VO": output[:, h] @ W_UV[h]}
        factors = {"W_QK": query[h, : d.P].T.abs() @ W_UK[h].T.abs(), "W_VO": output[:, h].abs() @ W_UV[h].abs()}
        for name, product in products.items():
            ref = here[name]
            if ref.shape[1:] != tuple(product.shape):
                return [(name, f"is {ref.shape}, and {(d.H, *product.shape)} is right")]
            got = _stored(ref, h).double()
            bits, smallest = PRECISION[ref.dtype]
            ulp = torch.exp2((torch.frexp(product)[1] - 1).clamp_min(smallest).double() - bits + 1)
            slack = max(d.P, d.V) * (2.0**-24 if bits <= 11 else 2.0**-52) * factors[name]
            if not bool(((got - product).abs() <= ulp * 0.51 + slack).all()) and name not in dict(wrong):
                wrong.append((name, f"head {h} is not the product of the two matrices"))
    return wrong


def _matrix(arch: Architecture, values: Values, path: str, role: Role, dtype: torch.dtype | None) -> torch.Tensor:
    """A matrix of an attention module, as stored where `dtype` is None; FP8 as float32 numbers then."""
    site = next(s for s in arch.by_role(role) if s.path.rpartition(".")[0] == path)
    ref = values.checkpoint[site.disk_keys()[0]]
    if ref.key in values.quantised:
        raw = whole_bytes(ref)
        return values.of(ref, raw, 0, matrix_shape(ref.shape)[0], dtype or torch.float32)
    return whole(ref, dtype or TORCH[ref.dtype])


def whole_bytes(ref: TensorRef) -> torch.Tensor:
    with ref.file.open("rb") as stream:
        stream.seek(ref.begin)
        data = bytearray(stream.read(ref.nbytes))
    if len(data) != ref.nbytes:
        raise FileError(f"{ref.file}: ends within '{ref.key}': the file changed while it was read")
    return torch.frombuffer(data, dtype=torch.uint8)


def _stored(ref: TensorRef, head: int | None = None) -> torch.Tensor:
    """A tensor of the absorbed file, or one head of it, in its own dtype."""
    if head is None:
        return whole(ref, TORCH[ref.dtype])
    size = ref.nbytes // ref.shape[0]
    part = TensorRef(
        ref.key, ref.file, ref.dtype, ref.shape[1:], ref.begin + head * size, ref.begin + (head + 1) * size
    )
    return whole(part, TORCH[ref.dtype])


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
