"""Merges killed, resumed, started twice, or whose inputs change: the output is whole, the same bytes, or absent."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

import mla_tune.merge.execute as execute_module
from mla_tune.adapter.merge_options import MergeOptions
from mla_tune.errors import CheckError, FileError, WorkError
from mla_tune.merge.apply import Merger
from mla_tune.merge.export import check_output
from mla_tune.merge.run import merge_absorb
from tests.helpers.merging import edit_tensors, make_adapter, make_base

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
QUICK: dict[str, Any] = {"verify": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("resume") / "base", shard="30KB")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "adapter"
    return make_adapter(folder, base, target_modules=["kv_b_proj", "o_proj"], target_parameters=EXPERTS)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file; the report and the manifest name their folder, so they are compared without it."""
    result = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = file.read_bytes().replace(str(folder.absolute()).encode(), b"OUT")
        result[file.relative_to(folder).as_posix()] = hashlib.sha256(data).hexdigest()
    return result


def inputs_digest(*folders: Path) -> dict[str, str]:
    return {f"{f}/{name}": digest for f in folders for name, digest in digests(f).items()}


def command(base: Path, adapter: Path, out: Path) -> list[str]:
    arguments = [str(adapter), "--base", str(base), "--out", str(out), "--no-verify", "--no-link"]
    code = "import sys; from mla_tune.cli.app import main; main()"
    return [sys.executable, "-c", code, "merge-absorb", *arguments]


@pytest.mark.slow
def test_killed_at_thirty_random_moments_ends_in_the_same_bytes(base: Path, adapter: Path, tmp_path: Path) -> None:
    before = inputs_digest(base, adapter)
    began = time.monotonic()
    subprocess.run(command(base, adapter, tmp_path / "whole"), check=True, capture_output=True)
    whole, expected = time.monotonic() - began, digests(tmp_path / "whole")
    rng = random.Random(5)
    interrupted = resumed = 0
    for i in range(30):
        out = tmp_path / f"out{i}"
        # The first part of the run is imports, where a kill proves little; the folder shows when the work begins.
        process = subprocess.Popen(command(base, adapter, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while process.poll() is None and not (tmp_path / f".out{i}.partial").exists() and not out.exists():
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, whole / 3))
        process.send_signal(signal.SIGKILL)
        killed = process.wait() == -signal.SIGKILL
        process.communicate()
        assert killed or out.exists()
        again = None
        if not out.exists():
            interrupted += 1
            again = subprocess.run(command(base, adapter, out), capture_output=True, text=True)
            assert again.returncode == 0, again.stderr
            resumed += "going on" in again.stderr
        assert digests(out) == expected, f"run {i}"
        # A kill after the last rename may leave the lock's empty file, which nobody holds.
        beside = {p.name for p in tmp_path.iterdir() if p.name.startswith(f".out{i}.")}
        assert beside <= (set() if again else {f".out{i}.lock"}), "something was left beside"
        shutil.rmtree(out)
    assert inputs_digest(base, adapter) == before
    assert interrupted >= 5, "the kills came too late: the test would prove nothing"
    assert resumed >= 1


