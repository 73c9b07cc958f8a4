"""Several sources, invalid rows, rows that are too long, rows of tokens, tools, the cache, and `mla-tune data`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mla_tune.arch.build import architecture
from mla_tune.data import cache as cache_module
from mla_tune.data.encode import encode
from mla_tune.data.files import read_file
from mla_tune.data.formats import normalize
from mla_tune.data.mixing import mix_samples, samples_per_source
from mla_tune.data.prepare import Prepared, prepare
from mla_tune.data.row_kinds import IGNORED
from mla_tune.errors import InputError
from mla_tune.recipe.load import load_recipe
from tests.helpers.arch_configs import TINY
from tests.helpers.data import ASSISTANT, EOS, TEMPLATE, USER, make_tokenizer, section

TOKENIZER = make_tokenizer()


def jsonl(path: Path, *rows: Any) -> Path:
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def prepared(*sets: str, recipe: Any = None) -> Prepared:
    loaded = recipe or load_recipe("safe", ["data.eval_fraction=0", "train.max_length=64", *sets])
    return prepare(loaded, architecture(TINY["deepseek_v3"] | {"vocab_size": 4096}), TOKENIZER)


def recipe_with(sources: list[dict[str, Any]], tmp_path: Path, **data: Any) -> Any:
    import yaml

    document = {"data": {"eval_fraction": 0, **data, "sources": sources}, "train": {"max_length": 64}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
    return load_recipe(str(tmp_path / "recipe.yaml"))


# ---- mixing ----


def test_shares_are_in_proportion_and_sum_up() -> None:
    assert samples_per_source([100, 100], [3, 1]) == [150, 50]
    assert samples_per_source([10, 20, 3], [1, 1, 1]) == [11, 11, 11]
    assert samples_per_source([5, 5], [1000, 1])[1] == 1
    assert sum(samples_per_source([7, 11, 13], [0.2, 0.5, 0.3])) == 31


def test_a_small_source_is_repeated_and_a_large_one_gives_a_part() -> None:
    small, large = [f"s{i}" for i in range(10)], [f"l{i}" for i in range(90)]
    found, counts = mix_samples([small, large], [1, 1], seed=3)
    assert counts == [50, 50]
    assert all(found.count(x) == 5 for x in small)
    taken = [x for x in found if x.startswith("l")]
    assert len(set(taken)) == len(taken) == 50
    assert mix_samples([small, large], [1, 1], seed=3)[0] == found
    assert mix_samples([small, large], [1, 1], seed=4)[0] != found


def test_sources_of_other_formats_are_mixed_and_counted(tmp_path: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"b{i}"}]} for i in range(4)
    ]
    a = jsonl(tmp_path / "a.jsonl", *({"prompt": "q", "completion": f"a{i}"} for i in range(12)))
    b = jsonl(tmp_path / "b.jsonl", *chats)
    recipe = recipe_with([{"path": str(a), "weight": 1.0}, {"path": str(b), "weight": 3.0}], tmp_path)
    found = prepared(recipe=recipe)
    summary = found.summary()
    assert summary["kind"] == "chat/prompt"
    assert [(s["samples"], s["used"]) for s in summary["sources"]] == [(12, 4), (4, 12)]
    assert any("12 of an epoch's 16 samples, 3.00 times its 4" in line for line in found.lines)
    texts = TOKENIZER.decode([i for row in found.train_rows for i in row["input_ids"]])
    assert all(texts.count(f"{ASSISTANT}b{i}") == 3 for i in range(4))
    assert prepared(recipe=recipe).train_rows == found.train_rows


def test_each_source_gives_its_own_held_out_part(tmp_path: Path) -> None:
    files = [
        jsonl(tmp_path / f"{n}.jsonl", *({"prompt": "q", "completion": f"{n}{i}"} for i in range(10))) for n in "xy"
    ]
    recipe = recipe_with([{"path": str(f)} for f in files], tmp_path, eval_fraction=0.2)
    found = prepared(recipe=recipe)
    text = TOKENIZER.decode([i for row in found.held_out_rows for i in row["input_ids"]])
    assert text.count(f"{ASSISTANT}x") == text.count(f"{ASSISTANT}y") == 2
    one = recipe_with([{"path": str(f)} for f in files], tmp_path, eval_path=str(files[1]))
    assert prepared(recipe=one).summary()["held_out"]["samples"] == 10


def test_path_and_sources_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'path'.*'sources'"):
        recipe_with([{"path": "mbpp"}], tmp_path, path="gsm8k")


# ---- rows that can't be used ----

GOOD = {"prompt": "q", "completion": "the cat"}


@pytest.mark.parametrize(
    "bad, words",
    [
        (b'{"prompt": "q", "completion": "a"', "line 2, column 34: not JSON"),
        (b'{"prompt": "q", "completion": "caf\xe9"}', "line 2, byte 35: 0xe9 isn't UTF-8"),
        ({"prompt": "q", "completion": "  "}, "line 2: completion is empty"),
        ({"prompt": "q", "answer": "a"}, "line 2: no column 'completion'"),
        ([1, 2], "line 2: must be an object"),
        ({"prompt": "the " * 300, "completion": "a"}, "so no token of the completion would be left"),
    ],
    ids=["json", "encoding", "empty", "schema", "list", "long prompt"],
)
def test_a_bad_row_stops_or_is_left_out_and_counted(tmp_path: Path, bad: Any, words: str) -> None:
    path = jsonl(tmp_path / "d.jsonl", GOOD, bad, GOOD)
    with pytest.raises(Exception, match=words.replace("(", r"\(")) as error:
        prepared(f"data.path={path}")
    assert type(error.value).__name__ in ("InputError", "FileError")
    found = prepared(f"data.path={path}", "data.on_invalid_row=skip")
    assert found.summary()["train"]["samples"] == 2
    assert found.summary()["skipped"]["rows"] == 1
    assert words in found.summary()["skipped"]["first"][0]
    assert found.lines[0].startswith("data.on_invalid_row: skip: 1 rows are left out:\n  ")


def test_the_first_fault_is_named_where_no_row_is_left(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", b"{", b"{")
    with pytest.raises(InputError, match=r"line 1, column 2: not JSON.*\nall 2 lines"):
        prepared(f"data.path={path}", "data.on_invalid_row=skip")


def test_a_short_record_of_a_csv_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("prompt,completion\nq,a\nq\nq,b\n")
    table = read_file(path, "data.path", skip_broken=True)
    assert len(table.rows) == 2
    assert "line 3: 1 cells, but the header has 2" in table.faults[0]


@pytest.mark.slow
def test_one_sample_of_ten_megabytes(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", GOOD, {"prompt": "q", "completion": "the cat sat " * 850_000})
    found = prepared(f"data.path={path}").summary()["train"]
    assert (found["samples"], found["truncated"]) == (2, 1)
    found = prepared(f"data.path={path}", "data.on_overflow=drop").summary()["train"]
    assert (found["samples"], found["dropped"]) == (1, 1)


# ---- too long ----


def test_split_keeps_every_trained_token_once() -> None:
    row = {"prompt": "the " * 30, "completion": "ab " * 50}
    whole = encode([row], "prompt", TOKENIZER, section(), 1000).samples[0]
    cut = encode([row], "prompt", TOKENIZER, section(on_overflow="split"), 16)
    assert cut.split == 1
    assert cut.untrained > 0
    assert all(len(s.input_ids) <= 16 for s in cut.samples)
    trained = [label for s in cut.samples for label in s.labels if label != IGNORED]
    assert trained == [label for label in whole.labels if label != IGNORED]


# ---- tokens ----


def test_token_ids_are_used_unchanged(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, {"input_ids": [8, 9], "attention_mask": [1, 1]}]
    path = jsonl(tmp_path / "d.jsonl", *rows)
    (row,) = prepared(f"data.path={path}").train_rows
    assert row["input_ids"] == [5, 6, 7, 8, 9]
    assert row["labels"] == [-100, -100, 7, -100, 9]


@pytest.mark.parametrize(
    "row, words",
    [
        ({"input_ids": [1, 2], "labels": [1]}, "labels: must be a list of 2 ids"),
        ({"input_ids": [1, 2], "labels": [1, 3]}, r"labels\[1\] is 3, neither input_ids\[1\] \(2\) nor -100"),
        ({"input_ids": [1, 2], "labels": [-100, -100]}, "labels: all after the first are -100"),
        ({"input_ids": [1, -2]}, "input_ids: must be a list of token ids"),
        ({"input_ids": [1, 9999]}, "token 9999 is outside the tokenizer's vocabulary"),
        ({"input_ids": [1, 2], "position_ids": [0, 1]}, "the column 'position_ids' can't be kept"),
        ({"input_ids": [1, 2], "attention_mask": [1, 0]}, "the column 'attention_mask' can't be kept"),
        ({"prompt": "a", "completion": "b", "images": ["x.png"]}, "the column 'images' can't be kept"),
    ],
)
def test_unusable_rows_of_tokens_are_refused(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    path = jsonl(tmp_path / "d.jsonl", row)
    with pytest.raises(InputError, match=words):
        prepared(f"data.path={path}")


# ---- tools ----

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
WITH_TOOLS = (
    "{%- if tools -%}TOOLS {{ tools | tojson }}{%- endif -%}"
    "{%- for m in messages -%}"
    "{%- if m['role'] == 'assistant' -%}"
    "{{- '" + ASSISTANT + "' + m['content'] -}}"
    "{%- for c in m.get('tool_calls') or [] -%}CALL {{ c['function']['name'] }}{%- endfor -%}{{- eos_token -}}"
    "{%- elif m['role'] == 'tool' -%}RESULT {{ m['content'] }}"
    "{%- else -%}{{- '" + USER + "' + m['content'] -}}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '" + ASSISTANT + "' -}}{%- endif -%}"
)
CHAT = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": None, "tool_calls": CALL},
    {"role": "tool", "content": "sat"},
    {"role": "assistant", "content": "on the mat"},
]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_a_chat_with_tools_trains_the_assistants_turns_alone(tmp_path: Path, tools: Any) -> None:
    table = read_file(jsonl(tmp_path / "d.jsonl", {"messages": CHAT, "tools": tools}), "data.path")
    kind, rows = normalize(table, section())
    (sample,) = encode(rows, kind, make_tokenizer(WITH_TOOLS), section(), 1000).samples
    tokenizer = make_tokenizer(WITH_TOOLS)
    text = tokenizer.decode(sample.input_ids)
    assert text.startswith('TOOLS [{"type": "function"')
    assert "RESULT sat" in text
    trained = tokenizer.decode([label for label in sample.labels if label != IGNORED])
    assert trained == f"CALL add{EOS}on the mat{EOS}"


def test_a_template_that_knows_no_tools_is_refused(tmp_path: Path) -> None:
    for row, word in (({"messages": CHAT}, "tool_calls"), ({"messages": CHAT[:1] + CHAT[3:], "tools": TOOLS}, "tools")):
        kind, rows = normalize(read_file(jsonl(tmp_path / "d.jsonl", row), "data.path"), section())
        with pytest.raises(InputError, match=f"the chat has {word}, which the tokenizer's chat template doesn't"):
            encode(rows, kind, make_tokenizer(TEMPLATE), section(), 1000)


# ---- cache ----


def test_tokens_come_from_the_cache_only_for_the_same_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLA_TUNE_CACHE", str(tmp_path / "cache"))
    path = jsonl(tmp_path / "d.jsonl", *({"prompt": "q", "completion": f"a{i}"} for i in range(9)))
    sets = [f"data.path={path}"]
    first = prepared(*sets)
    assert not any("tokenized earlier" in line for line in first.lines)
    made: list[Any] = []
    monkeypatch.setattr("mla_tune.data.prepare.encode", lambda *a, **k: made.append(a) or encode(*a, **k))
    again = prepared(*sets)
    assert any("9 samples, tokenized earlier (data.cache)" in line for line in again.lines)
    assert not made
    assert again.train_rows == first.train_rows
    assert again.summary() == first.summary()
    for changed in (
        "data.train_on=all",
        "data.template=none",
        "train.max_length=32",
        "data.on_overflow=split",
        "data.cache=false",
    ):
        made.clear()
        prepared(*sets, changed)
        assert made, changed
    jsonl(path, *({"prompt": "q", "completion": f"b{i}"} for i in range(9)))
    made.clear()
    prepared(*sets)
    assert made


def test_another_tokenizer_or_template_is_another_key() -> None:
    keys = {
        cache_module.cache_key("rows", "train", tokenizer, section(), 64)
        for tokenizer in (make_tokenizer(), make_tokenizer(None), make_tokenizer(TEMPLATE + " "))
    }
    assert len(keys) == 3
    assert cache_module.cache_key("rows", "train", make_tokenizer(), section(), 64) in keys


@pytest.mark.parametrize("harm", [b"", b"not safetensors", None])
def test_a_damaged_entry_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: bytes | None) -> None:
    monkeypatch.setenv("MLA_TUNE_CACHE", str(tmp_path / "cache"))
    path = jsonl(tmp_path / "d.jsonl", GOOD)
    first = prepared(f"data.path={path}")
    (entry,) = (tmp_path / "cache" / "tokens").iterdir()
    entry.write_bytes(entry.read_bytes()[:-3] if harm is None else harm)
    assert prepared(f"data.path={path}").train_rows == first.train_rows
    assert any("tokenized earlier" in line for line in prepared(f"data.path={path}").lines)


def test_a_cache_that_cant_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file, no folder")
    monkeypatch.setenv("MLA_TUNE_CACHE", str(tmp_path / "cache"))
    assert prepared(f"data.path={jsonl(tmp_path / 'd.jsonl', GOOD)}").summary()["train"]["samples"] == 1


# ---- mla-tune data ----


def test_the_preview_marks_the_trained_tokens(cli, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", *({"prompt": f"say {i}", "completion": "ab " * (1 + i)} for i in range(20)))
    sets = ["--set", f"data.path={path}", "--set", "data.eval_fraction=0", "--set", "train.max_length=64"]
    shown = cli("data", "--recipe", "safe", *sets, "--samples", "1")
    assert shown.code == 0, shown.err
    assert "say 0" in shown.out
    assert "⟦ab <｜end▁of▁sentence｜>⟧" in shown.out
    assert "packing: 20 samples in " in shown.out
    assert max(len(line) for line in shown.out.splitlines() if not line.startswith(("packing", "train"))) <= 120
    document = json.loads(cli("data", "--recipe", "safe", *sets, "--json").out)
    assert sum(bar["samples"] for bar in document["lengths"]) == document["train"]["samples"] == 20
    assert document["longest"] <= 64
    trained = sum(s["trained"] for sample in document["sources_shown"][0]["samples"] for s in sample)
    assert trained == 2
