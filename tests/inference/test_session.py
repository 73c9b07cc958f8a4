"""`generate` and `chat` with several unmerged adapters.

The oracle is each adapter's own merged checkpoint, in a process of its own, through stock attention.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from mla_tune.adapter.files import open_adapter
from mla_tune.checkpoint.index import Checkpoint
from mla_tune.errors import FileError, InputError
from mla_tune.inference.requests import GenerationSettings, Request, read_requests
from mla_tune.inference.session import Session
from mla_tune.resources import EMBEDDED_MODEL

ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PROMPTS = ["Write a function that adds two numbers.", "What is 3 + 4?", "Name a color.", "Count to three."]
SHORT = GenerationSettings(max_new_tokens=12)


def make_adapter(folder: Path, seed: int, **settings: Any) -> Path:
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(**{"r": 4 + seed, "target_modules": ATTENTION} | settings))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(0.15 * torch.randn_like(p))
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "one": str(make_adapter(folder / "one", 1)),
        "two.b": str(make_adapter(folder / "two", 2, use_dora=True)),
        "mlp": str(make_adapter(folder / "mlp", 3, target_parameters=["shared_experts.up_proj.weight"])),
        "experts": str(make_adapter(folder / "experts", 4, target_parameters=EXPERTS)),
    }


@pytest.fixture(scope="module")
def oracle(adapters: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Adapter → answers of its checkpoint, merged by merge-absorb, to all prompts, from stock transformers."""
    folder = tmp_path_factory.mktemp("merged")
    program = str(Path(sys.executable).parent / "mla-tune")
    texts = {}
    for name, adapter in [(None, None), *adapters.items()]:
        model = str(EMBEDDED_MODEL)
        if adapter is not None:
            model = str(folder / str(name))
            merge = [program, "merge-absorb", adapter, "--base", "embedded", "--out", model, "--no-verify"]
            subprocess.run([*merge, "--dtype", "float32"], check=True, capture_output=True)
        code = f"""
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({model!r})
model = AutoModelForCausalLM.from_pretrained({model!r}, dtype=torch.float32).eval()
texts = []
for prompt in {PROMPTS!r}:
    turn = [{{"role": "user", "content": prompt}}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    texts.append(tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True))
print(json.dumps(texts))
"""
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        texts[name] = json.loads(done.stdout.splitlines()[-1])
    return texts


@pytest.fixture(scope="module")
def session(adapters: dict[str, str]) -> Session:
    return Session("embedded", adapters)


def ask(session: Session, *names: str | None, settings: GenerationSettings = SHORT) -> list[Any]:
    """Answer one prompt for each of the adapters `names`."""
    return session.answer([Request(PROMPTS[i % 4], adapter=n) for i, n in enumerate(names)], settings)


@pytest.mark.slow
def test_adapters_differ(oracle: dict[str, list[str]]) -> None:
    assert len({tuple(texts) for texts in oracle.values()}) == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, "one", "two.b", "mlp", "experts"])
def test_one_adapter(session: Session, oracle: dict[str, list[str]], name: str | None) -> None:
    answers = ask(session, name, name, name, name)
    assert [a.text for a in answers] == oracle[name]
    assert {(a.adapter, a.batch) for a in answers} == {(name, 4)}


