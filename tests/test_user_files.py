"""Whatever bytes a file that a user names holds: exit code 2 and a message, through the real entry point."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mla_tune.errors import FileError
from mla_tune.resources import EMBEDDED_MODEL
from mla_tune.user_files import decode, parse_json, read_bytes, read_json, read_json_object, read_text
from tests.helpers.marks import fast_cases

BOMB = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n".encode() for i in range(9)
)
#: Name → bytes that are no file of any kind that mla-tune reads as text.
AWFUL: dict[str, bytes] = {
    "empty": b"",
    "blank": b" \n\n",
    "arbitrary bytes": bytes(range(256)) * 3,
    "NUL": b"model: {base: embedded}\0\n",
    "UTF-16": '{"model": {"base": "embedded"}}'.encode("utf-16"),
    "UTF-16 without a mark": '{"model": {"base": "embedded"}}'.encode("utf-16-le"),
    "UTF-32": '{"model": 1}'.encode("utf-32"),
    "Latin-1": '{"model": "café"}'.encode("latin-1"),
    "a lone continuation byte": b'{"a": "\x80"}',
    "nested": b"[" * 100_000,
    "nested and closed": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "open": b'{"a": [1, 2',
    "list": b"[1, 2, 3]",
    "scalar": b"3",
    "text": b'"hello"',
    "null": b"null",
    "NaN": b'{"model": NaN, "hidden_size": NaN}',
    "Infinity": b'{"r": -Infinity}',
    "a number out of range": b'{"model": 1e999, "r": 1e999}',
    "a number without end": b'{"model": ' + b"9" * 6000 + b"}",
    "a surrogate": b'{"model": {"base": "\\ud800"}, "base_model_name_or_path": "\\udfff", "prompt": "\\ud800"}',
    "an escaped NUL": b'{"model": {"base": "a\\u0000b"}}',
    "an alias bomb": BOMB,
    "an alias in itself": b"a: &a [*a]\n",
    "a tag": b"!!python/object/apply:os.system ['true']",
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00]\x94(K\x01K\x02e.",
    "a zip": b"PK\x03\x04" + bytes(60),
}


def copy_of_embedded(folder: Path) -> Path:
    shutil.copytree(EMBEDDED_MODEL, folder)
    return folder


def recipe(tmp_path: Path, data: bytes) -> list[str]:
    (tmp_path / "r.yaml").write_bytes(data)
    return ["plan", "--no-data", "--recipe", str(tmp_path / "r.yaml")]


def data_of(suffix: str) -> Callable[[Path, bytes], list[str]]:
    def command(tmp_path: Path, data: bytes) -> list[str]:
        (tmp_path / f"rows{suffix}").write_bytes(data)
        return ["data", "--recipe", "safe", "--set", f"data.path={tmp_path / f'rows{suffix}'}"]

    return command


def config(tmp_path: Path, data: bytes) -> list[str]:
    (tmp_path / "config.json").write_bytes(data)
    return ["inspect", str(tmp_path)]


def config_file(tmp_path: Path, data: bytes) -> list[str]:
    config(tmp_path, data)
    return ["plan", "--no-data", "--recipe", "safe", "--set", f"model.base={tmp_path / 'config.json'}"]


def config_of_base(tmp_path: Path, data: bytes) -> list[str]:
    base = copy_of_embedded(tmp_path / "base")
    (base / "config.json").write_bytes(data)
    return ["serve-check", str(base), "--engine", "vllm"]


def index(tmp_path: Path, data: bytes) -> list[str]:
    base = copy_of_embedded(tmp_path / "base")
    (base / "model.safetensors.index.json").write_bytes(data)
    return ["inspect", "embedded", "--check-weights", str(base)]


def header(tmp_path: Path, data: bytes) -> list[str]:
    base = copy_of_embedded(tmp_path / "base")
    (base / "model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data)
    return ["inspect", "embedded", "--check-weights", str(base)]


def weights(tmp_path: Path, data: bytes) -> list[str]:
    base = copy_of_embedded(tmp_path / "base")
    (base / "model.safetensors").write_bytes(data)
    return ["inspect", "embedded", "--check-weights", str(base)]


def adapter_config(tmp_path: Path, data: bytes) -> list[str]:
    (tmp_path / "adapter_config.json").write_bytes(data)
    return ["merge-absorb", str(tmp_path), "--base", "embedded"]


def adapter_config_for_its_base(tmp_path: Path, data: bytes) -> list[str]:
    (tmp_path / "adapter_config.json").write_bytes(data)
    return ["generate", str(tmp_path), "--prompt", "x"]


def run_record(tmp_path: Path, data: bytes) -> list[str]:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "run.json").write_bytes(data)
    return ["merge-absorb", str(tmp_path)]


def run_record_for_its_base(tmp_path: Path, data: bytes) -> list[str]:
    run_record(tmp_path, data)
    return ["generate", str(tmp_path), "--prompt", "x"]


def manifest(tmp_path: Path, data: bytes) -> list[str]:
    out = copy_of_embedded(tmp_path / "out")
    (out / "mla_tune_merge.json").write_bytes(data)
    return ["verify", str(out), "--no-logits"]


def prompts(tmp_path: Path, data: bytes) -> list[str]:
    (tmp_path / "prompts.jsonl").write_bytes(data)
    return ["generate", "embedded", "--prompts", str(tmp_path / "prompts.jsonl"), "-n", "1"]


def of_tokenizer(name: str) -> Callable[[Path, bytes], list[str]]:
    def command(tmp_path: Path, data: bytes) -> list[str]:
        base = copy_of_embedded(tmp_path / "base")
        (base / name).write_bytes(data)
        return ["data", "--recipe", "safe", "--set", f"model.base={base}", "--set", "data.limit=2"]

    return command


def generation_config(tmp_path: Path, data: bytes) -> list[str]:
    base = copy_of_embedded(tmp_path / "base")
    (base / "generation_config.json").write_bytes(data)
    return ["generate", str(base), "--prompt", "x", "-n", "1"]


KINDS: dict[str, Callable[[Path, bytes], list[str]]] = {
    "recipe": recipe,
    "rows.jsonl": data_of(".jsonl"),
    "rows.json": data_of(".json"),
    "rows.csv": data_of(".csv"),
    "rows.parquet": data_of(".parquet"),
    "config.json": config,
    "config.json as model.base": config_file,
    "config.json of a base": config_of_base,
    "index": index,
    "safetensors header": header,
    "safetensors": weights,
    "adapter_config.json": adapter_config,
    "adapter_config.json for its base": adapter_config_for_its_base,
    "run.json": run_record,
    "run.json for its base": run_record_for_its_base,
    "manifest": manifest,
    "prompts": prompts,
    "chat_template.jinja": of_tokenizer("chat_template.jinja"),
    "tokenizer_config.json": of_tokenizer("tokenizer_config.json"),
    "generation_config.json": generation_config,
    "tokenizer.json": of_tokenizer("tokenizer.json"),
}


CASES = [(kind, bytes_) for kind in KINDS for bytes_ in AWFUL]
# Objects without a known key: settings that say nothing.
CASES.remove(("generation_config.json", "an escaped NUL"))
CASES.remove(("chat_template.jinja", "empty"))  # a model without a template


@fast_cases("*-arbitrary bytes", "recipe", "safetensors header")
@pytest.mark.parametrize("kind, bytes_", CASES)
def test_awful_bytes_are_an_error_with_a_name(cli, tmp_path: Path, kind: str, bytes_: str) -> None:
    done = cli(*KINDS[kind](tmp_path, AWFUL[bytes_]))
    assert done.code == 2, (done.out, done.err)
    assert done.err.startswith("error: "), done.err
    assert "Traceback" not in done.err
    assert len(done.err) < 4000
    assert done.out == ""


def test_a_mark_of_utf_8_is_no_part_of_the_text(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}')
    assert read_json_object(file, "it") == {"a": "é"}
    assert read_text(file, "it") == '{"a": "é"}'


def test_errors_name_line_and_byte() -> None:
    with pytest.raises(FileError, match=r"^f: line 4, byte 3: 0xff isn't UTF-8; .*iconv -f WINDOWS-1252"):
        decode(b"ab\ncd\xff", "f", line=3)
    with pytest.raises(FileError, match=r"this is UTF-16\. Convert it, for example with `iconv -f UTF-16 -t UTF-8`"):
        decode("a".encode("utf-16"), "f")
    with pytest.raises(FileError, match=r"^f:3: it is not valid JSON \(Expecting ',' delimiter, column 2\)\. Download"):
        parse_json('{"a": 1,\n"b": 2\n "c": 3}', "f", "it")
    with pytest.raises(FileError, match=r"^f: it is not valid JSON \(it holds half a character, \\ud83d\)"):
        parse_json('"\\ud83d"', "f", "it")
    assert parse_json('"\\ud83d\\ude00"', "f", "it") == "\U0001f600"


def test_a_key_twice_matters_where_asked(tmp_path: Path) -> None:
    file = tmp_path / "index.json"
    file.write_text('{"weight_map": {"a": "x", "a": "y"}}')
    assert read_json(file, "it") == {"weight_map": {"a": "y"}}
    with pytest.raises(FileError, match="the key 'a' stands twice in one object"):
        read_json(file, "it", unique=True)


def test_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(bytes(11))
    monkeypatch.setattr("mla_tune.user_files.MAX_TEXT", 10)
    for name, words in (
        (".", "is a folder, and a recipe is a file"),
        ("pipe", "is a pipe, a device or a socket; save a recipe in a file"),
        ("none", "no such file: a recipe is missing"),
        ("large/below", "can't be read: Not a directory"),
        ("x" * 300, "can't be read: File name too long"),
        ("a\0b", "is no path"),
        ("large", "has 11 bytes, too many for a recipe"),
    ):
        with pytest.raises(FileError, match=words):
            read_bytes(tmp_path / name, "a recipe", most=10)


def test_a_pipe_as_a_recipe_does_not_wait(cli, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    done = cli("plan", "--no-data", "--recipe", str(tmp_path / "pipe.yaml"))
    assert (done.code, done.out) == (2, "")
    assert "is a pipe, a device or a socket" in done.err


@pytest.mark.parametrize(
    "changes",
    [
        {"base_model_name_or_path": 3},
        {"base_model_name_or_path": "a\0b"},
        {"r": "x"},
        {"target_modules": {"a": 1}},
        {"rank_pattern": [1]},
        {"revision": []},
    ],
    ids=str,
)
def test_settings_of_an_adapter_that_hold_something_else(cli, tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["o_proj"]} | changes
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    for args in (["merge-absorb", str(tmp_path)], ["generate", str(tmp_path), "--prompt", "x"]):
        done = cli(*args)
        assert done.code == 2, done.err
        assert done.err.startswith("error: ")
        assert "Traceback" not in done.err


@pytest.mark.parametrize("row", [{"prompt": "\ud800", "completion": "x"}, {"prompt": "a\0b", "completion": "\0"}])
def test_rows_of_strange_characters(cli, tmp_path: Path, row: dict[str, str]) -> None:
    rows = [json.dumps({**row, "completion": f"{row['completion']} {i}"}) for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    done = cli("data", "--recipe", "safe", "--set", f"data.path={tmp_path / 'rows.jsonl'}", "--json")
    assert done.code == (2 if "\ud800" in row["prompt"] else 0), done.err
    assert "Traceback" not in done.err


LONG = "x" * 5000


@pytest.mark.parametrize(
    "args",
    [
        ["inspect", LONG],
        ["inspect", "embedded", "--check-weights", LONG],
        ["plan", "--no-data", "--recipe", LONG],
        ["plan", "--no-data", "--recipe", "safe", "--set", f"model.base={LONG}"],
        ["plan", "--no-data", "--recipe", "safe", "--set", f"model.base=a/{LONG}"],
        ["data", "--recipe", "safe", "--set", f"data.path={LONG}.jsonl"],
        ["train", "--recipe", "safe", "--output", LONG],
        ["merge-absorb", LONG],
        ["verify", LONG],
        ["serve-check", LONG, "--engine", "vllm"],
        ["generate", LONG, "--prompt", "x"],
        ["generate", "embedded", "--prompts", LONG],
        ["runs", LONG],
    ],
    ids=lambda args: " ".join(a.replace(LONG, "LONG") for a in args),
)
def test_a_path_that_the_system_refuses(cli, args: list[str]) -> None:
    done = cli(*args)
    assert done.code == 2
    assert "File name too long" in done.err
    assert "Traceback" not in done.err
