"""Which process does a run: a run whose process is gone was killed."""

from __future__ import annotations

import platform

import psutil

from mla_tune.runs.record import ProcessRecord


def this_process() -> ProcessRecord:
    """Return what run.json says of this process."""
    return ProcessRecord(psutil.Process().pid, platform.node(), psutil.Process().create_time())


def is_alive(process: ProcessRecord | None) -> bool | None:
    """Return whether the process still runs; None where that can't be told from this machine."""
    if process is None or process.host != platform.node():
        return None
    try:
        # Another process may have the number by now.
        return abs(psutil.Process(process.pid).create_time() - process.started) < 2
    except psutil.AccessDenied:
        return None
    except psutil.Error:
        return False
