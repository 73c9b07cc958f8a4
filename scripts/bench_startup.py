#!/usr/bin/env python
"""How long the quick commands take, as whole processes: `--help`, a recipe error, `inspect deepseek-v3`.

    python scripts/bench_startup.py [--runs 11]

The commands run in turn, round after round; the median and the range of each are printed in seconds, beside those of
a bare `python -c pass`, and whether any of them imported torch.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUN = "import sys; from mla_tune.cli.app import main; main()"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=11, help="rounds")
    rounds = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        wrong = Path(folder, "wrong.yaml")
        wrong.write_text("adapter: {targets: [W_UVK]}\n")
        commands = {
            "python -c pass": ["-c", "pass"],
            "mla-tune --help": ["-c", RUN, "--help"],
            "mla-tune train --recipe wrong.yaml": ["-c", RUN, "train", "--recipe", str(wrong)],
            "mla-tune inspect deepseek-v3": ["-c", RUN, "inspect", "deepseek-v3"],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for i in range(rounds + 1):
            for name, args in commands.items():
                began = time.perf_counter()
                subprocess.run([sys.executable, *args], capture_output=True)
                if i:  # the first round warms the disk cache
                    times[name].append(time.perf_counter() - began)
        for name, seconds in times.items():
            loaded = subprocess.run(
                [sys.executable, "-X", "importtime", *commands[name]], capture_output=True, text=True
            )
            torch = "imports torch" if "| torch\n" in loaded.stderr else "no torch"
            low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
            print(f"{name:36} {middle:.2f} s   ({low:.2f} to {high:.2f})   {torch}")


if __name__ == "__main__":
    main()
