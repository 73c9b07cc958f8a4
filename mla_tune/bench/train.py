"""`bench train`: cases take turns on the same data, each in a process of its own (`train_worker`).

A process trains its share of the tokens, then waits while the others train theirs, so all meet the same noise of the
machine, and each has a memory peak of its own.  This module imports no torch: only the processes need it.
"""

from __future__ import annotations

import contextlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from mla_tune.bench.train_cases import CASES
from mla_tune.errors import InputError, WorkError
from mla_tune.recipe.load import dump
from mla_tune.recipe.schema import Recipe
from mla_tune.training.resolve import resolve

#: Overrides of the recipe: each case sees each row once, and neither evaluates nor saves.
ONE_EPOCH = (
    "train.epochs=1",
    "train.max_steps=null",
    "train.eval_every=0",
    "train.save_every=0",
    "train.early_stopping=null",
    "output.samples=0",
)


@dataclass(frozen=True, slots=True)
class Measured:
    """The figures of one case."""

    #: Name of the case.
    name: str
    #: Seconds of each round.
    seconds: list[float]
    #: Real tokens of each round.
    tokens: list[int]
    #: Optimizer steps of the run.
    steps: int
    #: Bytes that a forward pass of the first batch keeps for the backward pass.
    activations: int
    #: Highest bytes of the process; on a GPU those allocated there.
    peak: int
    #: The same without what the process had before the model was loaded.
    run_peak: int
    #: Held-out loss at the end, nats a token; None without held-out rows.
    loss: float | None

    @property
    def rates(self) -> list[float]:
        """Real tokens a second of each round."""
        return [t / s for t, s in zip(self.tokens, self.seconds, strict=True)]

    @property
    def rate(self) -> float:
        """Real tokens a second, the median of the rounds."""
        return statistics.median(self.rates)


@dataclass(frozen=True, slots=True)
class TrainBench:
    """The figures of all cases."""

    #: One entry a case, in the order asked for.
    measured: list[Measured]
    #: Real tokens of the training rows.
    tokens: int
    #: Training rows, one sample each.
    rows: int
    #: Operating system and machine.
    platform: str

    def ratios(self, name: str, to: str) -> list[float]:
        """Return the tokens a second of case `name` divided by those of case `to`, for each round."""
        a, b = (next(m for m in self.measured if m.name == n) for n in (name, to))
        return [x / y for x, y in zip(a.rates, b.rates, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """Return the document of `--json`."""
        found = [asdict(m) | {"tokens_per_s": m.rate} for m in self.measured]
        return {"cases": found, "tokens": self.tokens, "rows": self.rows, "platform": self.platform}


def bench(recipe: Recipe, names: Sequence[str], rounds: int, say: Callable[[str], None]) -> TrainBench:
    """Train `recipe` once with each of the cases `names`, in `rounds` turns, and return the figures.

    `say` gets a line after each turn.  Raises `InputError` for a recipe that can't be trained, for an unknown case, or
    for one of TRL's where TRL isn't installed, and `WorkError` if a case fails.
    """
    unknown = [n for n in names if n not in CASES]
    if unknown or not names:
        raise InputError(f"--cases: unknown {', '.join(unknown) or 'and empty'}; allowed: {', '.join(CASES)}")
    if any(CASES[n].trl for n in names):
        _check_trl()
    resolve(recipe)  # raises here, once, what is wrong with the recipe, and not in each process
    seconds: dict[str, list[float]] = {n: [] for n in names}
    tokens: dict[str, list[int]] = {n: [] for n in names}
    last: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="mla-tune-bench-") as folder, contextlib.ExitStack() as stack:
        workers: dict[str, _Worker] = {}
        for name in names:
            # One after the other: they choose kernels by measurement, and would disturb each other's.
            workers[name] = stack.enter_context(_worker(name, recipe, rounds, Path(folder)))
            workers[name].read()  # it is warm and waits
        for turn in range(rounds):
            for name, worker in workers.items():
                found = worker.turn()
                seconds[name].append(found["seconds"])
                tokens[name].append(found["tokens"])
                say(f"round {turn + 1}/{rounds}  {name}: {found['tokens'] / found['seconds']:,.0f} tokens/s")
        for name, worker in workers.items():
            last[name] = worker.turn()
    figures = ("steps", "activations", "peak", "run_peak", "loss")
    return TrainBench(
        [Measured(n, seconds[n], tokens[n], **{k: last[n][k] for k in figures}) for n in names],
        last[names[0]]["tokens"],
        last[names[0]]["rows"],
        platform.platform(),
    )


class _Worker:
    """A process that trains one case, and the lines to and from it."""

    def __init__(self, name: str, process: subprocess.Popen[str], log: IO[str]) -> None:
        self.name, self.process, self.log = name, process, log

    def send(self, line: str) -> None:
        """Write a line to its standard input."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and the next `read` says so
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def turn(self) -> dict[str, Any]:
        """Let it train its next share (after the last: finish), and return what it reports."""
        self.send("go")
        return self.read()

    def read(self) -> dict[str, Any]:
        """Return the next JSON line that it writes.  Raises `WorkError` with the end of its log if it has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)  # type: ignore[no-any-return]
        code = self.process.wait()
        self.log.seek(0)
        raise WorkError(f"bench: {self.name} ended with exit code {code}:\n{self.log.read()[-2000:].strip()}")


@contextlib.contextmanager
def _worker(name: str, recipe: Recipe, rounds: int, folder: Path) -> Iterator[_Worker]:
    """Start the process of a case; it is killed at the end of the context."""
    own = folder / name
    own.mkdir()
    case = CASES[name]
    updated = _with_sets(recipe, [*ONE_EPOCH, *case.sets, f"output.dir={own / 'run'}"], own)
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "mla_tune.bench.train_worker"]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True)
        try:
            worker = _Worker(name, process, log)
            worker.send(json.dumps({"recipe": str(updated), "case": name, "rounds": rounds}))
            yield worker
        finally:
            process.kill()
            process.wait()


def _with_sets(recipe: Recipe, sets: list[str], folder: Path) -> Path:
    """Write the recipe with overrides into `folder`, and return the file."""
    from mla_tune.recipe.load import load_recipe

    first, second = folder / "given.yaml", folder / "recipe.yaml"
    first.write_text(dump(recipe))
    second.write_text(dump(load_recipe(str(first), sets)))
    return second


def _check_trl() -> None:
    """Raise `InputError` where TRL is not installed."""
    from importlib.util import find_spec

    if find_spec("trl") is None:
        raise InputError("--cases: TRL is not installed; pip install 'mla-tune[bench]', or leave its cases out")
