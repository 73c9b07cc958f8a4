"""`train.compile` with PEFT, experts and each kind of checkpointing: the losses of a run that is not compiled."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

STEPS = 3


def losses(cli: Any, data: Path, out: Path, *sets: str) -> list[float]:
    keys = ["model.preset=tiny", "model.base=null", f"data.path={data}", "data.eval_fraction=0", "train.batch_size=2"]
    keys += [f"train.max_steps={STEPS}", "train.max_length=64", "output.samples=0", *sets]
    options = [x for k in keys for x in ("--set", k)]
    done = cli("train", "--recipe", "all-linear", "--output", str(out), *options)
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"say {i}", "completion": f"{i} " * (1 + i % 5)} for i in range(24)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "sets, backend",
    [
        # The whole way through the compiler's C++, once; where graphs break and are made anew is the same without it.
        (["adapter.targets=safe", "model.attention=packed"], "inductor"),
        (["adapter.experts=true", "adapter.targets=safe", "train.activation_checkpointing=mla"], "aot_eager"),
        (["adapter.experts=true", "adapter.targets=safe", "train.activation_checkpointing=full"], "aot_eager"),
    ],
    ids=["safe", "mla", "full"],
)
def test_a_compiled_run_has_the_losses_of_one_that_is_not(
    cli: Any, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, sets: list[str], backend: str
) -> None:
    wanted = losses(cli, data, tmp_path / "plain", *sets)
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    # Reaching the limit of recompilations means that a layer runs uncompiled from there on.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        found = losses(cli, data, tmp_path / "compiled", *sets, "train.compile=true")
    assert found == pytest.approx(wanted, rel=1e-5)
    assert counters["frames"]["ok"] > 0
