"""Checkpoints are whole or absent."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from mla_tune.errors import WorkError
from mla_tune.runs.checkpoints import PARTIAL, damage, keep_newest, newest_whole, whole_or_absent


def write(folder: Path, step: int, text: str = "weights") -> Path:
    with whole_or_absent(folder, step) as staging:
        made = staging / f"checkpoint-{step}"
        (made / "inside").mkdir(parents=True)
        (made / "weights.bin").write_text(text)
        (made / "inside" / "state.json").write_text("{}")
    return folder / f"checkpoint-{step}"


def test_a_whole_one_is_found(tmp_path: Path) -> None:
    write(tmp_path, 9)
    newest = write(tmp_path, 10)
    assert damage(newest) is None
    assert newest_whole(tmp_path) == (newest, [])
    assert not (tmp_path / PARTIAL).exists()


def test_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, 5, "old")
    assert (write(tmp_path, 5, "new") / "weights.bin").read_text() == "new"


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda c: (c / "weights.bin").write_text("Weights"), "weights.bin was changed since it was written"),
        (lambda c: (c / "weights.bin").write_text("wei"), "weights.bin has 3 bytes instead of 7"),
        (lambda c: (c / "inside" / "state.json").unlink(), "inside/state.json is missing"),
        (lambda c: (c / "files.json").unlink(), "files.json is missing, so it was never whole"),
        (lambda c: (c / "files.json").write_text('{"weights'), "files.json can't be read"),
        (lambda c: (c / "files.json").write_bytes(b"\xff\xfe\0"), "files.json can't be read"),
        (lambda c: (c / "files.json").write_text("[" * 100_000), "files.json can't be read"),
        (lambda c: (c / "files.json").write_text('{"a": 3}'), "does not give the size and hash of a"),
    ],
)
def test_a_damaged_one_is_told_and_passed_over(tmp_path: Path, harm, words: str) -> None:
    older, newest = write(tmp_path, 3), write(tmp_path, 20)
    harm(newest)
    found, lines = newest_whole(tmp_path)
    assert found == older
    assert len(lines) == 1
    assert str(newest) in lines[0]
    assert words in lines[0]


def test_a_process_that_died_while_writing_leaves_nothing_that_counts(tmp_path: Path) -> None:
    older = write(tmp_path, 3)
    partial = tmp_path / PARTIAL / "checkpoint-6"
    partial.mkdir(parents=True)
    (partial / "weights.bin").write_text("half")
    assert newest_whole(tmp_path) == (older, [])
    write(tmp_path, 6)
    assert not (tmp_path / PARTIAL).exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0"),
    ],
)
def test_a_full_disk_is_told_and_leaves_the_older_ones(tmp_path: Path, error: Exception) -> None:
    older = write(tmp_path, 3)

    def fail() -> None:
        with whole_or_absent(tmp_path, 6) as staging:
            (staging / "checkpoint-6").mkdir()
            (staging / "checkpoint-6" / "weights.bin").write_text("half")
            raise error

    words = r"checkpoint of step 6 can't be written .*; the last whole one is .*checkpoint-3"
    with pytest.raises(WorkError, match=words):
        fail()
    assert newest_whole(tmp_path) == (older, [])
    assert not (tmp_path / PARTIAL).exists()


def test_another_error_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(KeyError), whole_or_absent(tmp_path, 6):
        raise KeyError("a bug")


def test_the_oldest_go(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        write(tmp_path, step)
    keep_newest(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11"]
