"""loss.png, report.html and the model card: what they show, in odd runs too, and that their commands work."""

from __future__ import annotations

import base64
import json
import math
import os
import shlex
import signal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from matplotlib.colors import to_hex
from safetensors.torch import load_file

from mla_tune.report import plots
from mla_tune.report.card import card
from mla_tune.report.commands import commands
from mla_tune.report.run_report import render, role_rows
from mla_tune.runs.metrics import grouped, read_curves, thinned
from mla_tune.runs.record import RunRecord, TrainedParameters
from mla_tune.training.callbacks import MetricsWriter

ROLES = ["W_DQ", "W_UQ", "W_DKV", "W_UKV", "W_O", "gate", "up", "down", "shared_gate", "shared_up"]
WORDS = ["red", "green", "blue", "one", "two", "three", "stone", "river", "light", "paper", "glass", "north"]


def lines(steps: int, held: bool = True, skipped: tuple[int, ...] = (), cut: int = 0, plus: bool = False) -> list[dict]:
    """metrics.jsonl of a run that was never run."""
    found: list[dict[str, Any]] = [{"step": 0, "eval_loss": 2.0}] if held else []
    for i in range(1, steps + 1):
        rate = 1e-3 * (1 - i / (steps + 1))
        rates = {f"{r}.{p}": rate * f for r in ROLES for p, f in (("A", 1), ("B", 16))} if plus else {}
        line: dict[str, Any] = {"step": i, "loss": 2 - i / steps, "grad_norm": 1.0 + 0.1 * math.sin(i)}
        line["learning_rate"] = rates or {r: rate * (2 if r == "W_UKV" else 1) for r in ROLES}
        line["grad_norms"] = {r: 0.1 * (j + 1) for j, r in enumerate(ROLES)}
        if i in skipped:
            line |= {"loss": None if i % 2 else 50.0, "spike": {"what": "loss", "value": 50.0, "limit": 3.0}}
        if any(s <= i for s in skipped):
            line["skipped"] = sum(s <= i for s in skipped)
        found.append(line | ({"cut": 0.5} if i == cut else {}))
    return [*found, {"step": steps, "eval_loss": 1.1}] if held else found


