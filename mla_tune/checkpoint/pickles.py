"""Shell commands that convert pickle files to safetensors, for messages.

Pickle files (`.bin`, `.pt`, `.pth`, `.ckpt`) are never opened here: unpickling runs whatever code the file holds.
"""

from __future__ import annotations

import shlex
from pathlib import Path

#: Endings of weight files that torch.save writes.
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

# weights_only=True unpickles tensors and plain containers, and runs no code.  clone() separates tensors that share
# memory, which the safetensors format can't express.
_PROGRAM = (
    "import sys, torch; from safetensors.torch import save_file; source, target = sys.argv[1:]; "
    'tensors = torch.load(source, map_location="cpu", weights_only=True); '
    "save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, target, "
    'metadata={"format": "pt"})'
)


def convert_command(source: str | Path, target: str | Path) -> str:
    """The shell command that converts `source`, a pickled dictionary of tensors, to the safetensors file `target`.

    It runs no code from the file.
    """
    return shlex.join(["python", "-c", _PROGRAM, str(source), str(target)])


_FOLDER_PROGRAM = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
folder = Path(sys.argv[1])
def name(old):
    return "model" + old.removeprefix("pytorch_model").removesuffix(".bin") + ".safetensors"
for file in sorted(folder.glob("pytorch_model*.bin")):
    tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    tensors = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
    save_file(tensors, folder / name(file.name), metadata={"format": "pt"})
index = folder / "pytorch_model.bin.index.json"
if index.exists():
    document = json.loads(index.read_text())
    document["weight_map"] = {key: name(old) for key, old in document["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document, indent=2))
"""


def convert_folder_command(folder: str | Path) -> str:
    """The shell command that writes a safetensors file beside every `pytorch_model*.bin` of a model folder.

    It converts the index too, holds one file in memory at a time, and runs no code from the files.
    """
    return shlex.join(["python", "-c", _FOLDER_PROGRAM, str(folder)])
