"""The second process that proves a merge: `python -m mla_tune.verification.prover_worker`, started by `prover`."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, TextIO

from mla_tune.console import hush_imports

#: Seconds between two messages on the progress of one stage.
_PROGRESS_INTERVAL = 0.1


class Pipes:
    """Lines of JSON from and to the process that merges, through standard input and output."""

    def __init__(self) -> None:
        # What libraries print must not stand between the messages: it goes to standard error.
        self._out: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._lock = Lock()
        self._last_sent: dict[str, float] = {}
        self._lines: SimpleQueue[str] = SimpleQueue()
        Thread(target=self._receive_lines, daemon=True).start()

    def receive(self) -> dict[str, Any]:
        """Wait for the next message of the process that merges, and return it."""
        return json.loads(self._lines.get())

    def send(self, message: dict[str, Any]) -> None:
        """Send a message to the process that merges."""
        with self._lock:
            print(json.dumps(message), file=self._out, flush=True)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Send how many bytes of a stage are done; at most ten times a second, and when all are done."""
        now = time.monotonic()
        if done >= total or now - self._last_sent.get(stage, 0) > _PROGRESS_INTERVAL:
            self._last_sent[stage] = now
            self.send({"stage": stage, "done": done, "total": total})

    def _receive_lines(self) -> None:
        for line in sys.stdin:
            self._lines.put(line)
        os._exit(1)  # the process that merges has ended


def main() -> None:
    """Read the job, prove what is written, and send the result or the error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the process that merges, which ends this one
    hush_imports()
    pipes = Pipes()
    # What imports create lives as long as the process: looking for garbage in it costs a fifth of the time.
    gc.disable()
    logits = pipes.receive()["logits"]
    from mla_tune.verification.verify import MergeProof

    if logits:
        import mla_tune.verification.logits.absorbed_reference
        import mla_tune.verification.logits.compare
        import mla_tune.verification.logits.peft_reference  # noqa: F401
    gc.freeze()
    gc.enable()
    from mla_tune.adapter.merge_options import MergeOptions
    from mla_tune.errors import MlaTuneError
    from mla_tune.runs.merge_inputs import open_inputs

    try:
        job = pipes.receive()
        adapters, options = [(Path(p), weight) for p, weight in job["adapters"]], MergeOptions(**job["options"])
        inputs = open_inputs(adapters, job["base"], Path(job["out"]), options.mtp)
        proof = MergeProof(inputs, options, logits=logits, workers=job["workers"], progress=pipes.progress)
        proof.begin()
        output = pipes.receive()
        documents = proof.finish(Path(output["folder"]), output["hashed"])
    except MlaTuneError as error:
        if os.environ.get("MLA_TUNE_DEBUG"):
            traceback.print_exc()
        pipes.send({"error": type(error).__name__, "text": str(error)})
    else:
        pipes.send({"result": asdict(documents)})
    # Exit at once: freeing the objects of a large process takes time.
    os._exit(0)


if __name__ == "__main__":
    main()
