"""Memory of a run: how much it takes, and what to lower where it is too much."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from mla_tune.errors import WorkError
from mla_tune.recipe.schema import Recipe
from mla_tune.runs.record import MemoryUse


def memory_now() -> int:
    """Return the resident bytes of this process."""
    return psutil.Process().memory_info().rss


def memory_peak() -> int:
    """Return the highest resident bytes of this process so far.

    Not from getrusage on Linux, whose figure includes the memory of the parent process at the fork.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_report(device: torch.device, start: int) -> MemoryUse:
    """Return the peaks so far; `start` are the resident bytes before the model was loaded."""
    peak = memory_peak()
    gpu_peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return MemoryUse(peak, start, peak - start, gpu_peak)


@contextlib.contextmanager
def memory_advice(recipe: Recipe) -> Iterator[None]:
    """Within this context, running out of memory raises a `WorkError` that says what to lower in the recipe."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, MemoryError) and "out of memory" not in text and "not enough memory" not in text:
            raise
        raise WorkError(_advice(recipe, "GPU" if "CUDA" in text else "CPU")) from error


def _advice(recipe: Recipe, where: str) -> str:
    t = recipe.train
    lower = [f"train.max_length (now {t.max_length})"]
    if t.batch_size > 1:
        lower.insert(
            0,
            f"train.batch_size (now {t.batch_size}; raise train.gradient_accumulation_steps to keep the global batch)",
        )
    if t.activation_checkpointing == "none":
        lower.append("or set train.activation_checkpointing: full")
    if recipe.model.dtype in ("auto", "float32"):
        lower.append("or model.dtype: bfloat16")
    return f"out of {where} memory: lower {', '.join(lower)}. `mla-tune plan` estimates what is needed"
