"""run.json as `RunRecord`: written and read without loss; what is wrong with a damaged one is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mla_tune.errors import FileError
from mla_tune.runs.record import (
    HeldOutLoss,
    MemoryUse,
    ProcessRecord,
    RunRecord,
    SampleAnswer,
    Samples,
    SpikeCounts,
    Steps,
    TrainedParameters,
)

FULL = RunRecord(
    state="done",
    process=ProcessRecord(7, "host", 1.5),
    base="some/model",
    base_hash={"kind": "files", "sha256": "ab"},
    data={"source": "rows", "train": {"rows": 3}},
    seed=0,
    environment={"date": "2026-11-01T10:00:00+0000", "gpu": None, "threads": 2},
    kernels={"attention": "sdpa"},
    adapter=TrainedParameters("lora", {"W_O": 4}, {"W_O": 8}, {"W_O": 64}, {"lm_head": 9}, 73, {"W_O": 1e-4}),
    steps=Steps(3, 5),
    samples=Samples({"before": 0.5}, [SampleAnswer("prompt", before="answer")]),
    held_out_loss=HeldOutLoss(2.0, 1.0),
    spikes=SpikeCounts(1, 0),
    memory=MemoryUse(3, 2, 1),
)


@pytest.mark.parametrize("record", [FULL, RunRecord(), RunRecord(state="failed", error="no room")])
def test_what_is_written_is_read(tmp_path: Path, record: RunRecord) -> None:
    record.write(tmp_path / "run.json")
    assert RunRecord.read(tmp_path / "run.json") == record
    assert json.loads((tmp_path / "run.json").read_text()) == record.to_json()


def test_what_is_missing_is_unknown_and_other_keys_are_left_out() -> None:
    found = RunRecord.from_json({"base_path": "/base", "color": "blue", "steps": {"done": 2, "of": 3}}, "run.json")
    assert found == RunRecord(base_path="/base", steps=Steps(2))
    assert found.state == "unknown"


def test_a_whole_number_is_a_number_of_seconds() -> None:
    assert RunRecord.from_json({"seconds": 3, "held_out_loss": {"before": 2}}, "x") == RunRecord(
        seconds=3.0, held_out_loss=HeldOutLoss(2.0)
    )


@pytest.mark.parametrize(
    "key, document",
    [
        ("state", {"state": 1}),
        ("state", {"state": None}),
        ("seed", {"seed": True}),
        ("seed", {"seed": 1.5}),
        ("base_hash", {"base_hash": "ab"}),
        ("base_hash.kind", {"base_hash": {"kind": 3}}),
        ("adapter", {"adapter": [1]}),
        ("adapter.matrices.W_O", {"adapter": {"matrices": {"W_O": "4"}}}),
        ("steps.done", {"steps": {"done": "x"}}),
        ("steps", {"steps": None}),
        ("process.host", {"process": {"pid": 3, "started": 1.0}}),
        ("samples.answers.1.prompt", {"samples": {"answers": [{"prompt": "a"}, {}]}}),
    ],
)
def test_a_value_of_another_type_is_named_with_its_file(tmp_path: Path, key: str, document: dict[str, Any]) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(document))
    with pytest.raises(FileError) as error:
        RunRecord.read(file)
    assert str(error.value).startswith(f"{file}: {key} ")
