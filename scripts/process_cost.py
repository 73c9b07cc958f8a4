"""Wall time and peak memory of one command, its children included."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

#: Seconds between two looks at /proc.
_INTERVAL = 0.01


class Cost(NamedTuple):
    """Seconds of wall time; `peak` and `anonymous` bytes of memory.

    `peak` is VmHWM of the process and of every child seen, added up: pages of mapped files count, as in any resident
    size, and children that do not live at the same time are added all the same.  `anonymous` is the largest sum of
    RssAnon seen at one look: without file pages, and blind to what lives shorter than the interval.  ru_maxrss is not
    used: that of a child begins with its parent's.
    """

    seconds: float
    peak: int
    anonymous: int


def measure(command: Sequence[str], env: Mapping[str, str] | None = None) -> Cost:
    """Run `command`; exits with the end of its output if it fails."""
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
        watch = VersionGuard(process.pid)
        watch.start()
        code = process.wait()
        seconds = time.perf_counter() - began
        watch.stop()
        if code:
            log.seek(0)
            said = log.read().decode(errors="replace")[-2000:]
            sys.exit(f"exit code {code} of: {' '.join(command)[:500]}\n{said}")
    return Cost(seconds, watch.peak, watch.anonymous)


class VersionGuard(threading.Thread):
    """Reads /proc/PID/status of a process tree until it is stopped."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid, self._done = pid, threading.Event()
        self._high: dict[int, int] = {}
        self.anonymous = 0

    @property
    def peak(self) -> int:
        return sum(self._high.values())

    def run(self) -> None:
        while True:
            anonymous = 0
            for pid in _tree(self._pid):
                high, anon = _memory(pid)
                self._high[pid] = max(high, self._high.get(pid, 0))
                anonymous += anon
            self.anonymous = max(self.anonymous, anonymous)
            if self._done.wait(_INTERVAL):
                return

    def stop(self) -> None:
        self._done.set()
        self.join()


def _tree(root: int) -> list[int]:
    """The process and all below it."""
    found = [root]
    for pid in found:
        try:
            for thread in os.listdir(f"/proc/{pid}/task"):
                found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
        except OSError:  # it has ended
            continue
    return found


def _memory(pid: int) -> tuple[int, int]:
    """(VmHWM, RssAnon) in bytes; zeros for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    fields = {name: value for name, _, value in (line.partition(":") for line in lines)}
    high, anonymous = (int(fields[name].split()[0]) * 1024 if name in fields else 0 for name in ("VmHWM", "RssAnon"))
    return high, anonymous
