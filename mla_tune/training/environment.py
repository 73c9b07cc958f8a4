"""Versions of the libraries and the machine of a run, for run.json."""

from __future__ import annotations

import platform
import time
from importlib.metadata import version
from typing import Any

import torch

from mla_tune import __version__

#: Libraries that a run's numbers depend on.
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors")


def environment() -> dict[str, Any]:
    """Return versions, platform, threads of torch, the GPU's name (None without one), and the date (ISO 8601)."""
    return {
        "mla_tune": __version__,
        "python": platform.python_version(),
        **{p: version(p) for p in PACKAGES},
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
