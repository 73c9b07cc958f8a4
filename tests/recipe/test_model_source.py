"""What a user may name as a model, and the error for a name that is none of these."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mla_tune.errors import FileError, InputError
from mla_tune.recipe.model_source import load_config
from mla_tune.resources import model_names, preset_names

CONFIG = {"model_type": "deepseek_v3", "kv_lora_rank": 8}


@pytest.mark.parametrize("name", ["deepseek-v3", "DeepSeek-V3", "deepseek_v3", "DEEPSEEKV3", "DeepSeek-R1"])
def test_shipped_names_in_any_spelling(name: str) -> None:
    config, where, folder = load_config(name)
    assert (config["num_hidden_layers"], where, folder) == (61, name, None)


def test_every_shipped_name_and_preset() -> None:
    for name in (*model_names(), *preset_names()):
        config = load_config(name)[0]
        assert config.get("text_config", config)["kv_lora_rank"]


def test_dots_in_a_name_may_be_left_out() -> None:
    assert load_config("glm47flash")[0] == load_config("GLM-4.7-Flash")[0]


def test_embedded_is_there_even_before_its_weights() -> None:
    assert load_config("embedded")[0]["vocab_size"] == 4096


def test_a_folder_and_its_config_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert load_config(str(tmp_path)) == (CONFIG, f"{tmp_path}/config.json", tmp_path)
    file = str(tmp_path / "config.json")
    assert load_config(file) == (CONFIG, file, tmp_path)


def test_a_path_wins_where_it_is_written_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(CONFIG))
    assert load_config("./tiny")[0] == CONFIG
    assert load_config("tiny")[0] != CONFIG


@pytest.mark.parametrize("sub", ["", "adapter"])
def test_an_adapter_points_to_its_base(tmp_path: Path, sub: str) -> None:
    folder = tmp_path / sub
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(FileError, match=r"an adapter, not a model.*some/base"):
        load_config(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "error", "what"),
    [
        (b'{"a": 1,\n', FileError, "config.json:2: the model's configuration is not valid JSON"),
        (b"[1]", FileError, "must hold a JSON object, not a list"),
        (b"\xff\xfe", FileError, "text must be UTF-8, and this is UTF-16"),
    ],
)
def test_a_broken_config_json(tmp_path: Path, text: bytes, error: type[Exception], what: str) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(error, match=what):
        load_config(str(tmp_path))


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"no config\.json in this folder"):
        load_config(str(tmp_path))


def test_an_unknown_name_lists_what_ships() -> None:
    with pytest.raises(
        InputError, match=r"did you mean 'minicpm3-4b'.*Shipped: .*deepseek-v2, .*presets: base"
    ) as error:
        load_config("minicpm3-b4")
    assert all(name in str(error.value) for name in model_names())


@pytest.mark.parametrize("path", ["./none", "/none/such", "a/b/c", "none.json", "../x"])
def test_a_path_that_is_not_there_never_asks_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mla_tune.recipe.model_source._from_hub", lambda model: pytest.fail("asked the hub"))
    with pytest.raises(FileError, match="no such file or folder"):
        load_config(path)


def test_a_hub_id_that_is_cached_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a: str(tmp_path / "config.json"))
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url: pytest.fail("used the network"))
    assert load_config("some/model") == (CONFIG, "some/model (hub) config.json", None)


def test_a_hub_id_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a: None)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a: str(tmp_path / "config.json"))
    assert load_config("some/model")[0] == CONFIG


def test_an_unreachable_hub_says_so_and_lists_what_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(url: str) -> None:
        raise ConnectionError("Name or service not known\nmore")

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a: None)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    with pytest.raises(FileError, match=r"\(Name or service not known\); did you mean 'kimi-k2'\? Shipped"):
        load_config("moonshotai/Kimi-K2-Base")
