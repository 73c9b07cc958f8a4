#!/usr/bin/env python
"""Make the small data sets that ship with mla-tune from `mbpp.jsonl` and `gsm8k.jsonl`.

    python scripts/make_embedded_data.py --source DIR

`DIR` holds one JSON object a line with `prompt` and `completion` (MBPP also `tests` and `setup`).  A row's place is
decided by a hash of its task, so that neither the order of the source nor a later run moves it to the other side:
the rows with the smallest hashes are held out, the next ones are trained on.  Origin and licenses: LICENSES.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

TRAIN_ROWS, HELD_OUT_ROWS = 400, 80
MAX_PROMPT, MAX_ROW = 600, 1500  # characters: no prompt fills a window of 512 tokens by itself


def task(prompt: str) -> str:
    """What identifies a task: MBPP's description without its example asserts, in one spelling of case and space."""
    return " ".join(prompt.split("\nassert")[0].lower().split())


def usable(row: dict) -> bool:
    """Short enough, and whole by itself: MBPP's `setup` code isn't part of the prompt."""
    size = len(row["prompt"]) + len(row["completion"])
    return len(row["prompt"]) <= MAX_PROMPT and size <= MAX_ROW and not row.get("setup")


def split(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """(train, held out): each task once, in the order of its hash."""
    by_task: dict[str, dict] = {}
    for row in rows:
        if usable(row):
            by_task.setdefault(task(row["prompt"]), row)
    order = sorted(by_task, key=lambda t: hashlib.sha256(t.encode()).hexdigest())
    chosen = [by_task[t] for t in order]
    return chosen[HELD_OUT_ROWS : HELD_OUT_ROWS + TRAIN_ROWS], chosen[:HELD_OUT_ROWS]


def write(path: Path, rows: list[dict]) -> None:
    fields = ("prompt", "completion", "tests")
    lines = [json.dumps({f: row[f] for f in fields if f in row}, ensure_ascii=False) for row in rows]
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(tmp, path)


def main() -> None:
    here = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with mbpp.jsonl and gsm8k.jsonl")
    parser.add_argument("--out", type=Path, default=here / "mla_tune/embedded/data", help="where the parts are written")
    args = parser.parse_args()
    for name in ("mbpp", "gsm8k"):
        path = args.source / f"{name}.jsonl"
        if not path.is_file():
            sys.exit(f"{path}: no such file")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        train, held_out = split(rows)
        if len(train) < TRAIN_ROWS:
            sys.exit(f"{path}: {len(train)} training rows are left after the held-out part, {TRAIN_ROWS} are needed")
        write(args.out / f"{name}.train.jsonl", train)
        write(args.out / f"{name}.held_out.jsonl", held_out)
        print(f"{name}: {len(rows)} rows read, {len(train)} to train on, {len(held_out)} held out")


if __name__ == "__main__":
    main()
