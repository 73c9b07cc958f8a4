#!/usr/bin/env python
"""What `mla-tune merge-absorb` costs, against PEFT's merge, against copying the model, and by size of the model.

    python scripts/bench_merge.py                                # all parts, 1.3 GB, about 15 GB of free disk
    python scripts/bench_merge.py --only peft,cp --runs 5 --json
    python scripts/bench_merge.py --paper                        # the calculation for DeepSeek-V3, nothing is run

Parts: `peft` (from_pretrained → merge_and_unload → save_pretrained), `cp` (cp -r of the base, then sync), `flat`
(memory and time from a small model to a large one), `dry-run` (on all headers of DeepSeek-V3).

The model is a bf16 DeepSeek-V3 of one dense and some MoE layers, with random weights, made here; the adapters have
rank 16 and PEFT's own layout, one on attention and all routed experts, one on attention only.  Every figure is of a
whole process, from its start to its end, imports included.  The commands of a part take turns, round after round;
before each, old outputs are deleted, the disk is synced and the base is read once, so that all start with the same
warm page cache.  The table has medians, and the median of the ratios of each round with its range.  Memory is VmHWM of
the process and all its children added up (see scripts/process_cost.py).  Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import fake_v3
import merge_paper
from bench_table import Check, Part, ratios
from process_cost import Cost, measure
from synthetic_v3 import Filler, cut, layer_tensors, model_tensors, outer_tensors, write_adapter, write_model

PARTS = ("peft", "cp", "flat", "dry-run")
RANK = 16
ADAPTERS = {"all": ("attention", "experts"), "attention": ("attention",)}
PEFT_MERGE = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, adapter, out, shard = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size=shard)
"""


def config(gigabytes: float, hidden: int, experts: int) -> dict[str, Any]:
    """A small DeepSeek-V3 of about this size in bf16: `hidden` and `experts` fix the layer, the size their number."""
    facts = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "dtype": "bfloat16",
        "vocab_size": 16 * hidden,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "moe_intermediate_size": hidden // 2,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "q_lora_rank": hidden // 2,
        "kv_lora_rank": hidden // 4,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "num_hidden_layers": 2,
    }
    embedding, tail = outer_tensors(facts)
    fixed = sum(t.nbytes for t in (embedding, *tail, *layer_tensors(facts, 0)))
    layer = sum(t.nbytes for t in layer_tensors(facts, 1))
    return facts | {"num_hidden_layers": 1 + max(1, round((gigabytes * 1e9 - fixed) / layer))}


