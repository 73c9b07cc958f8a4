"""`Architecture`: an MLA model as its config.json describes it, with one `Site` for each weight matrix."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from mla_tune.arch.dims import DTYPE_BYTES, MLADims
from mla_tune.arch.family import Family
from mla_tune.arch.key_mapping import KeyMapping
from mla_tune.arch.multimodal import Wrapper
from mla_tune.arch.roles import ADAPTABLE, Role

#: How a checkpoint stores a site: one key; one key for each matrix of each expert; one key for the 3-D stack.
DiskLayout = Literal["module", "per_expert", "fused"]

#: Name of the output head's weight in transformers' module tree.
HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Site:
    """One weight matrix of the model, or one fused stack of expert matrices."""

    path: str
    """Path in transformers' module tree: of the module for a linear layer (`model.layers.0.self_attn.o_proj`), of the
    parameter for fused experts (`model.layers.1.mlp.experts.down_proj`) and if `is_parameter`."""
    role: Role
    """What the matrix is for."""
    layer: int | None
    """Index of the decoder layer; None outside of the layers.  MTP layers come after the others."""
    shape: tuple[int, int]
    """(out, in) of one matrix."""
    count: int = 1
    """Number of experts in a stack; 1 for a single matrix."""
    bias: bool = False
    """Whether a bias (out) belongs to it."""
    attachable: bool = True
    """Whether mla-tune can put an adapter on it."""
    reason: str = ""
    """Why it is not adapted; empty if it can be."""
    disk: DiskLayout = "module"
    """How the checkpoint stores it."""
    disk_path: str = ""
    """Its path in the checkpoint, for `per_expert` that of the module with the experts; empty if it is `path`."""
    leaves: tuple[str, ...] = ()
    """For `per_expert`: the names of the matrices of one expert that make up this one, in the order of their rows."""
    aliases: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(disk_path, leaves) of further copies of the same weight in the checkpoint."""
    is_parameter: bool = False
    """Whether `path` names a parameter of its own, and not a module with a `weight`."""
    mtp: bool = False
    """Whether it belongs to an MTP (multi-token prediction) layer, which transformers does not load."""

    @property
    def params(self) -> int:
        """Number of parameters of the matrix and its bias, over all experts of a stack."""
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
        """Return the number of parameters of a LoRA of this rank: A (r, in) and B (out, r), for each expert."""
        return self.count * rank * (self.shape[0] + self.shape[1])

    @property
    def disk_parts(self) -> int:
        """Number of tensors on disk that hold the rows of one matrix: 2 if gate and up of an expert are separate."""
        return len(self.leaves) if self.disk == "per_expert" else 1

    def disk_keys(self) -> list[str]:
        """Return the checkpoint keys of this weight; for `per_expert` those of expert 0, then those of expert 1, …"""
        return self._keys(self.disk_path or self.path, self.leaves)

    def alias_keys(self) -> list[list[str]]:
        """Return the keys of each further copy of the weight in the checkpoint, in the order of `disk_keys`."""
        return [self._keys(path, leaves) for path, leaves in self.aliases]

    def disk_key(self, leaf: str) -> str:
        """Return the checkpoint key of another tensor of the same module: `bias`."""
        return f"{self.disk_path or self.path}.{leaf}"

    def _keys(self, path: str, leaves: tuple[str, ...]) -> list[str]:
        if self.disk == "module":
            return [path if self.is_parameter else f"{path}.weight"]
        if self.disk == "fused":
            return [path]
        return [f"{path}.{e}.{leaf}.weight" for e in range(self.count) for leaf in leaves]


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention module with MLA."""

    path: str
    """Path in transformers' module tree."""
    layer: int
    """Index of its decoder layer."""
    dims: MLADims
    """Its dimensions."""
    owns_cache: bool = True
    """Whether it computes and caches a latent; False if it reads that of another layer (Mistral Large 4)."""
    has_window: bool = False
    """Whether it attends to a window of the last tokens only, so that its cache stops growing."""
    has_indexer: bool = False
    """Whether it has an indexer of its own (sparse attention)."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """An MLA model as its config.json describes it, as far as that can be told without weights."""

    model_type: str
    """`model_type` of config.json."""
    family: Family
    """The entry of the family table."""
    num_layers: int
    """Number of decoder layers, without MTP layers."""
    dims: MLADims
    """Dimensions of MLA; where modules differ, those of the first one without a window and with rope."""
    attention: tuple[Attention, ...]
    """All attention modules with MLA, in the order of the layers."""
    sites: tuple[Site, ...]
    """All weight matrices, adaptable or not, but for those of MTP layers."""
    params_total: int
    """Number of parameters, without MTP layers and without a tower whose layout is not known (`tower_counted`)."""
    vocab_size: int
    """Rows of the embedding."""
    max_position_embeddings: int
    """Length of the context window in tokens; 0 if config.json does not say."""
    tied: bool
    """Whether the output head is the embedding."""
    mtp_layers: int
    """Number of MTP layers in published checkpoints."""
    quantization: str | None
    """`quant_method` of the checkpoint; None for plain weights."""
    active_params: int
    """Parameters that one token passes through: all but those of the experts that it does not go to."""
    experts_per_token: int
    """Routed experts that a token goes to; 0 without experts."""
    prefix: str = "model"
    """Path of the decoder in transformers' module tree."""
    wrapper: Wrapper | None = None
    """The multimodal model around the text model; None for a plain text model."""
    key_mapping: KeyMapping = field(default_factory=KeyMapping)
    """How checkpoints name the weights."""
    mtp_sites: tuple[Site, ...] = ()
    """Matrices of MTP layers, which transformers does not load and no total counts; empty if their layout is not
    known."""
    warnings: tuple[str, ...] = ()
    """What a user should know about how config.json was read."""
    embedding_key: str = ""
    """Checkpoint key of the embedding."""
    head_key: str = ""
    """Checkpoint key of the output head; a checkpoint may lack it if the head is tied."""
    letters: dict[str, int] = field(default_factory=dict, compare=False, hash=False)
    """Sizes by letter that only some families have (`arch.config.letters_of_family`), and D."""

    @property
    def attention_paths(self) -> tuple[str, ...]:
        """Module paths of all MLA modules, in the order of the layers."""
        return tuple(a.path for a in self.attention)

    @property
    def title(self) -> str:
        """The family's name, with that of the wrapper in front of it: "Kimi K2.5 with DeepSeek-V3"."""
        if self.wrapper and self.wrapper.title != self.family.title:
            return f"{self.wrapper.title} with {self.family.title}"
        return self.family.title

    @property
    def embedding(self) -> str:
        """Name of the embedding's weight in transformers' `named_parameters()`."""
        return f"{self.prefix}.embed_tokens.weight"

    @property
    def tower_counted(self) -> bool:
        """Whether totals are those of the whole model: it has no tower, or the tower's layout is known."""
        return self.wrapper is None or self.wrapper.tower is not None

    def dims_at(self, path: str) -> MLADims:
        """Return the dimensions of the MLA module at this path."""
        return next(a.dims for a in self.attention if a.path == path)

    @property
    def stored_sites(self) -> tuple[Site, ...]:
        """All weight matrices of a checkpoint, those of MTP layers included."""
        return (*self.sites, *self.mtp_sites)

    def by_role(self, role: Role) -> list[Site]:
        """Return the matrices of one role, in the order of the layers."""
        return [s for s in self.sites if s.role == role]

    @property
    def roles(self) -> tuple[Role, ...]:
        """The adaptable roles that this model has, in the order of `ADAPTABLE`."""
        present = {s.role for s in self.sites if s.attachable}
        return tuple(r for r in ADAPTABLE if r in present)

    def kv_bytes(self, dtype: str) -> tuple[int, int]:
        """Return the bytes per token of a (latent, expanded) KV cache, over all modules that have a cache."""
        own = [a.dims for a in self.attention if a.owns_cache]
        return sum(d.latent_bytes(dtype) for d in own), sum(d.expanded_bytes(dtype) for d in own)

    def indexer_bytes(self, dtype: str) -> int:
        """Return the bytes per token that all indexers cache, Y numbers each; they come on top of the KV cache."""
        return sum(a.has_indexer for a in self.attention) * self.letters.get("Y", 0) * DTYPE_BYTES[dtype]

    def located(self, keys: Container[str]) -> Architecture:
        """Return this architecture with the places where a checkpoint with `keys` holds each site and both ends."""
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
    """Return `site` at the place where a checkpoint with `keys` holds it, or unchanged if it does not hold it.

    If the checkpoint holds the weight under several of its names, the others become `aliases`.
    """
    found: list[Site] = []
    for path in key_mapping.candidates(site.path):
        for disk, leaves in _layouts(site, key_mapping):
            candidate = replace(
                site, disk=disk, disk_path=path.rpartition(".")[0] if disk == "per_expert" else path, leaves=leaves
            )
            if candidate.disk_keys()[0] in keys:
                found.append(candidate)
    if not found:
        return site
    first = found[0]
    aliases = tuple((s.disk_path, s.leaves) for s in found[1:] if s.disk == first.disk)
    return replace(first, aliases=aliases)


def _layouts(site: Site, key_mapping: KeyMapping) -> list[tuple[DiskLayout, tuple[str, ...]]]:
    """Return each (disk, leaves) in which a checkpoint may store `site`, the family's own first."""
    if not site.is_experts:
        return [("module", ())]
    gate_up = site.role == Role.EXPERTS_GATE_UP
    layouts: list[tuple[DiskLayout, tuple[str, ...]]] = []
    for gate, up, down in dict.fromkeys((key_mapping.experts, KeyMapping().experts)):
        layouts.append(("per_expert", (gate, up) if gate_up else (down,)))
    return [*layouts, ("fused", ())]
