"""The proof in a second process: the same result as in this one, and what happens when either process ends early."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from mla_tune.adapter.merge_options import MergeOptions
from mla_tune.errors import CheckError, FileError, WorkError
from mla_tune.merge.run import merge_absorb
from mla_tune.runs.merge_inputs import MergeInputs, open_inputs
from mla_tune.verification.prover import InProcessProver, SubprocessProver, start
from tests.helpers.logits import ATTENTION
from tests.helpers.merging import edit_tensors, make_adapter, make_base

KEY = "model.layers.1.self_attn.kv_b_proj.weight"


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, adapter and out in one folder."""
    folder = tmp_path_factory.mktemp("prover")
    make_base(folder / "base")
    make_adapter(folder / "adapter", folder / "base", target_modules=ATTENTION)
    merge_absorb(folder / "adapter", folder / "base", folder / "out", verify=False)
    return folder


@pytest.fixture
def inputs(merged: Path) -> MergeInputs:
    return open_inputs([(merged / "adapter", 1.0)], merged / "base", merged / "out")


@pytest.fixture
def subprocess_prover() -> Iterator[SubprocessProver]:
    prover = SubprocessProver(logits=False)
    yield prover
    prover.stop()


def command(folder: Path, *options: str) -> list[str]:
    places = ["--base", str(folder / "base"), "--out", str(folder / "new"), *options]
    return [str(Path(sys.executable).parent / "mla-tune"), "merge-absorb", str(folder / "adapter"), *places]


def workers_of(pid: int) -> list[psutil.Process]:
    return [p for p in psutil.Process(pid).children() if "mla_tune.verification.prover_worker" in p.cmdline()]


def wait_for(what: Any, seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.02)
    raise AssertionError("it did not happen")


def test_the_proof_runs_in_this_process_where_torch_is_loaded() -> None:
    assert isinstance(start(logits=True), InProcessProver)


@pytest.mark.slow
def test_both_provers_return_the_same(merged: Path, inputs: MergeInputs) -> None:
    in_process = InProcessProver(logits=True)
    in_process.begin(inputs, MergeOptions(), 2, None)
    expected = in_process.finish(merged / "out", [])
    messages: list[tuple[str, int, int]] = []
    subprocess_prover = SubprocessProver(logits=True)
    try:
        subprocess_prover.begin(inputs, MergeOptions(), 2, lambda *message: messages.append(message))
        found = subprocess_prover.finish(merged / "out", [])
    finally:
        subprocess_prover.stop()
    assert found.proof == expected.proof
    assert found.hashes == expected.hashes
    assert found.logits is not None
    assert expected.logits is not None
    assert found.logits["merged"]["max_error"] == pytest.approx(expected.logits["merged"]["max_error"], abs=1e-5)
    assert found.logits["tokens"] == expected.logits["tokens"]
    for stage in ("check", "logits"):
        counts = [(done, total) for name, done, total in messages if name == stage]
        assert counts
        assert counts == sorted(counts)
        assert counts[-1][0] == counts[-1][1]


def test_a_wrong_output_is_an_error_that_names_the_tensor(
    merged: Path, inputs: MergeInputs, subprocess_prover: SubprocessProver, tmp_path: Path
) -> None:
    merge_absorb(merged / "adapter", merged / "base", tmp_path / "out", verify=False)
    edit_tensors(tmp_path / "out" / "model.safetensors", lambda t: t[KEY].mul_(2))
    subprocess_prover.begin(inputs, MergeOptions(), 2, None)
    with pytest.raises(CheckError, match=rf"nothing was published:\n  {KEY}: .* numbers are wrong"):
        subprocess_prover.finish(tmp_path / "out", [])


def test_other_errors_keep_their_class(
    merged: Path, inputs: MergeInputs, subprocess_prover: SubprocessProver, tmp_path: Path
) -> None:
    gone = replace(inputs, paths=replace(inputs.paths, base=tmp_path / "gone"))
    subprocess_prover.begin(gone, MergeOptions(), 2, None)
    with pytest.raises(FileError, match="gone"):
        subprocess_prover.finish(merged / "out", [])


