"""Report how many bytes of a stage of work are done."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

Progress = Callable[[str, int, int], None]
"""A function to call with the stage ("merge", "absorb", "check", "logits"), the bytes done, and the bytes in all.

Stages may overlap.
"""


def counter(progress: Progress | None, stage: str, total: int) -> Callable[[int], None]:
    """Return a function to call with the number of bytes each time some are done; any thread may call it.

    It adds them up and calls `progress`, unless that is None, with `stage`, their sum so far, and `total`.
    """
    done, lock = 0, Lock()

    def count(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            if progress:
                progress(stage, done, total)

    return count
