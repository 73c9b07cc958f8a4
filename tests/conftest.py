from __future__ import annotations

import os
import tempfile

# The tests' models are tiny: one thread is fastest, and several test processes don't fight for cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["MLA_TUNE_CACHE"] = tempfile.mkdtemp(prefix="mla-tune-cache-")  # never the real one

import atexit
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.marks import mark_cases
from tests.helpers.runs import WORDS

atexit.register(shutil.rmtree, os.environ["MLA_TUNE_CACHE"], ignore_errors=True)


@pytest.hookimpl(tryfirst=True)  # before `-m` takes its choice
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what `fast_cases` leaves to the slow set, and skip what needs a GPU where there is none."""
    mark_cases(items, complete=not any("::" in argument for argument in config.args))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="needs a GPU that CUDA can use; torch sees none here"))


@dataclass
class CliResult:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., CliResult]:
    """Run `mla-tune ARGS` in this process, with its real entry point."""

    def run(*args: str) -> CliResult:
        from mla_tune.cli.app import main

        monkeypatch.setattr(sys, "argv", ["mla-tune", *map(str, args)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return CliResult(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 short prompts with completions."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": f"Say {w} twice.", "completion": f"{w} {w}"} for w in WORDS * 3]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path