@pytest.mark.slow
@pytest.mark.parametrize("turned", [False, True])
def test_a_mixed_batch(adapters: dict[str, str], oracle: dict[str, list[str]], turned: bool) -> None:
    """LoRA, DoRA, adapters on shared and routed experts, and the base in one batch; loaded in both orders."""
    session = Session("embedded", dict(reversed(adapters.items())) if turned else adapters)
    names = ["one", "experts", None, "two.b", "mlp", "experts", "one", None]
    answers = ask(session, *names)
    assert [a.text for a in answers] == [oracle[name][i % 4] for i, name in enumerate(names)]
    assert {a.batch for a in answers} == {8}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"modules_to_save": ["model.norm"]}, {"modules_to_save": ["lm_head"]}, {"target_parameters": ["gate.weight"]}],
)
def test_adapters_that_can_not_be_mixed_get_their_own_batches(
    adapters: dict[str, str], oracle: dict[str, list[str]], tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Those with modules_to_save or on a router; the others share a batch.  The oracle is PEFT's merge."""
    folder = str(make_adapter(tmp_path / "apart", 5, **settings))
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, folder).merge_and_unload().eval()
    session = Session("embedded", {"apart": folder, "experts": adapters["experts"], "one": adapters["one"]})
    names = ["one", "apart", None, "experts"]
    ids = session.tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPTS[1]}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = merged.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    right = {name: oracle[name][i] for i, name in enumerate(names) if name != "apart"}
    right["apart"] = session.tokenizer.decode(out, skip_special_tokens=True)
    for _ in range(2):
        answers = ask(session, *names)
        assert [a.text for a in answers] == [right[name] for name in names]
        assert [a.batch for a in answers] == [3, 1, 3, 3]


def test_loading_gives_no_warning(tmp_path: Path) -> None:
    """PEFT would warn that it ignores patterns which it uses, and that a deleted adapter was active."""
    patterns = {"rank_pattern": {"mlp.gate_proj.weight": 3}, "alpha_pattern": {"mlp.gate_proj.weight": 5}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folders = {
            "a": str(make_adapter(tmp_path / "a", 1, target_parameters=["mlp.gate_proj.weight"], **patterns)),
            "b": str(make_adapter(tmp_path / "b", 2, target_parameters=EXPERTS)),
        }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ask(Session("embedded", folders), "a", "b", None)
    assert [str(w.message) for w in caught if not issubclass(w.category, (FutureWarning, DeprecationWarning))] == []


@pytest.mark.slow
def test_acceptance_of_unmerged_adapters(session: Session, oracle: dict[str, list[str]]) -> None:
    """Base, A, B, A, base and a mixed batch after one another do not affect each other."""
    for name in (None, "one", "two.b", "one", None):
        assert ask(session, name)[0].text == oracle[name][0]
    ask(session, "one", "two.b", None)
    assert ask(session, None)[0].text == oracle[None][0]
    assert [a.text for a in ask(session, "one", "two.b")] == [oracle["one"][0], oracle["two.b"][1]]


def test_batches(session: Session) -> None:
    answers = ask(session, *["one", None] * 3, settings=GenerationSettings(max_new_tokens=2, batch_size=4))
    assert [a.batch for a in answers] == [4, 4, 4, 4, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["absorbed", "expanded"])
def test_attention(adapters: dict[str, str], oracle: dict[str, list[str]], attention: str) -> None:
    session = Session("embedded", {"one": adapters["one"]}, attention)
    assert ask(session, "one")[0].text == oracle["one"][0]


def test_streamed_text_is_the_answer(session: Session) -> None:
    parts: list[str] = []
    (answer,) = session.answer([Request(PROMPTS[0], adapter="one")], SHORT, parts.append)
    assert "".join(parts).strip() == answer.text.strip()
    assert len(parts) > 1


def test_sampling(session: Session) -> None:
    def text(seed: int, top_p: float) -> str:
        return ask(
            session, "one", settings=GenerationSettings(max_new_tokens=12, temperature=1.5, top_p=top_p, seed=seed)
        )[0].text

    assert text(1, 1.0) == text(1, 1.0) != text(2, 1.0)
    assert text(1, 0.01) == text(2, 0.01) == ask(session, "one")[0].text, "of the likeliest token alone"


def test_messages(session: Session) -> None:
    said = [{"role": "user", "content": PROMPTS[0]}]
    one, other = session.answer([Request(messages=said), Request(PROMPTS[0])], SHORT)
    assert one.text == other.text
    more = [*said, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Again."}]
    (third,) = session.answer([Request(messages=more)], SHORT)
    assert third.prompt == "Again."
    assert third.text != one.text


# Named errors ---------------------------------------------------------------------------------------------------------


def test_an_unknown_adapter(session: Session) -> None:
    with pytest.raises(InputError, match=r"no adapter is called 'onee'; did you mean 'one'\? There are: one, two\.b"):
        ask(session, "one", "onee")


def test_the_base_beside_an_adapter_that_replaces_its_tensors(adapters: dict[str, str], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapters["one"], tmp_path / "x")
    file = tmp_path / "x" / "adapter_model.safetensors"
    embedding = load_file(EMBEDDED_MODEL / "model.safetensors")["model.embed_tokens.weight"].float()
    save_file(load_file(file) | {"base_model.model.model.embed_tokens.weight": embedding + 0.1}, file)
    session = Session("embedded", {"x": str(tmp_path / "x")})
    assert ask(session, "x")[0].text
    with pytest.raises(InputError, match=r"the adapter has replaced model\.embed_tokens\.weight of the base"):
        ask(session, "x", None)


def test_an_adapter_of_another_base(adapters: dict[str, str], tmp_path: Path) -> None:
    """The base is recognized by its hash; the shapes are the same."""
    run = tmp_path / "run"
    shutil.copytree(adapters["one"], run / "adapter")
    hashed = {"kind": "files", "sha256": "0" * 64}
    (run / "run.json").write_text(json.dumps({"base_path": str(EMBEDDED_MODEL), "base_hash": hashed}))
    with pytest.raises(InputError, match=r"does not fit .*: it was trained on another base \(compare base_path"):
        Session("embedded", {"x": str(run)})


def test_an_adapter_of_other_shapes(adapters: dict[str, str], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapters["one"], tmp_path / "x")
    file = tmp_path / "x" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if "o_proj.lora_B" in k)
    tensors[key] = tensors[key][:-1].contiguous()
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"x: this adapter does not fit .*o_proj"):
        Session("embedded", {"x": str(tmp_path / "x")})


