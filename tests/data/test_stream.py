"""Streamed data: the same rows as reading all at once, weights, held-out rows, exact resume, processes."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mla_tune.data.prepare import prepare
from mla_tune.data.reader import Cursor, RecordReader
from mla_tune.data.stream import Stream
from mla_tune.errors import FileError, InputError
from mla_tune.model.tokenizer import load_tokenizer, tokenizer_source
from mla_tune.recipe.load import load_recipe
from mla_tune.recipe.model_source import architecture_of
from mla_tune.recipe.schema import DataSection
from tests.helpers.runs import cut_back, hash_of, metrics, options

COUNT = 37


def texts(prefix: str, count: int = COUNT) -> list[dict[str, str]]:
    return [{"prompt": f"Say {prefix} {i}.", "completion": f"{prefix} {i} " * (1 + i % 5)} for i in range(count)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(r) + "\n" * (i % 3 == 0) for i, r in enumerate(rows)))  # and blank lines
    elif path.suffix == ".csv":
        path.write_text("prompt,completion\n" + "".join(f'"{r["prompt"]}","{r["completion"]}"\n' for r in rows))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    return path


def stream_of(*sets: str) -> tuple[Any, Stream, Any]:
    recipe = load_recipe("safe", ["data.streaming=true", "train.max_length=64", *sets])
    section = recipe.model
    tokenizer = load_tokenizer(tokenizer_source(section), False)
    prepared = prepare(recipe, architecture_of(section), tokenizer)
    assert isinstance(prepared.train_rows, Stream)
    return prepared, prepared.train_rows, tokenizer


def take(stream: Stream, count: int) -> list[dict[str, Any]]:
    return list(itertools.islice(iter(stream), count))


def prompts(rows: list[dict[str, Any]], tokenizer: Any) -> Counter[str]:
    """The prompts in rows, packed or not."""
    text = "\n".join(tokenizer.decode(r["input_ids"]) for r in rows)
    return Counter(part.split(".")[0].strip() for part in text.split("Say ")[1:])


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_pass_holds_every_row_once_and_the_next_begins_again(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"rows{suffix}", texts("a"))
    for packing in ("true", "false"):
        sets = [f"data.path={path}", "data.eval_fraction=0", f"data.buffer={COUNT}", f"train.packing={packing}"]
        _, stream, tokenizer = stream_of(*sets)
        one = len(stream._next_chunk(stream._start))
        _, stream, tokenizer = stream_of(*sets)
        rows = take(stream, 2 * one)
        wanted = Counter(f"a {i}" for i in range(COUNT))
        assert prompts(rows[:one], tokenizer) == wanted
        assert prompts(rows[one:], tokenizer) == wanted
        assert rows[:one] != rows[one:], "each chunk has an order of its own"


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_reading_goes_on_anywhere(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"rows{suffix}", texts("a"))
    data = DataSection(path=str(path))
    whole = RecordReader(data).read(3 * COUNT, Cursor())
    assert [r["prompt"] for r in whole.rows] == [r["prompt"] for r in texts("a")] * 3
    for start in (0, 1, 6, 7, 8, 20, COUNT - 1, COUNT, COUNT + 5):
        cursor = Cursor(*divmod(start, COUNT))
        found = RecordReader(data).read(10, cursor)
        assert found.rows == whole.rows[start : start + 10], start
        assert list(found.numbers) == list(whole.numbers[start : start + 10])
        assert cursor == Cursor(*divmod(start + 10, COUNT))


def test_a_limit_ends_a_pass(tmp_path: Path) -> None:
    data = DataSection(path=str(write(tmp_path / "rows.jsonl", texts("a"))), limit=5)
    assert [r["prompt"] for r in RecordReader(data).read(12, Cursor()).rows] == [f"Say a {i % 5}." for i in range(12)]


def test_sources_come_by_weight(tmp_path: Path) -> None:
    a, b = (write(tmp_path / f"{n}.jsonl", texts(n)) for n in "ab")
    sources = json.dumps([{"path": str(a), "weight": 3.0}, {"path": str(b), "weight": 0.5}])
    _, stream, tokenizer = stream_of(
        f"data.sources={sources}", "data.eval_fraction=0", "data.buffer=10", "train.packing=false"
    )
    found = prompts(take(stream, 350), tokenizer)
    assert sum(n for key, n in found.items() if key.startswith("a")) == pytest.approx(300, abs=10)
    assert sum(n for key, n in found.items() if key.startswith("b")) == pytest.approx(50, abs=10)


def test_held_out_rows_are_never_trained(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", texts("a") * 2)  # each row twice
    prepared, stream, tokenizer = stream_of(f"data.path={path}", "data.eval_fraction=0.2", "train.packing=false")
    held_out = prompts(prepared.held_out_rows, tokenizer)
    assert sum(held_out.values()) == pytest.approx(0.2 * 2 * COUNT, abs=2)
    trained = prompts(take(stream, 400), tokenizer)
    assert not held_out.keys() & trained.keys()
    assert held_out.keys() | trained.keys() == {f"a {i}" for i in range(COUNT)}


def test_it_goes_on_where_it_was(tmp_path: Path) -> None:
    """From any row, in the middle of a chunk or at its end, also where the loader is ahead."""
    path = write(tmp_path / "rows.jsonl", texts("a"))
    sets = [f"data.path={path}", "data.buffer=11"]
    _, straight, _ = stream_of(*sets)
    wanted = take(straight, 60)
    for done in (0, 1, 7, 8, 25, 40):
        for ahead in (0, 2, 5):
            _, first, _ = stream_of(*sets)
            assert take(first, done + ahead) == wanted[: done + ahead]
            saved = json.loads(json.dumps(first.state_dict_at(done)))
            _, later, _ = stream_of(*sets)
            later.load_state_dict(saved)
            assert take(later, 60 - done) == wanted[done:], (done, ahead)


def test_processes_share_global_batches(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", texts("a"))
    _, one, _ = stream_of(f"data.path={path}", "data.buffer=11", "train.batch_size=4")
    wanted = take(one, 24)
    samples_per_source = []
    for rank in (0, 1):
        _, stream, _ = stream_of(f"data.path={path}", "data.buffer=11", "train.batch_size=2")
        stream.set_process(rank=rank, world_size=2)
        samples_per_source.append(take(stream, 12))
    batches = [[*samples_per_source[0][i : i + 2], *samples_per_source[1][i : i + 2]] for i in range(0, 12, 2)]
    assert batches == [wanted[i : i + 4] for i in range(0, 24, 4)]


@pytest.mark.slow
def test_a_run_resumes_bit_equal_in_its_second_pass(cli: Callable[..., Any], tmp_path: Path) -> None:
    import shutil

    path = write(tmp_path / "rows.jsonl", texts("a"))
    sets = ["data.streaming=true", "data.buffer=9", "train.max_steps=30", "train.save_every=10", "output.samples=0"]
    sets += ["train.keep_checkpoints=9", "train.packing=false"]
    straight = tmp_path / "straight"
    done = cli("train", "--recipe", "safe", *options(path, straight, *sets))
    assert done.code == 0, done.err
    assert "streamed, shuffled and packed among 9 rows at a time" in done.err
    run = json.loads((straight / "run.json").read_text())
    assert run["data"]["streamed"] is True
    assert run["streamed"]["passes"] == [1]
    assert run["streamed"]["records"] >= 60
    for at in (10, 20):
        again = tmp_path / f"again-{at}"
        shutil.copytree(straight, again)
        cut_back(again, at)
        resumed = cli("train", "--recipe", "safe", "--resume", *options(path, again, *sets))
        assert resumed.code == 0, resumed.err
        assert hash_of(again / "adapter") == hash_of(straight / "adapter")
        assert metrics(again) == metrics(straight)


@pytest.mark.slow
def test_bad_rows_are_counted_or_stop(cli: Callable[..., Any], tmp_path: Path) -> None:
    rows = texts("a")
    lines = [json.dumps(r) for r in rows]
    lines[20] = '{"prompt": "x", "completion":'
    lines[25] = json.dumps({"prompt": "x", "completion": ""})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    # 10 rows a chunk: the first look does not see them.
    sets = ["data.streaming=true", "data.buffer=10", "train.max_steps=20", "train.packing=false", "output.samples=0"]
    done = cli("train", "--recipe", "safe", *options(path, tmp_path / "stops", *sets))
    assert done.code == 2
    assert "rows.jsonl: line 21, column" in done.err
    done = cli("train", "--recipe", "safe", *options(path, tmp_path / "skips", *sets, "data.on_invalid_row=skip"))
    assert done.code == 0, done.err
    streamed = json.loads((tmp_path / "skips" / "run.json").read_text())["streamed"]
    # 40 rows of two: one pass, in which both are, and some of the next.
    assert streamed["passes"] == [1]
    assert streamed["skipped"] == 2
    assert "line 26" in "".join(streamed["faults"])
    assert "rows were left out" in done.err


def test_what_can_not_be_streamed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"set train\.max_steps"):
        load_recipe("safe", ["data.streaming=true", "train.max_steps=null"])
    with pytest.raises(FileError, match="no such file"):
        stream_of(f"data.path={tmp_path}/none.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(InputError, match="holds no rows"):
        stream_of(f"data.path={empty}")
    long = write(tmp_path / "long.jsonl", [{"prompt": "x " * 500, "completion": "y"}] * 3)
    _, stream, _ = stream_of(f"data.path={long}", "data.on_overflow=drop", "data.eval_fraction=0")
    with pytest.raises(InputError, match="a whole pass gave no sample"):
        take(stream, 1)
    broken = tmp_path / "broken.csv"
    broken.write_bytes(b"prompt,completion\na,b\nc,\xff\n")
    with pytest.raises(FileError, match="line 3, byte 3: 0xff isn't UTF-8"):
        stream_of(f"data.path={broken}")


def test_a_hub_data_set_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through `datasets`' own streaming, over a local file in the hub's place."""
    import datasets

    path = write(tmp_path / "rows.jsonl", texts("a"))
    real, asked = datasets.load_dataset, []

    def load(name: str, config: Any = None, **keys: Any) -> Any:
        asked.append((name, keys))
        return real("json", data_files=str(path), split="train", streaming=keys["streaming"])

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = DataSection(path="org/name")
    whole = RecordReader(data).read(2 * COUNT, Cursor())
    assert asked[0] == ("org/name", {"split": "train", "streaming": True})
    assert [r["prompt"] for r in whole.rows] == [r["prompt"] for r in texts("a")] * 2
    assert RecordReader(data).read(5, Cursor(0, 30)).rows == whole.rows[30:35]


def test_labels_and_positions_are_those_of_reading_all_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", texts("a"))
    sets = [
        f"data.path={path}",
        "data.eval_fraction=0",
        "data.cache=false",
        "train.max_length=64",
        "train.packing=false",
    ]
    recipe = load_recipe("safe", sets)
    tokenizer = load_tokenizer(tokenizer_source(recipe.model), False)
    whole = prepare(recipe, architecture_of(recipe.model), tokenizer).train_rows
    _, stream, _ = stream_of(*sets, f"data.buffer={COUNT}")

    def key(row: dict[str, Any]) -> str:
        return json.dumps(row, sort_keys=True)

    assert sorted(map(key, take(stream, COUNT))) == sorted(map(key, whole))
    assert torch.tensor(whole[0]["labels"]).ne(-100).any()
