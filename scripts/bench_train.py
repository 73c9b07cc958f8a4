#!/usr/bin/env python
"""What training costs: against TRL's SFTTrainer, with each kind of checkpointing, and over 20,000 steps.

    python scripts/bench_train.py                       # all parts, about an hour on two cores
    python scripts/bench_train.py --only checkpointing
    python scripts/bench_train.py --only flat --steps 2000

Parts: `trl` (the embedded model on GSM8K, rows of 512 tokens, SFTTrainer with the same adapter at its defaults and
without its checkpointing and bfloat16), `checkpointing` (none, mla and full on the preset `small`), `flat` (resident
memory of one long run).  Contenders take turns, each in a process of its own (see `mla-tune bench train`); a target is
held by the median of the rounds' ratios.  Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mla_tune.bench.train import TrainBench, bench
from mla_tune.recipe.load import load_recipe
from mla_tune.report.bench_train_table import print_train

PARTS = ("trl", "checkpointing", "flat")
DATA = ["data.path=gsm8k", "train.batch_size=8", "train.max_length=512"]
#: Trains in this process and writes its resident bytes every hundredth of the steps.
LONG = """
import json, sys
import psutil
from transformers import TrainerCallback
from mla_tune.recipe.load import load_recipe
from mla_tune.training.run import train
recipe, steps = load_recipe(sys.argv[1], sys.argv[3:]), int(sys.argv[2])
class Watch(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % (steps // 100) == 0:
            print(json.dumps([state.global_step, psutil.Process().memory_info().rss]), flush=True)
train(recipe, callbacks=[Watch()])
"""


def check(name: str, values: list[float], target: float, most: bool) -> dict[str, Any]:
    middle = statistics.median(values)
    held = middle <= target if most else middle >= target
    words = f"{'at most' if most else 'at least'} {target:g}: {'held' if held else 'MISSED'}"
    print(f"  {name:58}{middle:8.3g}  ({min(values):.3g} to {max(values):.3g})  {words}", flush=True)
    return {"name": name, "values": values, "median": middle, "target": target, "most": most, "held": held}


def against_trl(rounds: int, rows: int) -> dict[str, Any]:
    recipe = load_recipe("safe", [*DATA, f"data.limit={rows}"])
    # Each setting of SFTTrainer beside ours with rows of the same kind: so many tokens are as many optimizer steps.
    partner = {"trl": "unpacked", "trl-packed": "none", "trl-plain": "unpacked", "trl-plain-packed": "none"}
    found = measured(recipe, ["none", "unpacked", *partner], rounds)
    by_name = {m.name: m for m in found.cases}
    better = max(("trl", "trl-packed"), key=lambda n: by_name[n].rate)
    plain = max(("trl-plain", "trl-plain-packed"), key=lambda n: by_name[n].rate)
    checks = [
        check(f"tokens/s over its better setting ({better})", found.ratios(partner[better], better), 1.5, False),
        check("tokens/s over it packed", found.ratios("none", "trl-packed"), 5, False),
        check(f"peak memory over its better setting ({better})", over(found, partner[better], better), 1, True),
        check("peak memory over it packed", over(found, "none", "trl-packed"), 1, True),
        check(f"tokens/s over it without its defaults ({plain})", found.ratios(partner[plain], plain), 1.5, False),
        check(f"peak memory over it without its defaults ({plain})", over(found, partner[plain], plain), 1, True),
    ]
    for trl, ours in partner.items():
        losses = [by_name[n].loss or math.nan for n in (ours, trl)]
        checks.append(check(f"held-out loss over {trl}'s, apart by", [abs(losses[0] / losses[1] - 1)], 0.01, True))
    return {**found.to_json(), "checks": checks}


def checkpointing(rounds: int, rows: int) -> dict[str, Any]:
    recipe = load_recipe("safe", [*DATA, "model.base=null", "model.preset=small", f"data.limit={rows}"])
    found = measured(recipe, ["none", "mla", "full"], rounds)
    by_name = {m.name: m for m in found.cases}
    kept = [by_name["mla"].activations / by_name["none"].activations]
    checks = [
        check("mla: activations over none's", kept, 0.75, True),
        check("mla: time over none's", found.ratios("none", "mla"), 1.10, True),
        check("full: time over none's", found.ratios("none", "full"), 2, True),
    ]
    return {**found.to_json(), "checks": checks}


def flat(steps: int) -> dict[str, Any]:
    """Resident memory after a tenth of the steps and at the end."""
    sets = [f"train.max_steps={steps}", "train.batch_size=1", "train.max_length=128", "train.log_every=10"]
    with tempfile.TemporaryDirectory() as folder:
        sets += [f"output.dir={folder}/run", "data.path=gsm8k", "data.eval_fraction=0", "output.samples=0"]
        sets += [f"train.save_every={steps // 4}", "data.on_overflow=drop"]
        command = [sys.executable, "-c", LONG, "safe", str(steps), *sets]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
    points = [json.loads(line) for line in done.stdout.splitlines()]
    later = [rss for step, rss in points if step >= steps // 10]
    print(f"  resident MB every tenth: {', '.join(f'{rss / 1e6:.0f}' for _, rss in points[9::10])}")
    checks = [
        check("largest resident memory over that after a tenth", [max(later) / later[0]], 1.05, True),
        check("smallest over that after a tenth", [min(later) / later[0]], 0.95, False),
    ]
    return {"points": points, "checks": checks}


def measured(recipe: Any, names: list[str], rounds: int) -> TrainBench:
    found = bench(recipe, names, rounds, lambda line: print(f"  {line}", file=sys.stderr, flush=True))
    print_train(recipe, found.to_json())
    return found


def over(found: TrainBench, a: str, b: str) -> list[float]:
    peaks = {m.name: m.peak for m in found.cases}
    return [peaks[a] / peaks[b]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=240, help="rows of GSM8K that every case trains on, once")
    parser.add_argument("--steps", type=int, default=20_000, help="of the part `flat`")
    parser.add_argument("--out", type=Path, help="write all figures there, as JSON")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    found: dict[str, Any] = {}
    for part in parts:
        print(part, flush=True)
        if part == "flat":
            found[part] = flat(arguments.steps)
        else:
            found[part] = (against_trl if part == "trl" else checkpointing)(arguments.rounds, arguments.rows)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1))
    missed = [c["name"] for f in found.values() for c in f["checks"] if not c["held"]]
    sys.exit(f"missed: {'; '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
