"""Where the proof of a merge runs: in this process, or in a second process while this one merges.

Loading torch, transformers and PEFT takes longer than merging some gigabytes, and the logits of base + adapters don't
need the merged model.  A second process (`prover_worker`) does both while this one merges and never loads torch.  Where
torch is loaded already (a notebook, a training script), a second process would save nothing, and the proof runs here.
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
from mla_tune.verification.result import ProofDocuments

if TYPE_CHECKING:
    from mla_tune.adapter.merge_options import MergeOptions
    from mla_tune.runs.merge_inputs import MergeInputs

WORKER = "mla_tune.verification.prover_worker"


class Prover(Protocol):
    """Proves one merge: call `begin` when the inputs are open, `finish` when the output is written, `stop` always."""

    #: It runs in a process of its own, while the merge runs.
    is_separate_process: bool

    def begin(self, inputs: MergeInputs, options: MergeOptions, workers: int, progress: Progress | None) -> None:
        """Start what needs no output.  Raises nothing: `finish` raises the errors of this step."""
        ...

    def finish(self, folder: Path, hashed: Sequence[str]) -> ProofDocuments:
        """Prove the checkpoint in `folder`; `hashed` are weight files whose sha256 is not needed.

        Raises `CheckError` for an output that is wrong, `WorkError` where the second process ended early, and the
        errors of reading inputs and output.
        """
        ...

    def stop(self) -> None:
        """End the prover, whatever it is doing, and free what it holds."""


def start(logits: bool) -> Prover:
    """Start a prover; if `logits`, it compares logits too.  A second process begins to load torch at once."""
    return InProcessProver(logits) if "torch" in sys.modules else SubprocessProver(logits)


class InProcessProver:
    """Proves in this process, when the merge is done."""

    is_separate_process = False

    def __init__(self, logits: bool) -> None:
        self._logits = logits

    def begin(self, inputs: MergeInputs, options: MergeOptions, workers: int, progress: Progress | None) -> None:
        self._arguments = {"logits": self._logits, "workers": workers, "progress": progress}
        self._inputs = (inputs, options)

    def finish(self, folder: Path, hashed: Sequence[str]) -> ProofDocuments:
        from mla_tune.verification.verify import MergeProof

        return MergeProof(*self._inputs, **self._arguments).finish(folder, hashed)

    def stop(self) -> None:
        pass


class SubprocessProver:
    """Proves in a second process, the worker, which begins while this one merges.

    The two exchange lines of JSON through pipes.  The worker gets three: whether to compare logits, the job, and the
    output folder; it ends when the pipe is closed.  It sends any number of lines with progress, then the result or an
    error.
    """

    is_separate_process = True

    def __init__(self, logits: bool) -> None:
        root = str(Path(mla_tune.__file__).parent.parent)
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        # -P: import no module from the folder that the user is in.
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
        self._receiver = Thread(target=self._receive, daemon=True)
        self._receiver.start()
        self._send({"logits": logits})

    def begin(self, inputs: MergeInputs, options: MergeOptions, workers: int, progress: Progress | None) -> None:
        self._progress = progress
        adapters = [
            (str(path), weight) for path, (_, weight) in zip(inputs.paths.adapters, inputs.adapters, strict=True)
        ]
        base, out = str(inputs.paths.base), str(inputs.paths.out)
        self._send({"adapters": adapters, "base": base, "out": out, "options": options.to_json(), "workers": workers})

    def finish(self, folder: Path, hashed: Sequence[str]) -> ProofDocuments:
        self._send({"folder": str(folder), "hashed": list(hashed)})
        answer = self._answer.get()
        if answer is None:
            code = self._process.wait()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            advice = " (the machine may be short of memory: --no-logits needs less)" if code == -9 else ""
            raise WorkError(f"the process that proves the output {how}{advice}; nothing was published")
        if "error" in answer:
            error_class = getattr(errors, answer["error"])
            assert issubclass(error_class, MlaTuneError)
            raise error_class(answer["text"])
        return ProofDocuments(**answer["result"])

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._receiver.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the worker has ended: `finish` raises an error
            print(json.dumps(message), file=self._process.stdin, flush=True)

    def _receive(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            if "stage" not in message:
                self._answer.put(message)
            elif self._progress:
                self._progress(message["stage"], message["done"], message["total"])
        self._answer.put(None)
