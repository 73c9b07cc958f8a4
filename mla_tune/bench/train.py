"""`bench train`: train the same data with each case, in alternating rounds and separate processes.

In a round, each process (`train_worker`) trains its share of the tokens while the others wait.  So all cases see the
same noise of the machine, and the memory peak of each can be measured.  This module imports no torch: only the
processes need it.
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

#: Overrides of the recipe: each case trains on each row once, and neither evaluates nor saves.
ONE_EPOCH = (
    "train.epochs=1",
    "train.max_steps=null",
    "train.eval_every=0",
    "train.save_every=0",
    "train.early_stopping=null",
    "output.samples=0",
)


@dataclass(frozen=True, slots=True)
class CaseResult:
    """The figures of one case."""

    name: str
    """Name of the case, as in `--cases`."""
    seconds: list[float]
    """Seconds of each round."""
    tokens: list[int]
    """Real tokens (no padding) trained in each round."""
    steps: int
    """Optimizer steps of the whole run."""
    activations: int
    """Bytes that a forward pass of the first batch keeps for the backward pass."""
    peak: int
    """Peak resident bytes of the process; on a GPU, peak bytes that torch allocated there."""
    run_peak: int
    """On a CPU, `peak` without the bytes of the process before the model was loaded; on a GPU, `peak`."""
    loss: float | None
    """Held-out loss after the last round, in nats a token; None without held-out rows."""

    @property
    def rates(self) -> list[float]:
        """Real tokens a second of each round."""
        return [t / s for t, s in zip(self.tokens, self.seconds, strict=True)]

    @property
    def rate(self) -> float:
        """Median of `rates`."""
        return statistics.median(self.rates)


@dataclass(frozen=True, slots=True)
class TrainBench:
    """The result of `bench train`."""

    cases: list[CaseResult]
    """One entry for each case, in the order asked for."""
    tokens: int
    """Real tokens of all training rows."""
    rows: int
    """Number of training rows, one sample each."""
    platform: str
    """Operating system and machine."""

    def ratios(self, name: str, to: str) -> list[float]:
        """Return the tokens a second of case `name` divided by those of case `to`, for each round."""
        case, other = (next(c for c in self.cases if c.name == n) for n in (name, to))
        return [a / b for a, b in zip(case.rates, other.rates, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """Return the document that `mla-tune bench train --json` prints."""
        cases = [asdict(case) | {"tokens_per_s": case.rate} for case in self.cases]
        return {"cases": cases, "tokens": self.tokens, "rows": self.rows, "platform": self.platform}


def bench(recipe: Recipe, names: Sequence[str], rounds: int, progress: Callable[[str], None]) -> TrainBench:
    """Train `recipe` once with each of the cases `names`, in alternating `rounds`, and return the figures.

    `progress` is called with a line after each round of each case.  Raises `InputError` for a recipe that can't be
    trained, for an unknown case, or for a case of TRL where TRL isn't installed, and `WorkError` if a case fails.
    """
    unknown = [n for n in names if n not in CASES]
    if unknown or not names:
        problem = f"unknown {', '.join(unknown)}" if unknown else "no case given"
        raise InputError(f"--cases: {problem}; allowed: {', '.join(CASES)}")
    if any(CASES[n].trl for n in names):
        _check_trl()
    resolve(recipe)  # so that an error in the recipe is raised here, once, and not by each process
    seconds: dict[str, list[float]] = {n: [] for n in names}
    tokens: dict[str, list[int]] = {n: [] for n in names}
    run_figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="mla-tune-bench-") as folder, contextlib.ExitStack() as stack:
        workers: dict[str, _Worker] = {}
        for name in names:
            # One after the other: they choose kernels by measuring, and would disturb each other.
            workers[name] = stack.enter_context(_worker(name, recipe, rounds, Path(folder)))
            workers[name].read()  # returns when the warm-up is over
        for i in range(rounds):
            for name, worker in workers.items():
                figures = worker.train_round()
                seconds[name].append(figures["seconds"])
                tokens[name].append(figures["tokens"])
                progress(f"round {i + 1}/{rounds}  {name}: {figures['tokens'] / figures['seconds']:,.0f} tokens/s")
        for name, worker in workers.items():
            run_figures[name] = worker.train_round()
    keys = ("steps", "activations", "peak", "run_peak", "loss")
    return TrainBench(
        [CaseResult(n, seconds[n], tokens[n], **{key: run_figures[n][key] for key in keys}) for n in names],
        run_figures[names[0]]["tokens"],
        run_figures[names[0]]["rows"],
        platform.platform(),
    )


class _Worker:
    """A process that trains one case (`train_worker`), and the lines of JSON exchanged with it."""

    def __init__(self, name: str, process: subprocess.Popen[str], log: IO[str]) -> None:
        self.name, self.process, self.log = name, process, log

    def send(self, line: str) -> None:
        """Write a line to the standard input of the process."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the process has ended; the next `read` raises
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def train_round(self) -> dict[str, Any]:
        """Let the process train its next share of the data, and return the figures of that round.

        After the last round it ends the run and returns the figures of the whole run.
        """
        self.send("go")
        return self.read()

    def read(self) -> dict[str, Any]:
        """Return the next JSON line of the process.  Raises `WorkError`, with the end of its log, if it has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)  # type: ignore[no-any-return]
        code = self.process.wait()
        self.log.seek(0)
        raise WorkError(f"bench: {self.name} ended with exit code {code}:\n{self.log.read()[-2000:].strip()}")


@contextlib.contextmanager
def _worker(name: str, recipe: Recipe, rounds: int, folder: Path) -> Iterator[_Worker]:
    """Start the process of a case, and kill it at the end of the context."""
    case_folder = folder / name
    case_folder.mkdir()
    case = CASES[name]
    updated = _write_recipe(recipe, [*ONE_EPOCH, *case.sets, f"output.dir={case_folder / 'run'}"], case_folder)
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


def _write_recipe(recipe: Recipe, sets: list[str], folder: Path) -> Path:
    """Write the recipe, with the overrides `sets`, to a file in `folder`; return its path."""
    from mla_tune.recipe.load import load_recipe

    given, updated = folder / "given.yaml", folder / "recipe.yaml"
    given.write_text(dump(recipe))
    updated.write_text(dump(load_recipe(str(given), sets)))
    return updated


def _check_trl() -> None:
    """Raise `InputError` where TRL is not installed."""
    from importlib.util import find_spec

    if find_spec("trl") is None:
        raise InputError("--cases: TRL is not installed; pip install 'mla-tune[bench]', or leave its cases out")
