#!/usr/bin/env python
"""The full-size DeepSeek-V3 FP8 checkpoint as headers over sparse files, and two rank-16 adapters on it.

    python scripts/fake_v3.py OUT       # OUT/model, OUT/attention, OUT/all

689 GB by name, about 30 MB on the disk: every weight is a hole that reads as zero.  For whatever works from headers,
such as `mla-tune merge-absorb OUT/all --base OUT/model --out MERGED --dry-run`.

Tensors, dtypes and the number of files are those that were published: 91,991 tensors of 641.29 GiB in 163 files.  The
published files follow the pipeline stages of the training (`STAGES`), about 4 GiB each.  Their borders were read off
their sizes: a file here has other experts at its ends than its namesake.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from synthetic_v3 import GROUPS, Tensor, cut, layer_tensors, outer_tensors, write_adapter, write_model

from mla_tune.resources import CONFIGS

#: (layers, files) of each pipeline stage, read off the sizes of the published files; the last stage is the MTP layer.
STAGES = ((7, 12), (8, 22), (8, 22), (8, 22), (8, 22), (8, 22), (7, 19), (7, 19), (1, 3))
SHARD_BYTES = 4 * 2**30 + 2**24
#: Facts of the published checkpoint that the made one must match.
TENSORS, SHARDS, NUMBERS = 91_991, 163, 684_531_386_000
ADAPTERS: dict[str, tuple[str, ...]] = {"attention": ("attention",), "all": GROUPS}
RANK = 16


def config() -> dict[str, Any]:
    """The published config.json."""
    facts = json.loads((CONFIGS / "models" / "deepseek-v3.json").read_text(encoding="utf-8"))
    return {k: v for k, v in facts.items() if not k.startswith("_")}


def shards() -> list[list[Tensor]]:
    """The 163 files, each a list of tensors."""
    facts = config()
    embedding, tail = outer_tensors(facts)
    files: list[list[Tensor]] = []
    layer = 0
    for count, most in STAGES:
        tensors = [t for i in range(layer, layer + count) for t in layer_tensors(facts, i)]
        if layer == 0:
            tensors.insert(0, embedding)
        layer += count
        if layer == facts["num_hidden_layers"]:
            tensors += tail
        files += cut(tensors, SHARD_BYTES, most)
    return files


def make(folder: Path) -> None:
    """Write `folder`/model and the adapters."""
    facts = config()
    write_model(folder / "model", facts, shards(), filler=None)
    for name, groups in ADAPTERS.items():
        write_adapter(folder / name, facts, folder / "model", groups, RANK, filler=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make; must not exist")
    out = parser.parse_args().out
    if out.exists():
        parser.error(f"{out} exists: name a folder that does not")
    make(out)
    files = shards()
    size = sum(t.nbytes for file in files for t in file)
    print(f"{out}: {sum(map(len, files)):,} tensors, {size:,} bytes by name, {len(files)} files", file=sys.stderr)


if __name__ == "__main__":
    main()