class Bench:
    """One work folder, with the models and outputs in it."""

    def __init__(self, work: Path, args: argparse.Namespace) -> None:
        self.work, self.args = work, args
        self.out = work / "out"

    def model(self, gigabytes: float) -> tuple[Path, dict[str, Path]]:
        """(base, adapters by name), made unless they are there."""
        folder = self.work / f"{gigabytes:g}-GB"
        base, adapters = folder / "base", {name: folder / name for name in ADAPTERS}
        if not folder.exists():
            facts = config(gigabytes, self.args.hidden, self.args.experts)
            shards = cut(model_tensors(facts), int(self.args.shard_mb * 1e6))
            write_model(base, facts, shards, Filler())
            for name, path in adapters.items():
                write_adapter(path, facts, base, ADAPTERS[name], RANK, Filler(std=0.05))
        return base, adapters

    def rounds(self, commands: dict[str, tuple[Path, Sequence[str]]]) -> dict[str, list[Cost]]:
        """`runs` rounds of all commands, each with the base that it reads, in turn."""
        costs: dict[str, list[Cost]] = {name: [] for name in commands}
        for i in range(self.args.runs):
            for name, (base, command) in commands.items():
                shutil.rmtree(self.out, ignore_errors=True)
                _read_all(base)
                os.sync()
                costs[name].append(measure(command, env=_ENV))
                if not (self.out / "config.json").is_file():
                    sys.exit(f"{name}: ended well, but left no model in {self.out}")
                _say(f"round {i + 1} of {self.args.runs}: {name}: {costs[name][-1].seconds:.2f} s")
        shutil.rmtree(self.out, ignore_errors=True)
        return costs

    def merge(self, base: Path, adapter: Path, *options: str) -> list[str]:
        if self.args.workers:
            options += ("--workers", str(self.args.workers))
        return [*_MLA_TUNE, "merge-absorb", str(adapter), "--base", str(base), "--out", str(self.out), *options]

    def peft(self) -> Part:
        base, adapters = self.model(self.args.gb)
        adapter, shard = adapters["all"], f"{self.args.shard_mb:g}MB"
        peft_merge = [sys.executable, "-c", PEFT_MERGE, str(base), str(adapter), str(self.out), shard]
        costs = self.rounds(
            {
                "PEFT": (base, peft_merge),
                "merge-absorb --no-verify": (base, self.merge(base, adapter, "--no-verify")),
                "merge-absorb": (base, self.merge(base, adapter)),
            }
        )
        peft, bare, proof = costs.values()
        checks = [
            Check("PEFT / merge-absorb --no-verify, time", ratios(peft, bare, "seconds"), 3.5, False),
            Check("PEFT / merge-absorb, time", ratios(peft, proof, "seconds"), 2, False),
            Check("merge-absorb --no-verify / PEFT, memory", ratios(bare, peft, "peak"), 0.2, True),
            Check("merge-absorb / PEFT, memory", ratios(proof, peft, "peak"), 0.2, True),
        ]
        return Part(costs, checks, {"model": _size(base), "adapter": _size(adapter)}, {})

    def cp(self) -> Part:
        base, adapters = self.model(self.args.gb)
        copy = ["sh", "-c", 'cp -r "$1" "$2" && sync', "sh", str(base), str(self.out)]
        commands: dict[str, tuple[Path, Sequence[str]]] = {"cp -r && sync": (base, copy)}
        for name, adapter in adapters.items():
            commands[f"merge-absorb --no-verify, {name}"] = (base, self.merge(base, adapter, "--no-verify"))
        costs = self.rounds(commands)
        plain, *merges = costs.values()
        checks = [
            Check(f"merge-absorb, {name} / cp, time", ratios(merge, plain, "seconds"), target, True)
            for name, merge, target in zip(adapters, merges, (1.5, 1.2), strict=True)
        ]
        sizes = {"model": _size(base)} | {name: _size(path) for name, path in adapters.items()}
        return Part(costs, checks, sizes, {})

    def flat(self) -> Part:
        sizes: dict[str, int] = {}
        commands: dict[str, tuple[Path, Sequence[str]]] = {}
        for gigabytes in self.args.flat_gb:
            base, adapters = self.model(gigabytes)
            name = f"merge-absorb --no-verify, {gigabytes:g} GB"
            sizes[f"{gigabytes:g} GB"] = _size(base)
            commands[name] = (base, self.merge(base, adapters["all"], "--no-verify"))
        costs = self.rounds(commands)
        peaks = [statistics.median(c.peak for c in cost) for cost in costs.values()]
        middle = (max(peaks) + min(peaks)) / 2
        times = [statistics.median(c.seconds for c in cost) for cost in costs.values()]
        figures = {
            f"seconds for each GB, from {a} to {b}": (t - s) / (sizes[b] - sizes[a]) * 1e9
            for (a, s), (b, t) in pairwise(zip(sizes, times, strict=True))
        }
        checks = [Check("peak memory, off the middle of the range", [max(peaks) / middle - 1], 0.1, True)]
        return Part(costs, checks, sizes, figures)

    def dry_run(self) -> Part:
        folder = self.work / "fake-v3"
        fake_v3.make(folder)
        base = folder / "model"
        costs: dict[str, list[Cost]] = {name: [] for name in fake_v3.ADAPTERS}
        for _ in range(self.args.runs):
            for name in costs:
                command = [*self.merge(base, folder / name), "--dry-run"]
                costs[name].append(measure(command, env=_ENV))
        shutil.rmtree(folder)
        checks: list[Check] = []
        for name, cost in costs.items():
            checks.append(Check(f"--dry-run, {name}, seconds", [c.seconds for c in cost], 10, True))
            checks.append(Check(f"--dry-run, {name}, peak MB", [c.peak / 1e6 for c in cost], 500, True))
        return Part(costs, checks, {}, {})


_MLA_TUNE = [sys.executable, "-c", "import sys; from mla_tune.cli.app import main; main()"]
#: As a user's shell has it, but for the two that make programs ask the network.
_ENV = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _read_all(folder: Path) -> None:
    """Bring the files into the page cache."""
    for file in folder.rglob("*.safetensors"):
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _machine() -> dict[str, Any]:
    return {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}


def _list(convert: Callable[[str], Any], text: str) -> list[Any]:
    return [convert(item.strip()) for item in text.split(",") if item.strip()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=partial(_list, str), default=list(PARTS), help="parts, separated by commas")
    parser.add_argument("--runs", type=int, default=3, help="rounds of each part")
    parser.add_argument("--gb", type=float, default=1.3, help="size of the model, in 10^9 bytes")
    parser.add_argument("--flat-gb", type=partial(_list, float), default=[0.3, 1.3, 5.0], help="sizes of 'flat'")
    parser.add_argument("--shard-mb", type=float, default=200, help="size of a shard, in 10^6 bytes")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size, a multiple of 64")
    parser.add_argument("--experts", type=int, default=32, help="routed experts of a layer")
    parser.add_argument("--workers", type=int, help="--workers of merge-absorb; default: its own")
    parser.add_argument(
        "--work",
        type=Path,
        help="where to make the work folder (on a real disk); removed in the end",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document, tables to standard error")
    parser.add_argument("--paper", action="store_true", help="print docs/merge-cost.md's table and do nothing else")
    args = parser.parse_args()
    if args.paper:
        print(merge_paper.table())
        return
    unknown = sorted(set(args.only) - set(PARTS))
    if unknown or args.runs < 1 or args.hidden % 64 or args.hidden < 64 or args.experts < 2:
        what = f"unknown part {unknown[0]!r}" if unknown else "sizes out of range"
        parser.error(f"{what}: parts are {', '.join(PARTS)}; --runs ≥ 1, --hidden a multiple of 64, --experts ≥ 2")
    document: dict[str, Any] = _machine()
    with tempfile.TemporaryDirectory(dir=args.work, prefix="bench-merge-") as work:
        bench = Bench(Path(work), args)
        steps = {"peft": bench.peft, "cp": bench.cp, "flat": bench.flat, "dry-run": bench.dry_run}
        for name in (p for p in PARTS if p in args.only):
            part = steps[name]()
            document[name] = part.document()
            print(part.table(name), file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.json:
        print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
