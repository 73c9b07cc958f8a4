"""The base model that belongs to an adapter: as its run recorded it, or as adapter_config.json names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mla_tune.errors import FileError
from mla_tune.runs.merge_inputs import find_paths


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with an adapter that names the base `named`; `recorded` is there for run.json to name."""
    for name in ("adapter", "named", "recorded"):
        (tmp_path / name).mkdir()
    config = {"base_model_name_or_path": str(tmp_path / "named")}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path


def test_run_json_wins_over_adapter_config_json(run: Path) -> None:
    assert find_paths([run], None, None).base == run / "named"
    (run / "run.json").write_text(json.dumps({"base_path": str(run / "recorded")}))
    assert find_paths([run], None, None).base == run / "recorded"
    (run / "run.json").write_text(json.dumps({"base_path": None}))
    assert find_paths([run], None, None).base == run / "named"


def test_a_run_record_of_the_wrong_type_is_refused_unless_the_base_is_given(run: Path) -> None:
    (run / "run.json").write_text(json.dumps({"base_path": 5}))
    with pytest.raises(FileError, match=r"run\.json: base_path holds '5', so this is no record of mla-tune train"):
        find_paths([run], None, None)
    assert find_paths([run], run / "recorded", None).base == run / "recorded"