def test_a_worker_that_is_killed(merged: Path, inputs: MergeInputs, subprocess_prover: SubprocessProver) -> None:
    subprocess_prover.begin(inputs, MergeOptions(), 2, None)
    os.kill(subprocess_prover._process.pid, signal.SIGKILL)
    with pytest.raises(WorkError, match=r"was killed by signal 9 .*short of memory.*nothing was published"):
        subprocess_prover.finish(merged / "out", [])


def test_a_worker_that_fails_to_start(
    merged: Path, inputs: MergeInputs, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr("mla_tune.verification.prover.WORKER", "mla_tune.merge.no_such_module")
    subprocess_prover = SubprocessProver(logits=False)
    subprocess_prover.begin(inputs, MergeOptions(), 2, None)
    with pytest.raises(WorkError, match="ended with exit code 1"):
        subprocess_prover.finish(merged / "out", [])
    subprocess_prover.stop()
    assert "no_such_module" in capfd.readouterr().err


def test_the_worker_imports_nothing_from_the_current_folder(
    merged: Path, inputs: MergeInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    subprocess_prover = SubprocessProver(logits=False)
    subprocess_prover.begin(inputs, MergeOptions(), 2, None)
    subprocess_prover.finish(merged / "out", [])
    subprocess_prover.stop()


def test_the_command_proves_in_another_process(merged: Path) -> None:
    """The process that merges never loads torch."""
    code = f"""
import sys
from pathlib import Path
from mla_tune.merge.run import merge_absorb
report = merge_absorb(Path({str(merged / "adapter")!r}), {str(merged / "base")!r}, Path({str(merged / "lib")!r}))
assert report.proof["failed"] == 0 and report.logits["ran"]
assert not {{"torch", "transformers", "peft"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    manifest = json.loads((merged / "lib" / "mla_tune_manifest.json").read_text())
    for name, entry in manifest["files"].items():
        digest = hashlib.sha256((merged / "lib" / name).read_bytes()).hexdigest()
        assert entry["sha256"] == digest, name
    assert "model.safetensors" in manifest["files"]


@pytest.mark.slow
@pytest.mark.parametrize("stop, code", [(signal.SIGINT, 130), (signal.SIGTERM, -15), (signal.SIGKILL, -9)])
def test_no_worker_is_left(merged: Path, stop: signal.Signals, code: int) -> None:
    process = subprocess.Popen(command(merged), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    (worker,) = wait_for(lambda: workers_of(process.pid))
    process.send_signal(stop)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in stderr
    assert ("stopped" in stderr) == (stop == signal.SIGINT)
    wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
    assert not (merged / "new").exists()


@pytest.mark.slow
def test_ctrl_c_reaches_both(merged: Path) -> None:
    """A terminal sends Ctrl-C to both processes; only the one that merges prints `stopped`."""
    process = subprocess.Popen(
        command(merged), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(lambda: workers_of(process.pid))
    time.sleep(1)  # while it imports
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "stopped"
    assert stderr.count("stopped") == 1


def test_a_wrong_input_is_an_error_at_once(merged: Path) -> None:
    """Starting the worker does not delay the error, and the worker prints nothing."""
    began = time.monotonic()
    done = subprocess.run(
        [*command(merged), "--min-retained", "0.5", "--adapter", str(merged / "nowhere")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "nowhere" in done.stderr
    assert time.monotonic() - began < 30


def test_no_worker_for_no_verify(merged: Path, tmp_path: Path) -> None:
    code = f"""
import subprocess
from pathlib import Path
from mla_tune.merge.run import merge_absorb
def popen(*_, **__): raise SystemExit("a process was started")
subprocess.Popen.__init__ = popen
merge_absorb(Path({str(merged / "adapter")!r}), {str(merged / "base")!r}, Path({str(tmp_path / "new")!r}), verify=False)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "new" / "config.json").is_file()
