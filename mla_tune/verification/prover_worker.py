"""The process that proves a merge (see `prover`): `python -m mla_tune.verification.prover_worker`."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, TextIO

from mla_tune.console import hush_imports

#: Seconds between two messages of one stage.
_PAUSE = 0.1


class Pipes:
    """Lines of JSON from and to the process that merges."""

    def __init__(self) -> None:
        # What a library prints must not get in between.
        self._out: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._lock = Lock()
        self._told: dict[str, float] = {}
        self._lines: SimpleQueue[str] = SimpleQueue()
        Thread(target=self._listen, daemon=True).start()

    def next(self) -> dict[str, Any]:
        """The next message of the process that merges; waits for it."""
        return json.loads(self._lines.get())

    def say(self, message: dict[str, Any]) -> None:
        """Send a message to the process that merges."""
        with self._lock:
            print(json.dumps(message), file=self._out, flush=True)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Tell how far a stage is, in bytes; not more than ten times a second."""
        now = time.monotonic()
        if done >= total or now - self._told.get(stage, 0) > _PAUSE:
            self._told[stage] = now
            self.say({"stage": stage, "done": done, "total": total})

    def _listen(self) -> None:
        for line in sys.stdin:
            self._lines.put(line)
        os._exit(1)  # the process that merges has ended


def main() -> None:
    """Read the job, prove what is written, and send the result or the error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the process that merges, and so this one
    hush_imports()
    pipes = Pipes()
    # All that is made now lives as long as the process: looking for what can be freed costs a fifth of the time.
    gc.disable()
    logits = pipes.next()["logits"]
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
        job = pipes.next()
        adapters, options = [(Path(p), weight) for p, weight in job["adapters"]], MergeOptions(**job["options"])
        inputs = open_inputs(adapters, job["base"], Path(job["out"]), options.mtp)
        proof = MergeProof(inputs, options, logits=logits, workers=job["workers"], progress=pipes.progress)
        proof.begin()
        output = pipes.next()
        found = proof.finish(Path(output["folder"]), output["hashed"])
    except MlaTuneError as error:
        if os.environ.get("MLA_TUNE_DEBUG"):
            traceback.print_exc()
        pipes.say({"error": type(error).__name__, "text": str(error)})
    else:
        pipes.say({"result": {"proof": found.proof, "logits": found.logits, "hashes": found.hashes}})
    # Nothing is left to do, and taking a large process apart takes time.
    os._exit(0)


if __name__ == "__main__":
    main()
