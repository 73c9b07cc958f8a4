"""Which absorbed tensors a checkpoint gives, and in which files: from headers alone.  What is not exact is refused.

Letters and formulas: `mla_tune.absorption.fold`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mla_tune.absorption.fold import LAYOUTS, absorbed_shapes, foldable_families, unsupported_reason
from mla_tune.arch.roles import Role
from mla_tune.arch.site import Architecture, Site
from mla_tune.checkpoint.absorbed import ABSORBED_FILE
from mla_tune.checkpoint.dtypes import FLOATS
from mla_tune.checkpoint.index import nearest, tensor_bytes
from mla_tune.checkpoint.writer import TensorLayout
from mla_tune.errors import InputError

#: Codes are dequantized and rounded once to this.
_DEQUANTIZED = "BF16"
#: Key → (dtype of the format, shape).
Headers = Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class AbsorbedPlan:
    """What will be written, from headers: `layout` in the order of the data, `shards` with the keys of each file, and
    for each attention path the keys of the tensors that it is made from, by role."""

    mode: str
    layout: TensorLayout
    shards: dict[str, tuple[str, ...]]
    sources: dict[str, dict[Role, str]]

    @property
    def bytes(self) -> int:
        """Bytes of all absorbed tensors."""
        return sum(tensor_bytes(*entry) for entry in self.layout.values())


def plan_absorbed(
    arch: Architecture,
    tensors: Headers,
    mode: str,
    *,
    quantized: Collection[str] = (),
    max_shard_bytes: int = 5_000_000_000,
    where: str = "the merged checkpoint",
) -> AbsorbedPlan:
    """Names, dtypes, shapes and files, from the (dtype, shape) of each tensor of the merged checkpoint.

    `mode` is `split` or `fold`.  Raises `InputError` where that would not be exact, for tensors that are missing or of
    another shape than config.json says, and for codes of weights that are not among `quantized` (keys).
    """
    if mode not in LAYOUTS:
        raise InputError(f"--absorb {mode}: allowed are {', '.join(LAYOUTS)} and none")
    if mode == "fold":
        _refuse_inexact_fold(arch, tensors, where)
    roles = (Role.W_UKV,) if mode == "split" else (Role.W_UQ, Role.W_Q, Role.W_UKV, Role.W_O)
    sources: dict[str, dict[Role, str]] = {path: {} for path in arch.attention_paths}
    for site in arch.sites:
        if site.role in roles:
            sources[site.path.rpartition(".")[0]][site.role] = _checked(site, tensors, quantized, where)
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path, keys in sources.items():
        bias = keys[Role.W_UKV].removesuffix("weight") + "bias"
        if bias in tensors:
            raise InputError(f"{where}: '{bias}' has no place in {LAYOUTS[mode]}: use --absorb none for this model")
        dtype = _dtype({tensors[key][0] for key in keys.values()})
        shapes = absorbed_shapes(arch.dims_at(path), mode)
        layout |= {f"{path}.{name}": (dtype, shape) for name, shape in shapes.items()}
    return AbsorbedPlan(mode, layout, _shards(layout, max_shard_bytes), sources)


def _checked(site: Site, tensors: Headers, quantized: Collection[str], where: str) -> str:
    """The key of a site's weight, which must be there and of the site's shape."""
    key = site.disk_keys()[0]
    if key not in tensors:
        raise InputError(f"{where}: has no tensor '{key}'{nearest(key, tensors)}")
    dtype, shape = tensors[key]
    if tuple(shape) != site.shape:
        raise InputError(
            f"{where}: '{key}' is {tuple(shape)}, but config.json describes {site.shape}: "
            "weights and configuration are of different models"
        )
    if dtype not in FLOATS and key not in quantized:
        raise InputError(
            f"{where}: '{key}' is {dtype}, and how it was quantized is not known; {', '.join(FLOATS)} can be absorbed"
        )
    return key


def _dtype(stored: set[str]) -> str:
    """The dtype of tensors made from these: theirs, or where they differ one that holds all of them."""
    kinds = {dtype if dtype in FLOATS else _DEQUANTIZED for dtype in stored}
    if len(kinds) == 1:
        return kinds.pop()
    return "F64" if "F64" in kinds else "F32"


def _shards(layout: TensorLayout, limit: int) -> dict[str, tuple[str, ...]]:
    """File name → keys, in order; a file is filled up to `limit` bytes, and holds at least one tensor."""
    groups: list[list[str]] = [[]]
    size = 0
    for key, entry in layout.items():
        nbytes = tensor_bytes(*entry)
        if groups[-1] and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(key)
        size += nbytes
    if len(groups) == 1:
        return {ABSORBED_FILE: tuple(groups[0])}
    n = len(groups)
    return {f"absorbed-{i:05d}-of-{n:05d}.safetensors": tuple(keys) for i, keys in enumerate(groups, 1)}


def _refuse_inexact_fold(arch: Architecture, tensors: Headers, where: str) -> None:
    if arch.family.fold is None:
        raise InputError(
            f"{where}: --absorb fold: whether it is exact for model_type '{arch.model_type}' is not known; known for "
            f"{', '.join(foldable_families())}. Use --absorb split"
        )
    paths = set(arch.attention_paths)
    for key in tensors:
        path = key
        while path and path not in paths:
            path = path.rpartition(".")[0]
        reason = unsupported_reason(key[len(path) + 1 :]) if path else None
        if reason:
            raise InputError(f"{where}: --absorb fold is not exact: '{key}': {reason}. Use --absorb split")
