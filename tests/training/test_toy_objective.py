"""An objective that is registered here alone trains: the socket needs no other file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM

from mla_tune.recipe.load import load_recipe
from mla_tune.sockets import OBJECTIVES
from mla_tune.training.objective import Objective, SummedLoss

SMOOTHING = 0.2
WORDS = ["red", "green", "blue", "one", "two", "three", "stone", "river", "light", "paper", "glass", "north"]


class LabelSmoothing(Objective):
    """Cross-entropy with smoothed labels, from logits, and the share of tokens that the model gets right."""

    row_kinds = ("prompt",)
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    def loss(self, model: Any, batch: Mapping[str, Any]) -> SummedLoss:
        labels = batch["labels"][:, 1:]
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1].float()
        keep = labels != -100
        total = F.cross_entropy(logits[keep], labels[keep], reduction="sum", label_smoothing=SMOOTHING)
        return SummedLoss(total, {"accuracy": (logits[keep].argmax(-1) == labels[keep]).sum()})


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with OBJECTIVES.registered("smoothed", LabelSmoothing):
        yield


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": f"Say {w} {'very ' * i}loud.", "completion": f"{w} {w}"} for i in range(3) for w in WORDS]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def options(rows: Path, out: Path, *sets: str) -> list[str]:
    base = ["model.preset=tiny", "model.base=null", f"data.path={rows}", "train.objective=smoothed"]
    base += ["train.max_steps=4", "train.batch_size=4", "train.max_length=64", "train.packing=false"]
    base += ["optimizer.learning_rate=1e-2", "output.samples=0"]
    return ["train", "--recipe", "safe", "--output", str(out), *(x for s in [*base, *sets] for x in ("--set", s))]


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_registered_objective_trains_and_is_evaluated(cli, rows_file: Path, tmp_path: Path) -> None:
    """The oracle is plain PEFT and transformers, sample by sample in float64."""
    from mla_tune.arch.build import architecture
    from mla_tune.data.prepare import prepare
    from mla_tune.model.tokenizer import load_tokenizer

    out = tmp_path / "run"
    done = cli(*options(rows_file, out, "train.eval_every=2"))
    assert done.code == 0, done.err
    run = json.loads((out / "run.json").read_text())
    assert run["state"] == "done"
    assert run["held_out_loss"]["after"] < run["held_out_loss"]["before"]

    recipe = load_recipe(str(out / "recipe.yaml"))
    assert recipe.train.objective == "smoothed"
    config = json.loads((out / "base" / "config.json").read_text())
    held_out = prepare(recipe, architecture(config), load_tokenizer(str(out / "base"))).sources[0].held_out
    assert held_out is not None

    def figures(model: Any) -> tuple[float, float]:
        total, right, count = 0.0, 0, 0
        for sample in held_out.samples:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([sample.input_ids])).logits[0, :-1].double()
            labels = torch.tensor(sample.labels[1:])
            keep = labels != -100
            log_p = logits.log_softmax(-1)[keep]
            own = log_p.gather(1, labels[keep, None]).squeeze(1)
            total -= float(((1 - SMOOTHING) * own + SMOOTHING * log_p.mean(-1)).sum())
            right += int((log_p.argmax(-1) == labels[keep]).sum())
            count += int(keep.sum())
        return total / count, right / count

    base = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32).eval()
    evaluated = {x["step"]: x for x in lines_of(out) if "eval_loss" in x}
    for when, step in (("before", 0), ("after", 4)):
        loss, accuracy = figures(base if when == "before" else PeftModel.from_pretrained(base, out / "adapter").eval())
        assert loss == pytest.approx(run["held_out_loss"][when], rel=1e-5)
        assert evaluated[step]["eval_metrics"] == {"accuracy": pytest.approx(accuracy)}


@pytest.mark.slow
def test_loss_and_metric_are_means_over_the_whole_step(cli, rows_file: Path, tmp_path: Path) -> None:
    """However a global batch is cut into micro-batches; float32 sums in another order differ by 1e-6."""
    found = []
    for size, times in ((4, 1), (2, 2), (1, 4)):
        out = tmp_path / str(size)
        sets = (f"train.batch_size={size}", f"train.gradient_accumulation_steps={times}", "train.max_steps=2")
        assert cli(*options(rows_file, out, *sets)).code == 0
        found.append([(x["loss"], x["metrics"]["accuracy"], x["grad_norm"]) for x in lines_of(out) if "loss" in x])
    assert found[0][1][0] < found[0][0][0]
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            assert theirs == pytest.approx(ours, rel=1e-4)


def test_rows_that_it_does_not_take_are_refused(cli, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{w} is a word. " * 4}) + "\n" for w in WORDS))
    done = cli(*options(rows, tmp_path / "run"))
    assert done.code == 2
    assert "train.objective: smoothed takes rows of the kind prompt, and the rows of" in done.err
    assert not (tmp_path / "run").exists()


def test_a_column_that_rows_lack_is_named(cli, rows_file: Path, tmp_path: Path) -> None:
    class Pairs(LabelSmoothing):
        columns: ClassVar[tuple[str, ...]] = ("input_ids", "rejected_ids")

    with OBJECTIVES.registered("pairs", Pairs):
        done = cli(*options(rows_file, tmp_path / "run", "train.objective=pairs"))
    assert done.code == 2
    assert "train.objective: pairs needs the columns rejected_ids" in done.err
