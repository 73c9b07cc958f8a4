"""What an architecture is made of: one `Site` for each weight matrix."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from mla_tune.arch.dims import DTYPE_BYTES, MLADims
from mla_tune.arch.family import Family
from mla_tune.arch.key_mapping import KeyMapping
from mla_tune.arch.multimodal import Wrapper
from mla_tune.arch.roles import ADAPTABLE, Role

#: How a matrix lies on disk: one key; one key an expert (gate and up apart); one fused 3-D key.
DiskLayout = Literal["module", "per_expert", "fused"]


#: The output head's weight in transformers' module tree.
HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Site:
    """One weight matrix of the model, or one fused stack of expert matrices.

    `path` is the path in transformers' module tree: of the module for a linear layer
    (`model.layers.0.self_attn.o_proj`), of the parameter for fused experts (`model.layers.1.mlp.experts.down_proj`) and
    where `is_parameter`.  `shape` is (out, in) of one matrix, `count` the number of experts (1 elsewhere), `reason` why
    it can't be adapted.  `layer` is None outside of the decoder layers; `mtp` marks one of an MTP layer.

    `disk`, `disk_path` and `leaves` say where it lies in a checkpoint: its path there, and the names of the matrices of
    one expert.  `aliases` are other paths under which a file may hold it once more.
    """

    path: str
    role: Role
    layer: int | None
    shape: tuple[int, int]
    count: int = 1
    bias: bool = False
    attachable: bool = True
    reason: str = ""
    disk: DiskLayout = "module"
    disk_path: str = ""
    leaves: tuple[str, ...] = ()
    aliases: tuple[tuple[str, tuple[str, ...]], ...] = ()
    is_parameter: bool = False
    mtp: bool = False

    @property
    def params(self) -> int:
        """Number of parameters: out × in, times the experts of a stack."""
        return self.count * (self.shape[0] * self.shape[1] + (self.shape[0] if self.bias else 0))

    @property
    def is_experts(self) -> bool:
        """Whether this is a fused stack of routed experts."""
        return self.role in (Role.EXPERTS_GATE_UP, Role.EXPERTS_DOWN)

    @property
    def parameter(self) -> str:
        """Name of the weight in transformers' `named_parameters()`."""
        return self.path if self.is_experts or self.is_parameter else f"{self.path}.weight"

    def lora_params(self, rank: int) -> int:
        """Trainable numbers of a LoRA of this rank: A (r, in) and B (out, r), for each expert."""
        return self.count * rank * (self.shape[0] + self.shape[1])

    @property
    def disk_parts(self) -> int:
        """Tensors on disk that one (out, in) matrix is cut into by rows: gate and up of an expert lie apart."""
        return len(self.leaves) if self.disk == "per_expert" else 1

    def disk_keys(self) -> list[str]:
        """The checkpoint keys that hold this site's weight; for per-expert files gate and up of each expert in turn."""
        return self._keys(self.disk_path or self.path, self.leaves)

    def alias_keys(self) -> list[list[str]]:
        """The keys of each further copy of the weight in the same checkpoint, in the order of `disk_keys`."""
        return [self._keys(path, leaves) for path, leaves in self.aliases]

    def disk_key(self, leaf: str) -> str:
        """The key of another tensor of this module: its `bias`."""
        return f"{self.disk_path or self.path}.{leaf}"

    def _keys(self, path: str, leaves: tuple[str, ...]) -> list[str]:
        if self.disk == "module":
            return [path if self.is_parameter else f"{path}.weight"]
        if self.disk == "fused":
            return [path]
        return [f"{path}.{e}.{leaf}.weight" for e in range(self.count) for leaf in leaves]


@dataclass(frozen=True, slots=True)
class Attention:
    """One MLA module.

    `owns_cache`: it computes a latent and keeps it (Mistral Large 4 has layers that read another's).  `window`: it
    attends to the last tokens only, so that its cache stops growing.  `indexer`: it has one of its own.
    """

    path: str
    layer: int
    dims: MLADims
    owns_cache: bool = True
    window: bool = False
    indexer: bool = False