def write(path: Path, metrics: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return path


@pytest.fixture
def draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Draw metrics; the figure, before it is closed."""
    figures: list[Any] = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda fig, target: (figures.append(fig), save(fig, target)))

    def call(metrics: list[dict], record: RunRecord | None = None) -> Any:
        plots.plot_run(write(tmp_path / "metrics.jsonl", metrics), tmp_path / "loss.png", record or RunRecord())
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
        return figures[-1]

    return call


def by_label(ax: Any) -> dict[str, Any]:
    return {line.get_label().replace("\n", " "): line for line in ax.get_lines() if line.get_label()[0] != "_"}


# ---- curves ----


def test_curves_are_the_lines_and_what_is_broken_is_counted(tmp_path: Path) -> None:
    file = write(tmp_path / "metrics.jsonl", lines(6, skipped=(3, 4), cut=4))
    file.write_text(file.read_text() + '{"step": 7, "lo\n[]\n')
    curves = read_curves(file)
    assert curves.train == [(i, pytest.approx(2 - i / 6)) for i in (1, 2, 5, 6)]
    assert curves.spikes == [
        (3, None, pytest.approx(1 + 0.1 * math.sin(3))),
        (4, 50.0, pytest.approx(0.9243, abs=1e-3)),
    ]
    assert (curves.held_out, curves.cuts, curves.best) == ([(0, 2.0), (6, 1.1)], [(4, 0.5)], (6, 1.1))
    assert (curves.steps, curves.skipped, curves.broken) == (6, 2, 2)
    assert read_curves(tmp_path / "none").best is None


def test_thinning_keeps_every_peak_and_both_ends() -> None:
    points = [(i, 1000.0 if i == 7777 else float(i % 7)) for i in range(20_000)]
    kept = thinned(points, 100)
    assert len(kept) <= 102
    assert (7777, 1000.0) in kept
    assert kept[0][0] <= 7
    assert kept[-1] == points[-1]
    assert kept == sorted(kept)
    assert thinned(points[:100], 100) == points[:100]


def test_equal_curves_share_a_name() -> None:
    one, two = [(1, 0.1)], [(1, 0.2)]
    assert list(grouped({"W_O": one, "gate": one})) == ["all roles"]
    assert list(grouped({"W_O": one})) == ["W_O"]
    assert list(grouped({"W_O": one, "gate": one, "W_UKV": two})) == ["W_O, gate", "W_UKV"]
    assert list(grouped({"W_O.A": one, "W_O.B": two, "gate.A": one, "gate.B": two})) == ["all roles, A", "all roles, B"]


# ---- loss.png ----


def test_the_plot_shows_losses_rates_norms_spikes_and_cuts(draw: Any) -> None:
    figure = draw(lines(40, skipped=(20, 21), cut=21), RunRecord(base="some/model", data={"source": "a$b$"}))
    loss, rate, norm = figure.axes
    assert list(by_label(loss)) == [
        "train, each step", "train, running mean", "held out", "skipped (2)", "learning rates cut",
    ]  # fmt: skip
    assert len(by_label(loss)["train, each step"].get_xdata()) == 38
    assert list(by_label(loss)["held out"].get_ydata()) == [2.0, 1.1]
    marks = by_label(loss)["skipped (2)"]
    assert (marks.get_marker(), list(marks.get_xdata())) == ("x", [20, 21])
    assert max(marks.get_ydata()) <= loss.get_ylim()[1] < 3  # a loss of 50 doesn't flatten the others
    assert sorted(by_label(rate)) == sorted([", ".join(r for r in ROLES if r != "W_UKV"), "W_UKV"])
    assert list(by_label(norm)) == [*ROLES, "all together"]
    assert norm.get_yscale() == "log"
    for ax in figure.axes:  # the cut's vertical line
        assert any(list(line.get_xdata()) == [21, 21] for line in ax.get_lines())
    looks = [(to_hex(line.get_color()), line.get_linestyle()) for line in by_label(norm).values()]
    assert len(set(looks)) == len(looks)


def test_with_lora_plus_the_rates_of_B_are_dashed(draw: Any) -> None:
    rates = by_label(draw(lines(5, plus=True)).axes[1])
    assert {name: line.get_linestyle() for name, line in rates.items()} == {"all roles, A": "-", "all roles, B": "--"}


def test_odd_runs_are_plotted_too(draw: Any, tmp_path: Path) -> None:
    one = draw(lines(1)).axes[0]
    assert by_label(one)["train, running mean"].get_marker() == "o"
    assert "held out" not in by_label(draw(lines(12, held=False)).axes[0])
    everything = by_label(draw(lines(12, held=False, skipped=tuple(range(1, 13)))).axes[0])
    assert list(everything) == ["skipped (12)"]
    long = draw(lines(20_000, skipped=(9_000,)))
    assert all(len(line.get_xdata()) < 2000 for ax in long.axes for line in ax.get_lines())
    with pytest.raises(ValueError, match="nothing to plot"):
        draw([{"step": 0, "eval_loss": 2.0}])


# ---- report.html ----


class Page(HTMLParser):
    """Tags, attributes, and the text of each <pre class=command>."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.commands: list[str] = []
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append(tag)
        self.links += [str(named[k]) for k in ("src", "href", "srcset", "data") if k in named]
        self._in = f"{tag}.{named.get('class', '')}"
        if self._in == "pre.command":
            self.commands.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "pre.command":
            self.commands[-1] += data


def test_every_text_is_escaped_and_nothing_is_loaded(tmp_path: Path) -> None:
    bad = "</pre><script src=http://evil>alert(1)</script><img src=//evil>\"'"
    run: dict[str, Any] = {
        "state": bad, "error": bad, "base": bad, "model_type": bad, "environment": {bad: bad}, "kernels": {bad: bad},
        "data": {"source": bad}, "working_folder": bad, "device": bad,
        "adapter": {"method": bad, "matrices": {bad: 1}, "trainable_params": 1},
        "samples": {"seconds": {"before": 1.0}, "answers": [{"prompt": bad, "reference": bad, "before": bad}]},
    }  # fmt: skip
    page = Page(
        render(tmp_path / "a<b>&'c", RunRecord.from_json(run, "run.json"), read_curves(tmp_path / "none"), "aGk=")
    )
    assert "script" not in page.tags
    assert page.links == ["data:image/png;base64,aGk="]


def test_a_run_that_never_began_has_a_report_without_curves(tmp_path: Path) -> None:
    text = render(tmp_path, RunRecord(state="failed", error="no room"), read_curves(tmp_path / "none"), None)
    assert "No step was logged." in text
    assert "no room" in text


def test_two_rates_of_a_role_are_both_shown() -> None:
    rates = {"W_O.A": 1e-4, "W_O.B": 1.6e-3}
    trained = TrainedParameters("lora", {"W_O": 4}, {"W_O": 8}, {"W_O": 1234}, learning_rate=rates)
    assert role_rows(RunRecord(adapter=trained)) == [
        {"role": "W_O", "matrices": "4", "rank": "8", "params": "1,234", "rate": "A 1.00e-04, B 1.60e-03"}
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name a shell would take apart, with rows in it."""
    folder = tmp_path_factory.mktemp("it's $HOME & more")
    rows = [{"prompt": f"Say {w} twice.", "completion": f"{w} {w}"} for w in WORDS * 3]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def options(out: str, *sets: str) -> list[str]:
    base = ["model.preset=tiny", "model.base=null", "data.path=rows.jsonl", "train.max_steps=4", "train.batch_size=2"]
    base += ["train.max_length=64", "optimizer.learning_rate=1e-2", "output.samples=2"]
    return ["train", "--recipe", "safe", "--output", out, *(x for s in [*base, *sets] for x in ("--set", s))]


@pytest.mark.slow
def test_the_commands_of_the_report_reproduce_the_run_and_merge_it(
    cli, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    assert cli(*options("my run")).code == 0
    text = (place / "my run" / "report.html").read_text()
    page = Page(text)
    assert page.links == [
        "data:image/png;base64," + base64.b64encode((place / "my run/loss.png").read_bytes()).decode()
    ]
    assert f'<pre class="cd">cd {shlex.quote(str(place))}</pre>' in text.replace("&#39;", "'").replace(
        "&#34;", '"'
    ).replace("&amp;", "&")
    named = {line.split()[1]: shlex.split(line)[1:] for line in page.commands if line.startswith("mla-tune")}
    assert cli(*named["train"]).code == 0
    first, again = (load_file(place / n / "adapter/adapter_model.safetensors") for n in ("my run", "my run-again"))
    assert first.keys() == again.keys()
    assert all(bool((first[k] == again[k]).all()) for k in first)
    merged = cli(*named["merge-absorb"])
    assert merged.code == 0, merged.err
    assert cli(*named["verify"], "--no-logits").code == 0
    assert (place / "my run/merged/config.json").exists()
    assert page.commands[-1] == "vllm serve 'my run/merged'"

    # And the card beside it.
    found = ModelCard.load(place / "my run" / "adapter" / "README.md")
    data = found.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("peft", "text-generation")
    assert data["tags"] == ["lora", "mla", "mla-tune"]
    assert "base_model" not in data  # a folder of this machine is no hub id
    assert "More Information Needed" not in found.text
    assert str(place) not in found.content
    run = json.loads((place / "my run" / "run.json").read_text())
    assert f"{run['held_out_loss']['after']:.4f} after" in found.text
    for role in run["adapter"]["matrices"]:
        assert f"| {role} |" in found.text


@pytest.mark.slow
def test_an_interrupted_run_has_plot_and_report_and_goes_on_by_its_command(
    cli, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    out = place / "stopped"
    real = MetricsWriter.on_step_end

    def stop(self: MetricsWriter, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        real(self, args, state, *rest, **kwargs)
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "on_step_end", stop)
        assert cli(*options("stopped")).code == 130
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "report.html").read_text()
    assert "interrupted" in text
    assert "not asked: the run has not ended" in text
    before = json.loads((out / "run.json").read_text())["samples"]["answers"]
    assert cli(*shlex.split(Page(text).commands[0])[1:]).code == 0
    run = json.loads((out / "run.json").read_text())
    assert (run["state"], run["error"]) == ("done", None)
    after = run["samples"]["answers"]
    assert [a["before"] for a in after] == [a["before"] for a in before]
    assert None not in [a["after"] for a in after]


@pytest.mark.slow
def test_a_report_that_cannot_be_written_fails_no_run(cli, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mla_tune.report import run_report

    def full(*args: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(place)
    monkeypatch.setattr(run_report, "render", full)
    done = cli(*options("full", "train.max_steps=1"))
    assert done.code == 0
    assert "report.html was not written" in done.err
    assert json.loads((place / "full/run.json").read_text())["state"] == "done"


# ---- model card ----


def test_a_hub_base_and_hub_data_are_in_the_front_matter(tmp_path: Path) -> None:
    run = {
        "base": "deepseek-ai/DeepSeek-V2-Lite", "base_path": "deepseek-ai/DeepSeek-V2-Lite",
        "model_type": "deepseek_v2",
        "data": {"source": "a | b", "train": {"samples": 5, "trained_tokens": 10}}, "seed": 0, "dtype": "bfloat16",
        "device": "cpu", "environment": {"mla_tune": "0"},
        "adapter": {"method": "lora", "trainable_params": 3, "matrices": {"W_O": 1}},
    }  # fmt: skip
    found = ModelCard(
        card(tmp_path, RunRecord.from_json(run, "run.json"), ["mbpp", "org/rows", "rows.jsonl", "data/rows.csv"])
    )
    data = found.data.to_dict()
    assert data["base_model"] == "deepseek-ai/DeepSeek-V2-Lite"
    assert data["tags"][0] == "base_model:adapter:deepseek-ai/DeepSeek-V2-Lite"
    assert data["datasets"] == ["google-research-datasets/mbpp", "org/rows"]
    assert "a \\| b" in found.text


def test_commands_are_quoted() -> None:
    for _, line in commands(Path("a b'c"), RunRecord(state="done", adapter=TrainedParameters("lora"))):
        assert any(word.startswith("a b'c") for word in shlex.split(line))
