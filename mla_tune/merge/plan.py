"""What a merge will do, from headers alone: which site changes which tensors of which shard, and what is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from mla_tune.adapter.files import Adapter, AdapterDelta
from mla_tune.arch.roles import Role
from mla_tune.arch.site import Architecture, Site
from mla_tune.checkpoint.index import Checkpoint, Shard, TensorRef, tensor_bytes
from mla_tune.checkpoint.shards import FLOATS, Layout
from mla_tune.errors import InputError

#: `--dtype` → the format's name.
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
#: Endings of tensors that stay as they are under another `--dtype`: transformers keeps them in float32
#: (`_keep_in_fp32_modules_strict`), because their small steps decide which experts a token goes to.
KEEP_DTYPE = ("e_score_correction_bias",)
#: Families whose router is a Linear that is never called, only read: an adapter on it acts once merged, not before.
_ROUTER_READ_DIRECTLY = frozenset({"longcat_flash"})


@dataclass(frozen=True, slots=True)
class Change:
    """One tensor on disk that the adapter changes.

    `rows` are the rows of the site's (out, in) matrix that the tensor holds (gate and up of an expert lie apart on
    disk), `expert` which expert it is; None with a site of experts means that the tensor holds them all (E, out, in).
    """

    ref: TensorRef
    delta: AdapterDelta
    rows: tuple[int, int]
    expert: int | None

    @property
    def site(self) -> Site:
        return self.delta.site

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the tensor must have."""
        matrix = (self.rows[1] - self.rows[0], self.site.shape[1])
        return (self.site.count, *matrix) if self.site.is_experts and self.expert is None else matrix

    @property
    def matrices(self) -> int:
        return prod(self.shape[:-2])


@dataclass(frozen=True, slots=True)
class MergePlan:
    """`changes` by key; `kv_b` is (attention path, key of its kv_b_proj) for each module to absorb; `dtype` is `keep`
    or a key of `DTYPES`."""

    checkpoint: Checkpoint
    architecture: Architecture
    adapter: Adapter
    dtype: str
    changes: dict[str, Change]
    kv_b: tuple[tuple[str, str], ...]

    def out_dtype(self, ref: TensorRef) -> str:
        """The dtype in which a tensor of the base is written."""
        if self.dtype == "keep" or ref.dtype not in FLOATS or ref.key.endswith(KEEP_DTYPE):
            return ref.dtype
        return DTYPES[self.dtype]

    def layout(self, shard: Shard) -> Layout:
        """The tensors of the merged shard: those of the base's, in its order."""
        return {key: (self.out_dtype(ref), ref.shape) for key, ref in shard.tensors.items()}

    def is_copied(self, shard: Shard) -> bool:
        """Nothing in this shard changes: the file is copied as it is."""
        return not any(key in self.changes or self.out_dtype(ref) != ref.dtype for key, ref in shard.tensors.items())

    def absorbed_layout(self) -> Layout:
        """The tensors of the absorbed file: W_UK (H, C, P) and W_UV (H, V, C) of each attention path."""
        d = self.architecture.dims
        layout = {}
        for path, key in self.kv_b:
            dtype = self.out_dtype(self.checkpoint[key])
            layout[f"{path}.W_UK"] = (dtype, (d.H, d.C, d.P))
            layout[f"{path}.W_UV"] = (dtype, (d.H, d.V, d.C))
        return layout

    @property
    def model_bytes(self) -> int:
        """Bytes of all tensors of the merged checkpoint."""
        layouts = (self.layout(shard) for shard in self.checkpoint.shards)
        return sum(tensor_bytes(*entry) for layout in layouts for entry in layout.values())

    @property
    def absorbed_bytes(self) -> int:
        return sum(tensor_bytes(*entry) for entry in self.absorbed_layout().values())


def plan_merge(
    checkpoint: Checkpoint, arch: Architecture, adapter: Adapter, *, absorb: bool = True, dtype: str = "keep"
) -> MergePlan:
    """Find the tensors that `adapter` changes in `checkpoint`, and check the shape and dtype of each.

    Raises `InputError` for a quantised base, for tensors that are missing or of another shape, for an adapter whose
    merge would not be the model that was trained, and for an unknown `dtype`.
    """
    if dtype != "keep" and dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: allowed are keep, {', '.join(DTYPES)}")
    refuse_quantised(checkpoint)
    changes: dict[str, Change] = {}
    for delta in adapter.deltas:
        _refuse_unmergeable(adapter, arch, delta.site)
        for change in _changes(checkpoint, delta):
            _check(change.ref, change.shape, checkpoint)
            changes[change.ref.key] = change
    kv_b = []
    for path in arch.attention_paths if absorb else ():
        site = next(s for s in arch.by_role(Role.W_UKV) if s.path.startswith(f"{path}."))
        ref = checkpoint[site.disk_keys()[0]]
        _check(ref, site.shape, checkpoint)
        kv_b.append((path, ref.key))
    return MergePlan(checkpoint, arch, adapter, dtype, changes, tuple(kv_b))


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Raise `InputError` for a base whose weights are codes: a delta added to them is lost or garbage."""
    config = checkpoint.config
    found = config.get("quantization_config") or config.get("compression_config")
    codes = next((r for r in checkpoint.tensors.values() if r.dtype[:2] in ("F8", "F6", "F4")), None)
    if not found and codes is None:
        return
    if isinstance(found, dict):
        block = f", blocks of {found['weight_block_size']}" if found.get("weight_block_size") else ""
        what = f"config.json says that its weights are quantised ({found.get('quant_method', 'unknown method')}{block})"
    else:
        what = f"'{codes.key}' is {codes.dtype}" if codes else "config.json says that its weights are quantised"
    raise InputError(
        f"{checkpoint.folder}: {what}: merging into quantised weights is not supported yet. "
        "Give the bfloat16 or float32 checkpoint of the same model with --base"
    )


def _refuse_unmergeable(adapter: Adapter, arch: Architecture, site: Site) -> None:
    tied_head = site.role == Role.LM_HEAD and arch.tied
    if tied_head or (site.role == Role.ROUTER and arch.family.model_type in _ROUTER_READ_DIRECTLY):
        raise InputError(
            f"{adapter.folder}: adapts {site.path} ({site.reason}): merged, it would not be the model that was trained"
        )


def _changes(checkpoint: Checkpoint, delta: AdapterDelta) -> Iterator[Change]:
    """The tensors of one site in the order of `Site.disk_keys`."""
    site = delta.site
    out = site.shape[0]
    keys = site.disk_keys()
    if site.disk != "per_expert":
        yield Change(checkpoint[keys[0]], delta, (0, out), None)
        return
    parts = len(keys) // site.count  # gate and up, or down alone
    for i, key in enumerate(keys):
        expert, part = divmod(i, parts)
        yield Change(checkpoint[key], delta, (part * out // parts, (part + 1) * out // parts), expert)


def _check(ref: TensorRef, shape: tuple[int, ...], checkpoint: Checkpoint) -> None:
    if ref.shape != shape:
        raise InputError(
            f"{ref.file}: '{ref.key}' is {ref.shape}, but {checkpoint.folder / 'config.json'} describes {shape}: "
            "weights and configuration are of different models"
        )
    if ref.dtype not in FLOATS:
        raise InputError(f"{ref.file}: '{ref.key}' is {ref.dtype}; only {', '.join(FLOATS)} can be merged into")