@dataclass(frozen=True, slots=True)
class Architecture:
    """An MLA model as its config.json describes it: no weights, no torch.

    `sites` are all matrices, adaptable or not, `mtp_sites` those of MTP layers, which transformers doesn't load and no
    total counts.  `dims` are those of the first module without a window and with rope, where modules differ.  `prefix`
    is the path of the decoder.  `embedding` and `head` are parameters of the model.  `tower_counted` is False for a
    wrapper whose vision or audio tower is not known: then totals are those of the text model.
    """

    model_type: str
    family: Family
    num_layers: int
    dims: MLADims
    attention: tuple[Attention, ...]
    sites: tuple[Site, ...]
    params_total: int
    vocab_size: int
    max_position_embeddings: int
    tied: bool
    mtp_layers: int
    quantization: str | None
    active_params: int
    experts_per_token: int
    prefix: str = "model"
    wrapper: Wrapper | None = None
    key_mapping: KeyMapping = field(default_factory=KeyMapping)
    mtp_sites: tuple[Site, ...] = ()
    warnings: tuple[str, ...] = ()
    #: The keys of both ends of the model in a checkpoint.
    embedding_key: str = ""
    head_key: str = ""
    #: Sizes that only some families have: index heads X of Y numbers, KDA heads K of Z numbers with F taps.
    letters: dict[str, int] = field(default_factory=dict, compare=False, hash=False)

    @property
    def attention_paths(self) -> tuple[str, ...]:
        """Module paths of all MLA modules, in the order of the layers."""
        return tuple(a.path for a in self.attention)

    @property
    def title(self) -> str:
        """Name of the model's family as people write it."""
        if self.wrapper and self.wrapper.title != self.family.title:
            return f"{self.wrapper.title} with {self.family.title}"
        return self.family.title

    @property
    def embedding(self) -> str:
        """Name of the embedding's parameter in the model."""
        return f"{self.prefix}.embed_tokens.weight"

    @property
    def tower_counted(self) -> bool:
        """Whether totals include the vision or audio tower: there is none, or its layout is known."""
        return self.wrapper is None or self.wrapper.tower is not None

    def dims_at(self, path: str) -> MLADims:
        """Dimensions of the MLA module at this path."""
        return next(a.dims for a in self.attention if a.path == path)

    @property
    def stored_sites(self) -> tuple[Site, ...]:
        """All matrices of a checkpoint: those of MTP layers too."""
        return (*self.sites, *self.mtp_sites)

    def by_role(self, role: Role) -> list[Site]:
        """The matrices of one role, in the order of the layers."""
        return [s for s in self.sites if s.role == role]

    @property
    def roles(self) -> tuple[Role, ...]:
        """The adaptable roles that this model has, in the order of `ADAPTABLE`."""
        present = {s.role for s in self.sites if s.attachable}
        return tuple(r for r in ADAPTABLE if r in present)

    def kv_bytes(self, dtype: str) -> tuple[int, int]:
        """(latent, expanded) KV-cache bytes a token over all attention modules that keep one."""
        own = [a.dims for a in self.attention if a.owns_cache]
        return sum(d.latent_bytes(dtype) for d in own), sum(d.expanded_bytes(dtype) for d in own)

    def indexer_bytes(self, dtype: str) -> int:
        """Bytes a token that the indexers of sparse attention keep beside the KV cache: Y numbers each."""
        return sum(a.indexer for a in self.attention) * self.letters.get("Y", 0) * DTYPE_BYTES[dtype]

    def located(self, keys: Container[str]) -> Architecture:
        """The same architecture with the sites where a checkpoint with these keys holds them."""
        return replace(
            self,
            embedding_key=self.key_mapping.on_disk(self.embedding, keys),
            head_key=self.key_mapping.on_disk(HEAD, keys),
            sites=tuple(locate_site(site, self.key_mapping, keys) for site in self.sites),
            mtp_sites=tuple(locate_site(site, self.key_mapping, keys) for site in self.mtp_sites),
        )

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)


def locate_site(site: Site, key_mapping: KeyMapping, keys: Container[str]) -> Site:
    """`site` with the place in the checkpoint that these keys show; as it is where they show none.

    A file that holds the weight more than once (under two of its names) gets the others as `aliases`.
    """
    found: list[Site] = []
    for path in key_mapping.candidates(site.path):
        for disk, leaves in _layouts(site, key_mapping):
            here = replace(
                site, disk=disk, disk_path=path.rpartition(".")[0] if disk == "per_expert" else path, leaves=leaves
            )
            if here.disk_keys()[0] in keys:
                found.append(here)
    if not found:
        return site
    first = found[0]
    aliases = tuple((s.disk_path, s.leaves) for s in found[1:] if s.disk == first.disk)
    return replace(first, aliases=aliases)


def _layouts(site: Site, key_mapping: KeyMapping) -> list[tuple[DiskLayout, tuple[str, ...]]]:
    if not site.is_experts:
        return [("module", ())]
    gate_up = site.role == Role.EXPERTS_GATE_UP
    ways: list[tuple[DiskLayout, tuple[str, ...]]] = []
    for gate, up, down in dict.fromkeys((key_mapping.experts, KeyMapping().experts)):
        ways.append(("per_expert", (gate, up) if gate_up else (down,)))
    return [*ways, ("fused", ())]
