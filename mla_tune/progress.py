"""How far a stage of the work is."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

#: Told the stage ("merge", "absorb", "check", "logits"), the bytes done and the bytes in all.  Stages may overlap.
Progress = Callable[[str, int, int], None]


def counter(progress: Progress | None, stage: str, total: int) -> Callable[[int], None]:
    """A function that is told bytes as they are done, by any thread."""
    done, lock = 0, Lock()

    def count(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            if progress:
                progress(stage, done, total)

    return count
