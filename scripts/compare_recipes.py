#!/usr/bin/env python
"""Train several recipes on the same data and seed, and compare their held-out loss: a table, and a plot.

    python scripts/compare_recipes.py safe all-linear W_UKV-priority --out runs/compare --plot docs/img/recipes.png

`--set` overrides a key in all of them:  --set data.path=gsm8k --set train.max_steps=50
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

from mla_tune.recipe.load import load_recipe
from mla_tune.training.run import train

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", help="names or files")
    parser.add_argument("--out", type=Path, required=True, help="one run folder a recipe goes here")
    parser.add_argument("--plot", type=Path, help="a .png")
    parser.add_argument("--set", action="append", default=[], help="override for all recipes")
    parser.add_argument("--evaluations", type=int, default=5, help="held-out evaluations on the way")
    args = parser.parse_args()

    runs: dict[str, dict] = {}
    curves: dict[str, list[tuple[int, float]]] = {}
    for name in args.recipes:
        folder = args.out / Path(name).stem
        sets = [*args.set, f"output.dir={folder}", "output.overwrite=true"]
        steps = load_recipe(name, sets).train.max_steps
        every = max(1, (steps or 100) // args.evaluations)
        runs[name] = train(load_recipe(name, [*sets, f"train.eval_every={every}"])).to_json()
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        curves[name] = [(x["step"], x["eval_loss"]) for x in lines if "eval_loss" in x]

    print(
        f"| recipe | trained parameters | held-out loss before | after | change | seconds | tokens/s |\n|{'---|' * 7}"
    )
    for name, run in runs.items():
        before, after = run["held_out_loss"]["before"], run["held_out_loss"]["after"]
        print(
            f"| {name} | {run['adapter']['trainable_params']:,} | {before:.4f} | {after:.4f} | "
            f"{(after / before - 1) * 100:+.1f} % | {run['seconds']:.0f} | {run['tokens_per_s']:,.0f} |"
        )
    if args.plot:
        fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
        for name, points in curves.items():
            ax.plot(*zip(*points, strict=True), "o-", ms=4, label=name)
        source = next(iter(runs.values()))["data"]["source"]
        ax.set_title(f"Held-out loss on {source}, same data and seed", fontsize=10)
        ax.set_xlabel("step")
        ax.set_ylabel("held-out loss (nats a token)")
        ax.grid(alpha=0.25)
        ax.legend(frameon=False)
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(args.plot, dpi=120)


if __name__ == "__main__":
    main()