def test_other_folders(tmp_path: Path, adapters: dict[str, str]) -> None:
    with pytest.raises(FileError, match="not an adapter folder"):
        Session("embedded", {"x": str(tmp_path)})
    with pytest.raises(InputError, match="'base' means the model without an adapter"):
        Session("embedded", {"base": adapters["one"]})


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", r"rows.jsonl:2: the request is not valid JSON"),
        ('{"adapter": "x"}', r"rows.jsonl:2: expected an object with either prompt or messages"),
        ('{"prompt": "a", "messages": []}', "either prompt or messages"),
        ('{"prompt": "a", "lora": "x"}', "either prompt or messages"),
        ('{"prompt": " "}', "a text that is not empty"),
        ('{"messages": [{"role": "user"}]}', "role and content"),
        ('{"prompt": "a", "adapter": 3}', "adapter must be a name"),
    ],
)
def test_lines_of_a_file(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(InputError, match=words):
        read_requests(file, None)


def test_a_file_of_requests(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a"}\n\n{"prompt": "b", "adapter": "base"}\n{"prompt": "c", "adapter": "x"}\n')
    assert [r.adapter for r in read_requests(file, "own")] == ["own", None, "x"]
    file.write_text("\n")
    with pytest.raises(InputError, match="holds no requests"):
        read_requests(file, None)
    with pytest.raises(FileError, match="no such file: the file of prompts is missing"):
        read_requests(tmp_path / "nowhere", None)


# The commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_generate_command(cli: Any, adapters: dict[str, str], oracle: dict[str, list[str]], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": PROMPTS[0], "adapter": "one"}, {"prompt": PROMPTS[1]}, {"prompt": PROMPTS[2], "adapter": "d"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    named = ["--adapter", f"one={adapters['one']}", "--adapter", f"d={adapters['two.b']}"]
    done = cli("generate", "embedded", *named, "--prompts", str(file), "-n", "12", "--json")
    assert done.code == 0, done.err
    answers = json.loads(done.out)
    assert [a["text"] for a in answers] == [oracle["one"][0], oracle[None][1], oracle["two.b"][2]]
    assert [a["adapter"] for a in answers] == ["one", None, "d"]
    both = cli("generate", "embedded", *named, "--prompt", PROMPTS[0], "-n", "12")
    assert both.code == 0, both.err
    assert both.out.index("── one") < both.out.index("── d")
    streamed = cli("generate", "embedded", *named[:2], "--prompt", PROMPTS[0], "-n", "12", "--stream")
    assert streamed.out.strip() == oracle["one"][0].strip()


@pytest.mark.parametrize(
    "args, words",
    [
        (("--prompt", "x", "--prompts", "y"), "give either --prompt TEXT, or --prompts"),
        ((), "give either --prompt TEXT, or --prompts"),
        (("--prompts", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
        (("--prompt", "x", "--adapter", "=y"), "expected NAME=DIR or DIR"),
        (("--prompt", "x", "--adapter", "a=b", "--adapter", "a=c"), "another adapter is already called 'a'"),
        (("--prompt", "x", "--stream", "--json"), "--stream prints one answer"),
    ],
)
def test_wrong_arguments(cli: Any, args: tuple[str, ...], words: str) -> None:
    done = cli("generate", "embedded", *args)
    assert done.code == 2
    assert words in done.err
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_chat(adapters: dict[str, str], oracle: dict[str, list[str]]) -> None:
    lines = [PROMPTS[0], "/adapter two", "/reset", "/adapter base", PROMPTS[0], "/adapter nobody", "/what", "", "/help"]
    program = str(Path(sys.executable).parent / "mla-tune")
    command = [program, "chat", "embedded", "--adapter", f"one={adapters['one']}", "--max-new-tokens", "12"]
    done = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{oracle['one'][0]}\n{oracle[None][0]}".strip()
    for words in (
        "answering with one",
        "conversation forgotten",
        "no adapter is called 'nobody'",
        "there is no command /",
        "/reset          forget",
    ):
        assert words in done.stderr


@pytest.mark.slow
def test_chat_remembers(adapters: dict[str, str], session: Session) -> None:
    program = str(Path(sys.executable).parent / "mla-tune")
    said = "Say red.\nAgain.\n"
    done = subprocess.run(
        [program, "chat", "embedded", "-n", "12"], input=said, capture_output=True, text=True, check=True
    )
    turns = [{"role": "user", "content": "Say red."}]
    (first,) = session.answer([Request(messages=turns)], SHORT)
    turns += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "Again."}]
    (second,) = session.answer([Request(messages=turns)], SHORT)
    assert done.stdout.strip() == f"{first.text}\n{second.text}".strip()


@pytest.mark.slow
def test_a_base_of_the_hub(adapters: dict[str, str], oracle: dict[str, list[str]], tmp_path: Path) -> None:
    """A base from the hub's cache, without network: adapters are compared with the model in memory."""
    cache = tmp_path / "models--me--tiny"
    shutil.copytree(EMBEDDED_MODEL, cache / "snapshots" / "1234")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("1234")
    named = [f"--adapter={name}={adapters[name]}" for name in ("mlp", "experts")]
    command = [str(Path(sys.executable).parent / "mla-tune"), "generate", "me/tiny", "--json", "-n", "12", *named]
    done = subprocess.run(
        [*command, "--prompt", PROMPTS[0]],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert [(a["text"], a["batch"]) for a in json.loads(done.stdout)] == [(oracle[n][0], 2) for n in ("mlp", "experts")]


def test_open_adapter_agrees(adapters: dict[str, str], session: Session) -> None:
    """The fixture's adapters adapt what their names say."""
    tensors = Checkpoint.open(EMBEDDED_MODEL).tensors
    opened = open_adapter(Path(adapters["experts"]), session.loaded.arch, tensors)
    assert any(delta.site.is_experts for delta in opened.deltas)
