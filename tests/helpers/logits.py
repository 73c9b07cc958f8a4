"""What the tests of the comparison of logits share: merges, the call, and figures from whole models, in numpy."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from mla_tune.adapter.files import open_adapter
from mla_tune.adapter.merge_options import MergeOptions
from mla_tune.arch.build import architecture
from mla_tune.checkpoint.absorbed import absorbed_tensors
from mla_tune.checkpoint.index import Checkpoint
from mla_tune.merge.run import merge_absorb
from mla_tune.verification.logits.compare import LogitsComparison
from mla_tune.verification.logits.differences import LogitsDifference, LogitsReport
from tests.helpers.merging import load

ATTENTION = ["q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
WEIGHTS = "model.safetensors"
#: Of a logit, relative to the largest: float32 sums of some hundred numbers in another order, through some layers.
TOLERANCE = 1e-5


def targets(family: str) -> dict[str, Any]:
    experts = [] if family == "minicpm3" else EXPERTS
    return {"target_modules": ATTENTION, "target_parameters": experts}


def merge(folder: Path, adapters: Any, absorb: str = "none", **options: Any) -> Checkpoint:
    merge_absorb(
        adapters, folder / "base", folder / "out", options=MergeOptions(absorb=absorb, **options), verify=False
    )
    return Checkpoint.open(folder / "out")


def run(
    folder: Path, adapters: Path | Sequence[tuple[Path, float]], merged: Checkpoint, **settings: Any
) -> LogitsReport:
    base = Checkpoint.open(folder / "base")
    absorbed = absorbed_tensors(merged.folder)
    mode = "none" if not absorbed else "fold" if any(k.endswith("W_QK") for k in absorbed) else "split"
    pairs = [(adapters, 1.0)] if isinstance(adapters, Path) else adapters
    arch = architecture(base.config)
    opened = [(open_adapter(folder, arch, base.tensors), weight) for folder, weight in pairs]
    return LogitsComparison(base, arch, opened, mode, **settings).compare(merged, absorbed)


def tokens(seed: int = 0, count: int = 16, vocabulary: int = 97) -> torch.Tensor:
    return torch.randint(0, vocabulary, (1, count), generator=torch.Generator().manual_seed(seed))


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(tokens(), use_cache=False).logits[0].double().numpy()


def adapted(base: Path, adapter: Path) -> np.ndarray:
    return logits(PeftModel.from_pretrained(load(base, "float32"), adapter).eval())


def figures(p: np.ndarray, q: np.ndarray) -> tuple[float, float, float]:
    """(largest difference, KL in nats, share of equal best tokens), from logits (tokens, vocabulary)."""
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (p, q))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()
    return np.abs(p - q).max(), kl, float((p.argmax(1) == q.argmax(1)).mean())


def check(comparison: LogitsDifference | None, p: np.ndarray, q: np.ndarray) -> None:
    """The comparison is that of these logits."""
    assert comparison is not None
    scale = np.abs(p).max()
    error, kl, top1 = figures(p, q)
    assert comparison.largest == pytest.approx(scale, rel=TOLERANCE)
    assert comparison.max_error == pytest.approx(error, abs=2 * TOLERANCE * scale)
    assert comparison.kl == pytest.approx(kl, rel=1e-3, abs=1e-8)
    assert comparison.top1 == pytest.approx(top1)


def exact(comparison: LogitsDifference | None) -> None:
    """Nothing but float32 rounding lies between the two."""
    assert comparison is not None
    assert comparison.max_error <= TOLERANCE * comparison.largest
    assert comparison.kl < 1e-9


def wrong(comparison: LogitsDifference | None) -> None:
    """Far from what rounding explains."""
    assert comparison is not None
    assert comparison.max_error > 1000 * TOLERANCE * comparison.largest
    assert comparison.kl > 1e-6


def without_absorbed(folder: Path) -> Path:
    """A copy of a merged checkpoint without its absorbed tensors."""
    bare = folder.parent / f"{folder.name}-bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("absorbed*"))
    return bare