@pytest.mark.parametrize("after", [0, 1, 3])
def test_what_is_finished_is_not_written_again(
    after: int, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_absorb(adapter, base, tmp_path / "whole", **QUICK)
    stop_after(after, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        merge_absorb(adapter, base, tmp_path / "out", workers=1, **QUICK)
    assert not (tmp_path / "out").exists()
    partial = tmp_path / ".out.partial"
    finished = {json.loads(line)["shard"] for line in (partial / "finished.jsonl").read_text().splitlines()}
    times = {name: (partial / name).stat().st_mtime_ns for name in finished}
    assert len(finished) >= after
    monkeypatch.undo()
    notes: list[str] = []
    merge_absorb(adapter, base, tmp_path / "out", note=notes.append, **QUICK)
    assert notes[0].startswith(f"going on from an earlier run: {len(finished)} of ")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished} == times
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def stop_after(shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt when so many shards have been committed."""
    original = execute_module.ShardWriter.commit
    count = 0

    def commit(self: Any) -> None:
        nonlocal count
        if count == shards:
            raise KeyboardInterrupt
        count += 1
        original(self)

    monkeypatch.setattr(execute_module.ShardWriter, "commit", commit)


@pytest.mark.parametrize("what", ["adapter", "weight", "options", "base", "journal"])
def test_other_inputs_begin_anew_and_say_so(
    what: str, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_base, own_adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(base, own_base)
    shutil.copytree(adapter, own_adapter)
    out = tmp_path / "out"
    stop_after(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        merge_absorb(own_adapter, own_base, out, **QUICK)
    monkeypatch.undo()
    adapters, options, said = [(own_adapter, 1.0)], MergeOptions(), "beginning anew"
    if what == "adapter":
        edit_tensors(own_adapter / "adapter_model.safetensors", lambda t: next(iter(t.values())).mul_(2))
        said = "an unfinished merge of another adapter"
    elif what == "weight":
        adapters, said = [(own_adapter, 0.5)], "another adapter"
    elif what == "options":
        options, said = MergeOptions(dtype="bfloat16"), "other options"
    elif what == "base":
        shard = next(p for p in sorted(own_base.glob("*.safetensors")) if b"kv_b_proj" in p.read_bytes()[:4000])
        edit_tensors(shard, lambda t: next(iter(t.values())).mul_(2))
        said = "another base"
    else:
        (tmp_path / ".out.partial" / "state.json").write_text("{")
    notes: list[str] = []
    merge_absorb(adapters, own_base, out, options=options, note=notes.append, **QUICK)
    assert said in notes[0]
    assert "beginning anew" in notes[0]
    merge_absorb(adapters, own_base, tmp_path / "fresh", options=options, **QUICK)
    shards = {n: d for n, d in digests(out).items() if n.endswith(".safetensors")}
    assert shards == {n: d for n, d in digests(tmp_path / "fresh").items() if n.endswith(".safetensors")}


def test_a_journal_line_cut_by_a_kill_and_a_short_file_are_not_trusted(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_absorb(adapter, base, tmp_path / "whole", **QUICK)
    stop_after(4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        merge_absorb(adapter, base, tmp_path / "out", **QUICK)
    monkeypatch.undo()
    partial = tmp_path / ".out.partial"
    journal = partial / "finished.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
    first = partial / json.loads(lines[0])["shard"]
    first.unlink()  # it may be a hard link: never write through it
    first.write_bytes(b"short")
    (partial / ".model-00009-of-00099.safetensors.partial").write_bytes(b"half")
    merge_absorb(adapter, base, tmp_path / "out", **QUICK)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_second_merge_into_the_same_folder_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".out.lock"), pytest.raises(FileError, match="another merge is writing there"):
        merge_absorb(adapter, base, tmp_path / "out", **QUICK)
    merge_absorb(adapter, base, tmp_path / "out", **QUICK)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_another_merge_renames_meanwhile_takes_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listed, then gone: as a report that is written beside its place."""
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: iter([self / ".merge_report.json.partial-1"]))
    check_output(tmp_path / "out", False, (), 1)


@pytest.mark.slow
def test_two_processes_at_once(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Whoever comes second is refused by name, whatever the first one is doing, and one whole output is there."""
    runs = [subprocess.Popen(command(base, adapter, tmp_path / "out"), stderr=subprocess.PIPE) for _ in range(3)]
    errors = [(run.wait(), run.communicate()[1].decode()) for run in runs]
    assert [code for code, _ in errors].count(0) == 1, errors
    for code, text in errors:
        assert code == 0 or (code == 2 and ("another merge" in text or "is not empty" in text)), text
    merge_absorb(adapter, base, tmp_path / "whole", options=MergeOptions(link=False), **QUICK)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_another_merge_finishes_before_the_lock_is_taken(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its output is not replaced unasked."""
    out, calls = tmp_path / "out", []

    def check(*args: Any) -> None:
        check_output(*args)
        if not calls:
            out.mkdir()
            (out / "config.json").write_text("of the other one")
        calls.append(args)

    monkeypatch.setattr("mla_tune.merge.run.check_output", check)
    with pytest.raises(FileError, match="is not empty"):
        merge_absorb(adapter, base, out, **QUICK)
    assert [(p.name, p.read_text()) for p in out.iterdir()] == [("config.json", "of the other one")]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_base_that_changes_during_the_run(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "base"
    shutil.copytree(base, own)
    original = Merger.compute

    def compute(self: Merger, piece: Any) -> Any:
        file = piece.out.source.file
        stat = file.stat()
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
        return original(self, piece)

    monkeypatch.setattr(Merger, "compute", compute)
    with pytest.raises(FileError, match="changed while it was in use"):
        merge_absorb(adapter, own, tmp_path / "out", **QUICK)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_an_adapter_that_changes_during_the_run(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "adapter"
    shutil.copytree(adapter, own)
    monkeypatch.setattr("mla_tune.merge.run.copy_auxiliary_files", lambda *_: (touch(own), ([], []))[1])
    with pytest.raises(FileError, match=r"adapter_model\.safetensors: changed while"):
        merge_absorb(own, base, tmp_path / "out", **QUICK)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]


def touch(folder: Path) -> None:
    os.utime(folder / "adapter_model.safetensors", (1, 1))


def test_a_full_disk_while_writing_keeps_what_is_finished(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, count = execute_module.ShardWriter.write, 0

    def write(self: Any, *arguments: Any) -> None:
        nonlocal count
        count += 1
        if count > 20:
            raise OSError(28, "No space left on device")
        original(self, *arguments)

    monkeypatch.setattr(execute_module.ShardWriter, "write", write)
    before = inputs_digest(base, adapter)
    with pytest.raises(WorkError, match="the disk is full; nothing was published") as caught:
        merge_absorb(adapter, base, tmp_path / "out", **QUICK)
    assert ".out.partial" in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert inputs_digest(base, adapter) == before
    monkeypatch.undo()
    merge_absorb(adapter, base, tmp_path / "out", **QUICK)
    merge_absorb(adapter, base, tmp_path / "whole", **QUICK)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_what_is_finished_counts_as_room_on_the_disk(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(8, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        merge_absorb(adapter, base, tmp_path / "out", options=MergeOptions(link=False), **QUICK)
    monkeypatch.undo()
    written = sum(p.stat().st_size for p in (tmp_path / ".out.partial").glob("*.safetensors"))
    whole = sum(p.stat().st_size for p in base.glob("*.safetensors"))
    assert 0 < written < whole
    usage = type("usage", (), {"free": whole - written + 20_000})  # room for the absorbed tensors too
    monkeypatch.setattr("mla_tune.merge.export.shutil.disk_usage", lambda _: usage)
    with pytest.raises(FileError, match="GB are free there"):
        merge_absorb(adapter, base, tmp_path / "other", options=MergeOptions(link=False), **QUICK)
    merge_absorb(adapter, base, tmp_path / "out", options=MergeOptions(link=False), **QUICK)


def test_min_retained_stops_before_anything_is_published(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype="bfloat16", shard="30KB")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["kv_b_proj", "o_proj"])

    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        for key, tensor in tensors.items():
            if "kv_b_proj.lora_B" in key:
                tensor.mul_(1e-5)

    edit_tensors(adapter / "adapter_model.safetensors", shrink)
    with pytest.raises(CheckError, match=r"--min-retained 0\.9: .*\n  model\.layers\.\d\.self_attn\.kv_b_proj"):
        merge_absorb(adapter, base, tmp_path / "out", min_retained=0.9, **QUICK)
    assert not (tmp_path / "out").exists()
    notes: list[str] = []
    report = merge_absorb(adapter, base, tmp_path / "out", note=notes.append, **QUICK)
    assert "going on" in notes[0], "the limit does not change what is written"
    assert min(row.least or 0 for row in report.roles) < 0.9


@pytest.mark.parametrize("workers", [2, 7])
def test_the_number_of_workers_changes_nothing(workers: int, base: Path, adapter: Path, tmp_path: Path) -> None:
    merge_absorb(adapter, base, tmp_path / "one", workers=1, **QUICK)
    merge_absorb(adapter, base, tmp_path / "many", workers=workers, **QUICK)
    assert digests(tmp_path / "one") == digests(tmp_path / "many")
