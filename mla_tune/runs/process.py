"""Which process does a run, so that one that was killed is told from one that goes on."""

from __future__ import annotations

import platform
from typing import Any

import psutil


def this_process() -> dict[str, Any]:
    """For run.json: number, machine and start (seconds since 1970) of this process."""
    return {"pid": psutil.Process().pid, "host": platform.node(), "started": psutil.Process().create_time()}


def is_alive(process: Any) -> bool | None:
    """Whether the process that wrote this is still there; None where that can't be told from this machine."""
    try:
        pid, host, started = int(process["pid"]), process["host"], float(process["started"])
    except (KeyError, TypeError, ValueError):
        return None
    if host != platform.node():
        return None
    try:
        # Another process may have the number by now.
        return abs(psutil.Process(pid).create_time() - started) < 2
    except psutil.AccessDenied:
        return None
    except psutil.Error:
        return False
