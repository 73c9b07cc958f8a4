"""Loading rows: sources, formats, the held-out part, and the messages about data that can't be used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mla_tune.data.rows import EMBEDDED, hold_out, load_rows
from mla_tune.errors import FileError, InputError, MlaTuneError
from tests.helpers.data import section

PROMPT = {"prompt": "2+2?", "completion": "4"}
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}


def jsonl(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def load(path: object, **keys):
    return load_rows(section(path=str(path), **({"eval_fraction": 0.0} | keys)), seed=0)


def numbered(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(count)]


# ------------------------------------------------------------------------------------------------ sources
@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_sets_have_a_fixed_held_out_part(name):
    rows = load_rows(section(path=name), seed=0)
    assert (len(rows.train), len(rows.held_out), rows.kind, rows.source) == (400, 80, "prompt", f"{name} (embedded)")
    assert not {r["prompt"] for r in rows.train} & {r["prompt"] for r in rows.held_out}
    assert rows == load_rows(section(path=name, eval_fraction=0.5), seed=9)
    assert load(name).held_out == []
    few = load_rows(section(path=name, limit=7), seed=0)
    assert few.train == rows.train[:7]
    assert few.held_out == rows.held_out
    assert few.sha256 != rows.sha256


def test_every_file_type_gives_the_same_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": 'a,"b"\nc', "completion": "é\u2028x"}, {"prompt": "", "completion": "2"}]
    (tmp_path / "d.jsonl").write_text(
        "\ufeff" + "\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8"
    )
    (tmp_path / "d.json").write_text(json.dumps(rows))
    (tmp_path / "d.csv").write_text('prompt,completion\n"a,""b""\nc",é\u2028x\n,2\n', encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    for suffix in ("jsonl", "json", "csv", "parquet"):
        assert load(tmp_path / f"d.{suffix}").train == rows, suffix


def test_a_txt_file_is_one_text_whose_end_is_held_out(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("one\n\ntwo\n\nthree\n\nfour")
    assert load(path).train == [{"text": "one\n\ntwo\n\nthree\n\nfour"}]
    rows = load(path, eval_fraction=0.3)
    assert (rows.train, rows.held_out) == ([{"text": "one\n\ntwo"}], [{"text": "three\n\nfour"}])
    path.write_text("a single line")
    assert load(path, eval_fraction=0.3).held_out == []


def test_a_long_csv_cell_is_read(tmp_path):
    (tmp_path / "d.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(load(tmp_path / "d.csv").train[0]["text"]) == 200_000


def test_hub_id_goes_to_datasets(monkeypatch):
    import datasets

    calls = []

    def fake(path, name, split):
        calls.append((path, name, split))
        return datasets.Dataset.from_list(numbered(5))

    monkeypatch.setattr(datasets, "load_dataset", fake)
    rows = load("org/set.v2", name="main", split="test", limit=3)
    assert calls == [("org/set.v2", "main", "test")]
    assert (rows.train, rows.source) == (numbered(3), "org/set.v2 main [test]")


def test_unreachable_hub_id_names_what_to_check(monkeypatch):
    import datasets

    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'org/set' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        InputError, match=r"data.path: there is no file 'org/set', and.*reach 'org/set' on the Hub\. Check"
    ):
        load("org/set")


# ------------------------------------------------------------------------------------------------ formats
def test_formats_become_kinds(tmp_path):
    cases = [
        (PROMPT | {"id": 1}, "prompt", PROMPT),
        ({"instruction": "add", "input": "2 2", "output": "4"}, "prompt", {"prompt": "add\n\n2 2", "completion": "4"}),
        ({"instruction": "add", "input": "", "output": "4"}, "prompt", {"prompt": "add", "completion": "4"}),
        ({"instruction": "add", "output": "4", "text": "t"}, "prompt", {"prompt": "add", "completion": "4"}),
        (CHAT | {"prompt": "hi"}, "chat", CHAT),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
            "chat",
            CHAT,
        ),
        ({"text": "abc"}, "text", {"text": "abc"}),
    ]
    for raw, kind, want in cases:
        rows = load(jsonl(tmp_path / "d.jsonl", raw))
        assert (rows.kind, rows.train) == (kind, [want])


def test_configured_columns_are_used(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", {"q": "2+2?", "a": "4", "body": "x", "turns": CHAT["messages"]})
    assert load(path, prompt="q", completion="a").train == [PROMPT]
    assert load(path, messages="turns").train == [CHAT]
    assert load(path, text="body").train == [{"text": "x"}]
    assert load(path, text="body", format="text").kind == "text"


@pytest.mark.parametrize(
    "row, keys, words",
    [
        ({"question": "q", "answer": "a"}, {}, "d.jsonl: line 2: no format fits the columns found: question, answer"),
        ({"promt": "q", "completion": "a"}, {}, "Perhaps data.prompt: promt$"),
        (PROMPT | CHAT, {}, "fit the formats prompt and chat; say which with data.format"),
        (["q", "a"], {}, r"line 2: must be an object with named columns, found the list \['q', 'a'\]"),
        ({"promt": "q", "completion": "a"}, {"format": "prompt"}, "no column 'prompt'; did you mean 'promt'"),
        (
            {"q": "q", "completion": "a"},
            {"format": "prompt"},
            "columns found: q, completion; name the right column with data.prompt",
        ),
        (
            {"instruction": "i"},
            {"format": "alpaca"},
            "no column 'output'; columns found: instruction; data.format: alpaca needs",
        ),
        (
            {"prompt": 3, "completion": "a"},
            {},
            "line 2: prompt must be a string, found the number 3; write it as a string",
        ),
        ({"prompt": "q", "completion": None}, {}, r"completion must be a string, found nothing \(null\)"),
        ({"prompt": ["q"], "completion": "a"}, {}, "a list of messages needs data.format: chat"),
        ({"prompt": "q", "completion": " \n"}, {}, "line 2: completion is empty.*fill it or remove the row"),
        ({"prompt": "q", "completion": "\ud83d"}, {}, "completion: character 0 is half a surrogate pair"),
        ({"text": ""}, {}, "text is empty"),
        ({"messages": "hi"}, {}, "messages: must be a list of {role, content}, found the string 'hi'"),
        ({"messages": []}, {}, "messages: the list is empty"),
        ({"messages": ["hi"]}, {}, r"messages\[0\]: must be an object {role, content}"),
        ({"messages": [{"role": "user"}]}, {}, r"messages\[0\]: has no 'content'; its keys are role"),
        (
            {"messages": [{"role": "asistant", "content": "x"}]},
            {},
            r"messages\[0\]: unknown role 'asistant'; did you mean 'assistant'\? allowed: system, user, assistant",
        ),
        ({"messages": [{"role": "user", "content": None}]}, {}, r"messages\[0\].content must be a string"),
        ({"messages": [{"role": "user", "content": "x"}]}, {}, "no assistant's turn.*data.train_on: all"),
        (
            {"conversations": [{"from": "bot", "value": "x"}]},
            {},
            "unknown from 'bot'; allowed: system, human, user, gpt",
        ),
    ],
)
def test_a_bad_row_is_reported_with_its_place_and_a_remedy(tmp_path, row, keys, words):
    path = tmp_path / "d.jsonl"
    path.write_text("\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=words):
        load(path, **keys)


def test_many_bad_rows_are_counted(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", PROMPT, *[{"prompt": "q", "completion": ""}] * 8)
    with pytest.raises(InputError) as err:
        load(path)
    lines = str(err.value).split("\n")
    assert "line 2:" in lines[0]
    assert "line 6:" in lines[4]
    assert lines[5:] == ["… and 3 more rows", "data.on_invalid_row: skip leaves such rows out, and counts them"]
    assert load(path, limit=1).train == [PROMPT]


# --------------------------------------------------------------------------------------------- bad files
@pytest.mark.parametrize(
    "name, content, words",
    [
        ("d.jsonl", b'{"text": "a"}\n{"text": "b"\n', r"d.jsonl: line 2, column 13: not JSON: .*delimiter"),
        ("d.jsonl", b'{"text": "a"}\n\n{"text" "b"}\n', r"line 3, column 9: not JSON: .*near .*one whole JSON object"),
        ("d.json", b'{"text": "a"}\n{"text": "b"}\n', r"line 2, column 1: .*name it .jsonl"),
        ("d.json", b'{"data": []}', "must be a list of objects, found an object with the keys data"),
        ("d.json", b"[]", r"d.json: holds no rows \(2 bytes\)"),
        ("d.jsonl", b"\n", "holds no rows"),
        ("d.txt", b" \n", "holds no rows"),
        ("d.csv", b"prompt,completion\n", "holds no rows"),
        (
            "d.csv",
            b'prompt,completion\n"a\nb",c\nd,e,f\n',
            r"line 4: 3 cells, but the header has 2 \(prompt, completion\)",
        ),
        ("d.csv", b'text\n"abc\n', "not CSV: .*closing quote missing"),
        ("d.csv", b"text,text\na,b\n", "names text twice"),
        ("d.xlsx", b"x", "suffix '.xlsx' is not supported; allowed: .jsonl, .json, .parquet, .csv, .txt"),
    ],
)
def test_a_broken_file_is_reported_with_its_place(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        load(tmp_path / name)


def test_wrong_encoding_names_line_and_byte(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(FileError, match=r"line 2, byte 14: 0xe9 isn't UTF-8.*iconv"):
        load(path)
    path.write_bytes('{"text": "a"}'.encode("utf-16"))
    with pytest.raises(FileError, match=r"line 1, byte 1: 0xff isn't UTF-8.*iconv -f UTF-16"):
        load(path)


def test_damaged_parquet(tmp_path):
    (tmp_path / "d.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(FileError, match=r"d\.parquet: not a complete parquet file"):
        load(tmp_path / "d.parquet")


def test_missing_files_name_the_nearest(tmp_path, monkeypatch):
    jsonl(tmp_path / "train.jsonl", PROMPT)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError, match=r"data.path: trian.jsonl: no such file; did you mean 'train.jsonl'\?"):
        load("trian.jsonl")
    with pytest.raises(FileError, match=r"no such file; no file in .* has a similar name"):
        load("./zzz")
    with pytest.raises(FileError, match="there is no folder sub either"):
        load("sub/train.jsonl")
    with pytest.raises(FileError, match="no such file; there is no folder"):
        load("some/where/else")
    with pytest.raises(FileError, match=r"data.path: zzz.tsv: no such file"):
        load("zzz.tsv")
    with pytest.raises(FileError, match="is a folder; name one file"):
        load(tmp_path)
    with pytest.raises(FileError, match=r"data.eval_path: test.jsonl: no such file"):
        load("train.jsonl", eval_path="test.jsonl")
    with pytest.raises(InputError, match=r"no data set 'mbbp'; did you mean 'mbpp'\? Allowed: mbpp, gsm8k, a file"):
        load("mbbp")


# ---------------------------------------------------------------------------------------- the held-out part
@pytest.mark.parametrize("count, fraction, held", [(100, 0.1, 10), (5, 0.01, 1), (2, 0.9, 1), (1, 0.5, 0)])
def test_split_sizes(tmp_path, count, fraction, held):
    path = jsonl(tmp_path / "d.jsonl", *numbered(count))
    rows = load(path, eval_fraction=fraction)
    assert (len(rows.train), len(rows.held_out)) == (count - held, held)
    assert sorted(map(str, rows.train + rows.held_out)) == sorted(map(str, numbered(count)))


def test_split_follows_the_seed(tmp_path):
    data = section(path=jsonl(tmp_path / "d.jsonl", *numbered(50)))
    assert load_rows(data, 1) == load_rows(data, 1)
    one, two = load_rows(data, 1), load_rows(data, 2)
    assert one.held_out != two.held_out
    assert one.sha256 != two.sha256
    assert one.held_out != numbered(50)[-5:]


def test_limit_comes_before_the_split(tmp_path):
    rows = load(jsonl(tmp_path / "d.jsonl", *numbered(50)), limit=10, eval_fraction=0.2)
    assert sorted(map(str, rows.train + rows.held_out)) == sorted(map(str, numbered(10)))


def test_equal_rows_stay_on_one_side():
    rows = numbered(10) * 2
    for seed in range(20):
        train, held_out = hold_out(rows, 0.2, seed)
        assert (len(train), len(held_out)) == (16, 4)
        assert not {r["prompt"] for r in train} & {r["prompt"] for r in held_out}
    assert len(hold_out(rows, 0.01, 0)[1]) == 2  # each group has two equal rows, so one whole group is held out
    with pytest.raises(InputError, match=r"all 3 rows are equal.*eval_fraction: 0 or give data.eval_path"):
        hold_out([PROMPT] * 3, 0.1, 0)


def test_eval_path_wins_over_the_fraction(tmp_path):
    train, test = jsonl(tmp_path / "a.jsonl", *numbered(20)), jsonl(tmp_path / "b.jsonl", PROMPT, PROMPT)
    rows = load(train, eval_path=test, eval_fraction=0.5, limit=1)
    assert (rows.train, rows.held_out) == (numbered(1), [PROMPT, PROMPT])
    assert len(load(train, eval_path="gsm8k").held_out) == 80
    with pytest.raises(InputError, match=r"has rows of the kind chat, but data.path: .* has rows of the kind prompt"):
        load(train, eval_path=jsonl(tmp_path / "c.jsonl", CHAT))


def test_hash_sees_content_and_side(tmp_path):
    def digest(*rows, **keys):
        return load(jsonl(tmp_path / "d.jsonl", *rows), **keys).sha256

    one = digest(PROMPT)
    assert one == digest(PROMPT | {"id": 7})
    assert one != digest(PROMPT | {"completion": "5"})
    first, second = numbered(2)
    assert digest(first, second) != digest(first, eval_path=jsonl(tmp_path / "e.jsonl", second))


def test_errors_have_the_base_class_and_importing_loads_no_torch():
    assert issubclass(InputError, MlaTuneError)
    assert issubclass(FileError, MlaTuneError)
    code = (
        "import sys, mla_tune.data.rows, mla_tune.data.encode as e; print({'torch', 'transformers'} & {*sys.modules})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
