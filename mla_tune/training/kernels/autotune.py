"""Choose the attention and the implementation of the routed experts by measurement, where the recipe says `auto`.

Candidates are timed, forward and backward, with the shapes, dtype and device of the run.  The result is stored for this
machine in `choices.json` ($MLA_TUNE_CACHE, else ~/.cache/mla-tune), so that a later run of the same recipe uses the
same kernels and gives the same bits.  MLA's heads have two sizes (keys P+R, values V), which some fused kernels
support, some support after padding, and some refuse: a candidate that fails is left out, and the log says why.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.atomic_files import write_json
from mla_tune.training.kernels import packed_attention as packed

#: Attention functions that take a batch as one row and the borders of its samples; others take rows and a mask.
PADDING_FREE = (packed.NAME, "flash_attention_2", "flash_attention_3")
#: Number of timings of each candidate; their median counts.
ROUNDS = 3
#: Number of tokens with which the experts are timed: enough to tell the implementations apart.
TOKENS = 2048
#: Candidates for the experts.  batched_mm is not one: it copies a weight for each token (8 M parameters: 17.5 GB).
EXPERTS = ("grouped_mm", "eager")


@dataclass(frozen=True, slots=True)
class AutotuneResult:
    """The fastest candidate, and the timings of all."""

    what: str
    """What the candidates compute: `attention` or `experts`."""
    name: str
    """The fastest candidate."""
    tried: dict[str, float | str]
    """Candidate → milliseconds, forward and backward; for one that failed, the reason."""
    remembered: bool = False
    """Whether an earlier run measured them."""

    def line(self) -> str:
        """Return a line for the log."""
        found = ", ".join(f"{n} {t:.1f} ms" if isinstance(t, float) else f"{n}: {t}" for n, t in self.tried.items())
        return f"{self.what}: {self.name} ({found}{', measured earlier' if self.remembered else ''})"


def autotune_attention(
    arch: Architecture, rows: list[list[int]], device: torch.device, dtype: torch.dtype
) -> AutotuneResult:
    """Find the fastest attention for a batch; `rows` has for each of its rows the lengths of the row's samples."""
    packed.register()
    names = [packed.NAME, "sdpa"]
    if device.type == "cuda":
        names += ["flash_attention_2"] * is_flash_attn_2_available() + [
            "flash_attention_3"
        ] * is_flash_attn_3_available()
    d, scale = arch.dims, (arch.dims.P + arch.dims.R) ** -0.5
    lengths = [n for row in rows for n in row]
    width = max(sum(row) for row in rows)

    def prepare(name: str) -> Callable[[], None]:
        B, T = (len(rows), width) if name not in PADDING_FREE else (1, sum(lengths))
        generator = torch.Generator().manual_seed(0)
        sizes = (d.P + d.R, d.P + d.R, d.V)
        states = [torch.randn(B, d.H, T, n, generator=generator).to(device, dtype).requires_grad_() for n in sizes]
        mask, borders = None, {}
        if name in PADDING_FREE:
            ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
            borders = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
            borders |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        else:
            mask = torch.stack([_block_diagonal(row, T) for row in rows])[:, None].to(device)
        call = ALL_ATTENTION_FUNCTIONS[name]
        module = _AttentionStub()

        def run() -> None:
            call(module, *states, mask, scaling=scale, dropout=0.0, **borders)[0].sum().backward()

        return run

    key = [arch.model_type, d.H, d.P, d.R, d.V, str(dtype), len(rows), _rounded(width), _rounded(len(lengths))]
    return _fastest("attention", names, prepare, key, device)


def _block_diagonal(row: list[int], width: int) -> torch.Tensor:
    """Return a mask (width, width) that is true where a query attends: at its own and earlier tokens of its sample.

    `row` has the lengths of the samples; the rest of the width is padding.
    """
    lengths = [*row, width - sum(row)]
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return (sample[:, None] == sample[None]) & torch.ones(width, width, dtype=torch.bool).tril()


def autotune_experts(model: Any, arch: Architecture, names: tuple[str, ...], device: torch.device) -> AutotuneResult:
    """Find the fastest of the implementations `names` of the routed experts, on the model's first expert layer."""
    module = next(m for m in model.modules() if hasattr(m, "gate_up_proj") and hasattr(m, "down_proj"))
    weight = module.gate_up_proj
    trained = [p for p in module.parameters() if p.requires_grad]
    E, D, k = weight.shape[0], weight.shape[2], arch.experts_per_token

    def prepare(name: str) -> Callable[[], None]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(TOKENS, D, generator=generator).to(device, weight.dtype).requires_grad_()
        index = torch.rand(TOKENS, E, generator=generator).topk(k).indices.to(device)
        share = torch.full((TOKENS, k), 1 / k, device=device, dtype=weight.dtype)

        def run() -> None:
            before = module.config._experts_implementation
            module.config._experts_implementation = name
            try:
                torch.autograd.grad(module(x, index, share).sum(), [x, *trained])
            finally:
                module.config._experts_implementation = before

        return run

    key = [arch.model_type, *weight.shape, k, str(weight.dtype)]
    return _fastest("experts", list(names), prepare, key, device)


class _AttentionStub(torch.nn.Module):
    """Has the attributes of an attention module that attention functions read."""

    num_key_value_groups = 1
    is_causal = True
    layer_idx = 0


def _rounded(count: int) -> int:
    """Round up to a power of two, so that batches of about one size share a result."""
    return 1 << max(0, count - 1).bit_length()


def _fastest(
    what: str, names: list[str], prepare: Callable[[str], Callable[[], None]], key: list[Any], device: torch.device
) -> AutotuneResult:
    """Time the candidates `names` in turn, or return what an earlier run on this machine measured under `key`.

    `prepare(name)` returns a function that runs the candidate once, forward and backward.
    """
    if len(names) == 1:
        return AutotuneResult(what, names[0], {})
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {torch.get_num_threads()}"
    digest = hashlib.sha256(json.dumps([what, names, key, machine, torch.__version__]).encode()).hexdigest()[:16]
    stored = _read_results()
    if digest in stored:
        return AutotuneResult(what, stored[digest]["name"], stored[digest]["tried"], remembered=True)
    tried: dict[str, float | str] = {}
    runs: dict[str, Callable[[], None]] = {}
    for name in names:
        try:
            run = prepare(name)
            run()
            runs[name] = run
        except Exception as error:  # kernels refuse sizes with errors of any class
            tried[name] = (str(error).strip() or type(error).__name__).splitlines()[0][:80]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            times[name].append(_milliseconds(run, device))
    tried |= {name: round(statistics.median(t), 3) for name, t in times.items()}
    best = min(runs, key=lambda name: tried[name], default=names[0])
    _write_results({**stored, digest: {"what": what, "name": best, "tried": tried}})
    return AutotuneResult(what, best, tried)


def _milliseconds(run: Callable[[], None], device: torch.device) -> float:
    """Milliseconds that one call takes, on a GPU until its kernels have ended."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - began)


def _results_file() -> Path:
    root = os.environ.get("MLA_TUNE_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mla-tune"
    return (Path(root) if root else base) / "choices.json"


def _read_results() -> dict[str, Any]:
    """The stored results of all runs; empty where the file is missing or damaged."""
    try:
        found = json.loads(_results_file().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_results(results: dict[str, Any]) -> None:
    """Store the results of all runs.  Where they can't be written, the next run measures again."""
    with contextlib.suppress(OSError):
        _results_file().parent.mkdir(parents=True, exist_ok=True)
        write_json(_results_file(), results)
