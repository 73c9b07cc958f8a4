"""A checkpoint as plain modules, for PEFT to adapt each expert by itself."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import nn


class Tree(nn.Module):
    """A checkpoint as modules: a Linear for each matrix on disk, each expert apart, as transformers before 5 had them.

    PEFT knows nothing of it, so it adapts, saves and merges every Linear by its path.
    """

    def __init__(self, base: Path) -> None:
        super().__init__()
        for key, tensor in load_file(base / "model.safetensors").items():
            *path, leaf = key.split(".")
            if leaf == "weight" and tensor.ndim == 2 and "embed" not in key:
                module: nn.Module = self
                for name in path[:-1]:
                    if not hasattr(module, name):
                        module.add_module(name, nn.Module())
                    module = module.get_submodule(name)
                linear = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False)
                linear.weight.data = tensor
                module.add_module(path[-1], linear)
