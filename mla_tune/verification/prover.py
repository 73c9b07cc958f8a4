"""Where the proof of a merge runs: in this process, or in one of its own beside the merge.

Loading torch, transformers and PEFT takes longer than merging some gigabytes, and the logits of base + adapters need
no merged model: a second process does both while this one merges, which then never loads torch.  Where torch is
loaded already (a notebook, a training script) nothing is to be gained, and the proof runs here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, Protocol

import mla_tune
from mla_tune import errors
from mla_tune.errors import MlaTuneError, WorkError
from mla_tune.progress import Progress
from mla_tune.verification.result import Proven

if TYPE_CHECKING:
    from mla_tune.adapter.merge_options import MergeOptions
    from mla_tune.runs.merge_inputs import MergeInputs

WORKER = "mla_tune.verification.prover_worker"


class Prover(Protocol):
    """`begin` when the inputs are known and `finish` when the output is written; `stop` in any case."""

    #: Whether it computes while the merge runs.
    beside: bool

    def begin(self, inputs: MergeInputs, options: MergeOptions, workers: int, progress: Progress | None) -> None:
        """Raises nothing: what goes wrong is told by `finish`."""
        ...

    def finish(self, folder: Path, hashed: Sequence[str]) -> Proven:
        """`hashed` are files whose sha256 is known.

        Raises `CheckError` for an output that is not what it must be, and what reading it raises.
        """
        ...

    def stop(self) -> None:
        """End the prover, whatever it is doing."""


def start(logits: bool) -> Prover:
    """A prover; one of its own process begins to load what it needs."""
    return _Here(logits) if "torch" in sys.modules else _Beside(logits)


class _Here:
    beside = False

    def __init__(self, logits: bool) -> None:
        self._logits = logits

    def begin(self, inputs: MergeInputs, options: MergeOptions, workers: int, progress: Progress | None) -> None:
        self._job = {"logits": self._logits, "workers": workers, "progress": progress}
        self._inputs = (inputs, options)

    def finish(self, folder: Path, hashed: Sequence[str]) -> Proven:
        from mla_tune.verification.verify import MergeProof

        return MergeProof(*self._inputs, **self._job).finish(folder, hashed)

    def stop(self) -> None:
        pass


class _Beside:
    """Lines of JSON through pipes.  To the worker: whether it will compare logits, the job, the folder; the end of the
    pipe ends it.  From the worker: progress, and then the result or an error."""

    beside = True

    def __init__(self, logits: bool) -> None:
        root = str(Path(mla_tune.__file__).parent.parent)
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        # -P: no module of the folder that the user happens to be in.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
            text=True,
            encoding="utf-8",
        )
        self._progress: Progress | None = None
        self._answer: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._listener = Thread(target=self._listen, daemon=True)
        self._listener.start()
        self._say({"logits": logits})

    def begin(self, inputs: MergeInputs, options: MergeOptions, workers: int, progress: Progress | None) -> None:
        self._progress = progress
        adapters = [
            (str(path), weight) for path, (_, weight) in zip(inputs.paths.adapters, inputs.adapters, strict=True)
        ]
        base, out = str(inputs.paths.base), str(inputs.paths.out)
        self._say({"adapters": adapters, "base": base, "out": out, "options": options.to_json(), "workers": workers})

    def finish(self, folder: Path, hashed: Sequence[str]) -> Proven:
        self._say({"folder": str(folder), "hashed": list(hashed)})
        answer = self._answer.get()
        if answer is None:
            code = self._process.wait()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            short = " (the machine may be short of memory: --no-logits needs less)" if code == -9 else ""
            raise WorkError(f"the process that proves the output {how}{short}; nothing was published")
        if "error" in answer:
            kind = getattr(errors, answer["error"])
            assert issubclass(kind, MlaTuneError)
            raise kind(answer["text"])
        return Proven(**answer["result"])

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._listener.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()

    def _say(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: `finish` tells
            print(json.dumps(message), file=self._process.stdin, flush=True)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            if "stage" not in message:
                self._answer.put(message)
            elif self._progress:
                self._progress(message["stage"], message["done"], message["total"])
        self._answer.put(None)
