"""W_UK and W_UV from the absorbed.safetensors beside a model, for modules whose `kv_b_proj` has no plain weight.

Such a `kv_b_proj` is quantized (bitsandbytes, FP8) or offloaded.  Where it has a plain weight, W_UK and W_UV are views
of that weight: these need no memory and never go stale, while the file's tensors would be a second copy of the same
bits.
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
    """W_UK and W_UV of one module in a file, read when they are first needed."""

    W_UK: TensorRef
    """W_UK (H, C, P) in the file."""
    W_UV: TensorRef
    """W_UV (H, V, C) in the file."""
    weight: torch.Tensor
    """The module's own `kv_b_proj` weight, which the file was found to match."""
    _version: int
    """`weight._version` at that time."""
    _loaded: dict[tuple[torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """The tensors, once read, for the latest device and dtype."""

    def matches(self, weight: torch.Tensor) -> bool:
        """Whether `weight` is still the weight that the file was found to match, unchanged since."""
        return weight is self.weight and weight._version == self._version

    def load_like(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return W_UK (H, P, C) and W_UV (H, V, C), with the device and dtype of `tensor`."""
        place = (tensor.device, tensor.dtype)
        if place not in self._loaded:
            W_UK, W_UV = (_read(ref).to(*place) for ref in (self.W_UK, self.W_UV))
            self._loaded = {place: (W_UK.mT, W_UV)}
        return self._loaded[place]


def find_absorbed_weights(model: nn.Module, modules: dict[str, Any]) -> tuple[dict[str, AbsorbedWeights], str]:
    """Find the absorbed weights of `modules` (path → attention module) in the folder that `model` was loaded from.

    Returns them by path, and the reason why some modules have none ("" where all have, or where there is no file).  A
    module gets weights only if the file was made from the `kv_b_proj` in the folder's checkpoint: the sha256 of each
    source tensor must agree.
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
            source_digests = {
                key: digest
                for shard in shards
                if f"{path}.W_UK" in shard.tensors
                for key, digest in sources_of(shard).items()
                if key.startswith(tuple(f"{name}." for name in key_mapping.candidates(f"{path}.kv_b_proj")))
            }
            if not source_digests or any(
                key not in tensors or sha256(tensors[key]) != digest for key, digest in source_digests.items()
            ):
                return found, f"{folder / ABSORBED_FILE} was made from another kv_b_proj than {path} has"
            shapes = _shapes(module)
            if tuple(ref.shape for ref in refs) != shapes:
                return found, f"{folder / ABSORBED_FILE}: W_UK and W_UV of {path} do not have the shapes {shapes}"
            weight = base_layer(module).weight
            found[path] = AbsorbedWeights(refs[0], refs[1], weight, weight._version)
        return found, ""
    except MlaTuneError as error:  # a damaged file is no reason to fail: the model itself is loaded
        return {}, str(error)


def base_layer(module: Any) -> Any:
    """Return the `kv_b_proj` of an attention module, without PEFT's layer around it."""
    layer = module.kv_b_proj
    return layer.get_base_layer() if is_adapted(layer) else layer


def _shapes(module: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of W_UK (H, C, P) and W_UV (H, V, C) as stored."""
    H, P, V, C = module.num_heads, module.qk_nope_head_dim, module.v_head_dim, module.kv_lora_rank
    return (H, C, P), (H, V, C)


def _read(ref: TensorRef) -> torch.Tensor:
    with safe_open(ref.file, framework="pt") as file:
        return file.get_tensor(ref.key)
