"""W_UK and W_UV out of the absorbed.safetensors that stands beside a model, for modules whose `kv_b_proj` has no plain
weight in memory: quantized (bitsandbytes, FP8), or offloaded.

Where `kv_b_proj` has a plain weight the two are views of it, which cost nothing and can't be stale; the file's tensors,
the same bits, would be kept twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from mla_tune.arch.build import architecture
from mla_tune.checkpoint.absorbed import ABSORBED_FILE, absorbed_shards, sources_of
from mla_tune.checkpoint.index import Checkpoint, TensorRef
from mla_tune.checkpoint.tensor_io import sha256
from mla_tune.errors import MlaTuneError
from mla_tune.inference.lora_tensors import is_adapted


@dataclass(slots=True)
class AbsorbedWeights:
    """W_UK (H, C, P) and W_UV (H, V, C) of one module: where they lie, and, once asked for, the two on a device.

    They stand for `weight`, the module's own as it was when the file was found to fit, and for no other.
    """

    W_UK: TensorRef
    W_UV: TensorRef
    weight: torch.Tensor
    _version: int
    _taken: dict[tuple[torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def matches(self, weight: torch.Tensor) -> bool:
        """Whether these tensors belong to `weight`, unchanged since they were found."""
        return weight is self.weight and weight._version == self._version

    def take(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """W_UK (H, P, C) and W_UV (H, V, C), with the device and dtype of `like`."""
        place = (like.device, like.dtype)
        if place not in self._taken:
            W_UK, W_UV = (_read(ref).to(*place) for ref in (self.W_UK, self.W_UV))
            self._taken = {place: (W_UK.mT, W_UV)}
        return self._taken[place]


def find_absorbed_weights(model: nn.Module, modules: dict[str, Any]) -> tuple[dict[str, AbsorbedWeights], str]:
    """By path, for the attention `modules` of a model that was loaded from a folder, what the file beside it has of
    them; and why it has nothing of some, if so.

    A module gets its tensors where the file was made from the `kv_b_proj` that lies in the folder's checkpoint, by
    sha256 of each tensor as stored.
    """
    folder = Path(str(getattr(model, "name_or_path", "") or ""))
    if not modules or not folder.is_dir():
        return {}, ""
    try:
        shards = absorbed_shards(folder)
        if not shards:
            return {}, ""
        checkpoint = Checkpoint.open(folder)
        tensors, key_mapping = checkpoint.tensors, architecture(checkpoint.config, str(folder)).key_mapping
        found = {}
        for path, module in modules.items():
            refs = [s.tensors[key] for key in (f"{path}.W_UK", f"{path}.W_UV") for s in shards if key in s.tensors]
            if len(refs) != 2:
                return found, f"{folder / ABSORBED_FILE} has no W_UK and W_UV of {path}"
            made_of = {
                key: digest
                for shard in shards
                if f"{path}.W_UK" in shard.tensors
                for key, digest in sources_of(shard).items()
                if key.startswith(tuple(f"{name}." for name in key_mapping.candidates(f"{path}.kv_b_proj")))
            }
            if not made_of or any(key not in tensors or sha256(tensors[key]) != d for key, d in made_of.items()):
                return found, f"{folder / ABSORBED_FILE} was made from another kv_b_proj than {path} has"
            shapes = _shapes(module)
            if tuple(ref.shape for ref in refs) != shapes:
                return found, f"{folder / ABSORBED_FILE}: {path} has other shapes than {shapes}"
            weight = base_layer(module).weight
            found[path] = AbsorbedWeights(refs[0], refs[1], weight, weight._version)
        return found, ""
    except MlaTuneError as error:  # damaged: the model itself was loaded all the same
        return {}, str(error)


def base_layer(module: Any) -> Any:
    """The `kv_b_proj` of an attention module, without PEFT's layer around it."""
    layer = module.kv_b_proj
    return layer.get_base_layer() if is_adapted(layer) else layer


def _shapes(module: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    H, P, V, C = module.num_heads, module.qk_nope_head_dim, module.v_head_dim, module.kv_lora_rank
    return (H, C, P), (H, V, C)


def _read(ref: TensorRef) -> torch.Tensor:
    with safe_open(ref.file, framework="pt") as file:
        return file.get_tensor(ref.key)
