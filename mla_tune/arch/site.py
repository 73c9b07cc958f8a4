"""What an architecture is made of: one `Site` for each weight matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mla_tune.arch.dims import MLADims
from mla_tune.arch.families import Family
from mla_tune.arch.roles import ADAPTABLE, Role

#: How a matrix lies on disk: one key; one key an expert (gate and up apart); one fused 3-D key.
DiskLayout = Literal["module", "per_expert", "fused"]


@dataclass(frozen=True, slots=True)
class Site:
    """One weight matrix of the model, or one fused stack of expert matrices.

    `path` is the path in transformers' module tree: of the module for a linear layer
    (`model.layers.0.self_attn.o_proj`), of the parameter for fused experts (`model.layers.1.mlp.experts.down_proj`).
    `shape` is (out, in) of one matrix, `count` the number of experts (1 elsewhere), `reason` why it can't be adapted.
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

    @property
    def params(self) -> int:
        return self.count * (self.shape[0] * self.shape[1] + (self.shape[0] if self.bias else 0))

    @property
    def is_experts(self) -> bool:
        return self.role in (Role.EXPERTS_GATE_UP, Role.EXPERTS_DOWN)

    @property
    def parameter(self) -> str:
        """Name of the weight in transformers' `named_parameters()`."""
        return self.path if self.is_experts else f"{self.path}.weight"

    def lora_params(self, rank: int) -> int:
        """Trainable numbers of a LoRA of this rank: A (r, in) and B (out, r), for each expert."""
        return self.count * rank * (self.shape[0] + self.shape[1])

    @property
    def disk_parts(self) -> int:
        """Tensors on disk that one (out, in) matrix is cut into by rows: gate and up of an expert lie apart."""
        return 2 if self.disk == "per_expert" and self.path.endswith(".gate_up_proj") else 1

    def disk_keys(self) -> list[str]:
        """The checkpoint keys that hold this site's weight; for per-expert files gate and up of each expert in turn."""
        if self.disk == "module":
            return [f"{self.path}.weight"]
        if self.disk == "fused":
            return [self.path]
        experts, leaf = self.path.rsplit(".", 1)
        leaves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        return [f"{experts}.{e}.{name}.weight" for e in range(self.count) for name in leaves]


@dataclass(frozen=True, slots=True)
class Architecture:
    """An MLA model as its config.json describes it: no weights, no torch."""

    model_type: str
    family: Family
    num_layers: int
    dims: MLADims
    attention_paths: tuple[str, ...]
    sites: tuple[Site, ...]
    params_total: int
    vocab_size: int
    max_position_embeddings: int
    tied: bool
    mtp_layers: int
    quantization: str | None
    active_params: int
    experts_per_token: int

    def by_role(self, role: Role) -> list[Site]:
        return [s for s in self.sites if s.role == role]

    @property
    def roles(self) -> tuple[Role, ...]:
        """The adaptable roles that this model has, in the order of `ADAPTABLE`."""
        present = {s.role for s in self.sites if s.attachable}
        return tuple(r for r in ADAPTABLE if r in present)

    def kv_bytes(self, dtype: str) -> tuple[int, int]:
        """(latent, expanded) KV-cache bytes a token over all attention modules."""
        n = len(self.attention_paths)
        return n * self.dims.latent_bytes(dtype), n * self.dims.expanded_bytes(dtype)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)
