"""`train`, end to end on the untrained tiny preset: the run folder, the adapter, resume, stops, and bad input."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mla_tune.errors import CheckError, WorkError
from mla_tune.recipe.load import load_recipe
from mla_tune.runs.folder import RunFolder
from mla_tune.training import loop as train_loop
from tests.helpers.marks import fast_cases
from tests.helpers.runs import WORDS, hash_of, metrics, options, signaled


def test_a_run_leaves_what_it_promises(cli, rows_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = cli("train", "--recipe", "safe", *options(rows_file, out, "train.eval_every=2"))
    assert done.code == 0, done.err
    assert "held-out loss" in done.out
    assert "next: mla-tune merge-absorb" in done.out
    assert {p.name for p in out.iterdir()} >= {
        "adapter",
        "base",
        "recipe.yaml",
        "run.json",
        "metrics.jsonl",
        "loss.png",
    }
    run = json.loads((out / "run.json").read_text())
    assert run["state"] == "done"
    assert run["seed"] == 0
    assert run["steps"] == {"done": 4, "planned": 4}
    assert len(run["base_hash"]["sha256"]) == len(run["data"]["sha256"]) == 64
    assert run["environment"]["torch"] == torch.__version__
    assert run["held_out_loss"]["after"] < run["held_out_loss"]["before"]
    assert sorted(metrics(out)) == [1, 2, 3, 4]
    assert sorted(metrics(out, "eval_loss")) == [0, 2, 4]
    assert load_recipe(str(out / "recipe.yaml")).train.max_steps == 4
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_plain_peft_loads_the_adapter_and_gives_the_trained_loss(cli, rows_file: Path, tmp_path: Path) -> None:
    """The oracle is plain PEFT and transformers: held-out loss, recomputed sample by sample, equals run.json's."""
    from mla_tune.arch.build import architecture
    from mla_tune.data.prepare import prepare
    from mla_tune.model.tokenizer import load_tokenizer

    out = tmp_path / "run"
    assert cli("train", "--recipe", "safe", *options(rows_file, out)).code == 0
    run = json.loads((out / "run.json").read_text())
    recipe = load_recipe(str(out / "recipe.yaml"))
    config = json.loads((out / "base" / "config.json").read_text())
    data = prepare(recipe, architecture(config), load_tokenizer(str(out / "base")))
    held_out = data.sources[0].held_out
    assert held_out is not None
    base = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)

    def loss_of(model: Any) -> float:
        total, count = 0.0, 0
        for sample in held_out.samples:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([sample.input_ids])).logits[0, :-1].double()
            labels = torch.tensor(sample.labels[1:])
            keep = labels != -100
            total -= float(logits.log_softmax(-1)[keep].gather(1, labels[keep, None]).sum())
            count += int(keep.sum())
        return total / count

    assert loss_of(base.eval()) == pytest.approx(run["held_out_loss"]["before"], rel=1e-5)
    tuned = PeftModel.from_pretrained(base, str(out / "adapter")).eval()
    assert loss_of(tuned) == pytest.approx(run["held_out_loss"]["after"], rel=1e-5)


@fast_cases("all-linear")
@pytest.mark.parametrize("recipe", ["safe", "all-linear", "W_UKV-priority"])
def test_plain_peft_gives_the_logits_of_training(
    cli, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    ids = torch.randint(5, 4000, (2, 30), generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    real = train_loop.save_result

    def recording(model: Any, *args: Any) -> None:
        model.eval()
        with torch.no_grad():
            seen.append(model(input_ids=ids).logits.clone())
        real(model, *args)

    monkeypatch.setattr(train_loop, "save_result", recording)
    # sdpa: `recording` calls the model without the borders that packed attention needs
    assert cli("train", "--recipe", recipe, *options(rows_file, tmp_path / "run", "model.attention=sdpa")).code == 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "base", dtype=torch.float32).eval()
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")).eval()(input_ids=ids).logits
    assert (seen[0] - plain).abs().max() > 1e-2
    assert (seen[0] - loaded).abs().max() <= 1e-5


def test_json_is_all_that_standard_output_holds(cli, rows_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = cli("train", "--recipe", "safe", "--json", *options(rows_file, out, "train.max_steps=1"))
    assert json.loads(done.out) == json.loads((out / "run.json").read_text())
    assert "step 1/1" in done.err


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["all-linear", "W_UKV-priority", "attention-only", "bottleneck"])
def test_every_adapter_recipe_trains(cli, rows_file: Path, tmp_path: Path, recipe: str) -> None:
    out = tmp_path / "run"
    done = cli("train", "--recipe", recipe, *options(rows_file, out, "train.max_steps=2"))
    assert done.code == 0, done.err
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    assert all(bool(t.isfinite().all()) for t in tensors.values())
    assert all(bool(t.any()) for name, t in tensors.items() if "lora_B" in name)


def test_full_trains_every_weight_and_writes_a_model(cli, rows_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = cli(
        "train", "--recipe", "full", *options(rows_file, out, "model.dtype=bfloat16", "optimizer.mla_lr_scale=0.65")
    )
    assert done.code == 0, done.err
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert model.dtype == torch.bfloat16
    assert not (out / "adapter").exists()
    run = json.loads((out / "run.json").read_text())
    assert run["adapter"]["learning_rate"] == {"all": 1e-2}
    assert run["held_out_loss"]["after"] < run["held_out_loss"]["before"]


@pytest.mark.slow
def test_ctrl_c_saves_and_resume_ends_bit_equal(rows_file: Path, tmp_path: Path, cli) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    sets = ["train.max_steps=12", "train.epochs=9", "train.packing=false"]
    assert cli("train", "--recipe", "safe", *options(rows_file, straight, *sets)).code == 0

    done = signaled("INT", "safe", options(rows_file, stopped, *sets))
    err = done.stderr
    assert done.returncode == 130, err
    assert "--resume" in err
    assert "Traceback" not in err
    assert json.loads((stopped / "run.json").read_text())["state"] == "interrupted"
    at = RunFolder(stopped).last_checkpoint()
    assert at is not None
    assert at.name == "checkpoint-6", "a step is logged after its end, so the next one is finished"

    again = cli("train", "--recipe", "safe", *options(rows_file, stopped, *sets))
    assert again.code == 2
    assert "unfinished run: continue it with --resume" in again.err
    other = cli("train", "--recipe", "safe", "--resume", *options(rows_file, stopped, *sets, "train.seed=1"))
    assert other.code == 2
    assert "train.seed: 0 then, 1 now" in other.err

    rows = rows_file.read_text()
    rows_file.write_text(rows.replace("Say red", "Say  red"))
    other = cli("train", "--recipe", "safe", "--resume", *options(rows_file, stopped, *sets))
    rows_file.write_text(rows)
    assert other.code == 2
    assert "the data changed since" in other.err

    resumed = cli("train", "--recipe", "safe", "--resume", *options(rows_file, stopped, *sets))
    assert resumed.code == 0, resumed.err
    assert hash_of(stopped / "adapter") == hash_of(straight / "adapter")
    assert metrics(stopped) == metrics(straight)
    before, after = (json.loads((f / "run.json").read_text())["held_out_loss"] for f in (straight, stopped))
    assert before == after


@pytest.mark.slow
def test_the_held_out_loss_does_not_move_with_batch_size_and_packing(cli, tmp_path: Path) -> None:
    """A mean over tokens; a mean of batch means would differ, for completions of such different lengths."""
    rows = [{"prompt": f"Say {w}.", "completion": " ".join([w] * (1 + 9 * (i % 3)))} for i, w in enumerate(WORDS * 3)]
    path = tmp_path / "uneven.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    losses = []
    for i, (batch, packing) in enumerate([(1, "false"), (4, "false"), (3, "true")]):
        sets = [f"train.batch_size={batch}", f"train.packing={packing}", "data.eval_fraction=0.4", "train.max_steps=1"]
        assert cli("train", "--recipe", "safe", *options(path, tmp_path / str(i), *sets)).code == 0
        losses.append(json.loads((tmp_path / str(i) / "run.json").read_text())["held_out_loss"]["before"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[2] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_checkpoint_bit_equal(rows_file: Path, tmp_path: Path, cli) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    sets = ["train.max_steps=12", "train.epochs=9", "train.packing=false", "train.save_every=3", "train.eval_every=4"]
    assert cli("train", "--recipe", "all-linear", *options(rows_file, straight, *sets)).code == 0
    assert signaled("KILL", "all-linear", options(rows_file, killed, *sets)).returncode == -signal.SIGKILL
    at = RunFolder(killed).last_checkpoint()
    assert at is not None
    assert at.name == "checkpoint-3"
    assert not (killed / "adapter").exists()
    assert max(metrics(killed)) == 5, "lines beyond the checkpoint have to be there"
    resumed = cli("train", "--recipe", "all-linear", "--resume", *options(rows_file, killed, *sets))
    assert resumed.code == 0, resumed.err
    assert hash_of(killed / "adapter") == hash_of(straight / "adapter")
    assert metrics(killed) == metrics(straight)
    assert metrics(killed, "eval_loss") == metrics(straight, "eval_loss")
    steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps), "no line twice"
    assert len([s for s in steps if s == 5]) == 1


@pytest.mark.slow
def test_early_stopping_stops_where_nothing_gets_better(cli, rows_file: Path, tmp_path: Path) -> None:
    sets = ["optimizer.learning_rate=1e-12", "train.max_steps=30", "train.eval_every=2", "train.early_stopping=2"]
    done = cli("train", "--recipe", "safe", *options(rows_file, tmp_path / "run", *sets))
    assert done.code == 0, done.err
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["state"] == "done"
    assert run["stopped_early"] is True
    assert run["steps"]["done"] < 30
    better = cli("train", "--recipe", "safe", *options(rows_file, tmp_path / "second", *sets[1:], "train.max_steps=8"))
    assert better.code == 0, better.err
    assert json.loads((tmp_path / "second" / "run.json").read_text())["steps"]["done"] == 8


@pytest.mark.slow
def test_nothing_is_overwritten_unasked(cli, rows_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    refused = cli("train", "--recipe", "safe", *options(rows_file, out))
    assert refused.code == 2
    assert "is not empty" in refused.err
    refused = cli("train", "--recipe", "safe", "--overwrite", *options(rows_file, out))
    assert refused.code == 2
    assert "no run folder of mla-tune, so it is not emptied" in refused.err
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    out = tmp_path / "second"
    assert cli("train", "--recipe", "safe", *options(rows_file, out, "train.max_steps=1")).code == 0
    (out / "mine.txt").write_text("keep me")
    assert cli("train", "--recipe", "safe", "--overwrite", *options(rows_file, out, "train.max_steps=2")).code == 0
    assert (out / "mine.txt").exists()
    assert json.loads((out / "run.json").read_text())["steps"]["done"] == 2


@pytest.mark.slow
def test_dead_gradients_stop_the_run(cli, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = train_loop.attach

    def sabotaged(model: Any, *args: Any, **kwargs: Any) -> Any:
        attached = real(model, *args, **kwargs)
        down = attached.base_model.model.model.layers[0].mlp.down_proj
        down.lora_B["default"].weight.register_hook(torch.zeros_like)
        return attached

    monkeypatch.setattr(train_loop, "attach", sabotaged)
    done = cli("train", "--recipe", "safe", *options(rows_file, tmp_path / "run"))
    assert done.code == CheckError.exit_code == 1
    assert "model.layers.0.mlp.down_proj.weight: its gradient is zero" in done.err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "failed"
    assert not (tmp_path / "run" / "adapter").exists()


def test_out_of_memory_says_what_to_lower(
    cli, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hungry(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(train_loop.RoleTrainer, "training_step", hungry)
    done = cli("train", "--recipe", "safe", *options(rows_file, tmp_path / "run"))
    assert done.code == WorkError.exit_code == 1
    assert "out of GPU memory: lower train.batch_size (now 2" in done.err
    assert "checkpointing: full" in done.err


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops(cli, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = train_loop.RoleTrainer.compute_loss

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = real(self, *args, **kwargs)
        return loss * float("nan") if self.model.training and self.state.global_step >= 2 else loss

    monkeypatch.setattr(train_loop.RoleTrainer, "compute_loss", poisoned)
    done = cli("train", "--recipe", "safe", *options(rows_file, tmp_path / "run", "train.spike.guard=false"))
    assert done.code == 1
    assert "step 3: the loss is nan; lower optimizer.learning_rate" in done.err
    done = cli("train", "--recipe", "safe", *options(rows_file, tmp_path / "guarded", "train.spike.patience=2"))
    assert done.code == 1
    assert "step 4: the loss is nan, for 2 steps in a row; lower optimizer.learning_rate" in done.err


@pytest.mark.slow
def test_a_broken_base_is_found_before_training(cli, rows_file: Path, tmp_path: Path) -> None:
    assert cli("train", "--recipe", "safe", *options(rows_file, tmp_path / "run", "train.max_steps=1")).code == 0
    base = tmp_path / "run" / "base"
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    sets = ["model.preset=null", f"model.base={base}"]
    done = cli("train", "--recipe", "safe", *options(rows_file, tmp_path / "second", *sets))
    assert done.code == 1
    assert "before any training the held-out loss is nan" in done.err


@pytest.mark.parametrize(
    "sets, words",
    [
        (["data.path=nowhere.jsonl"], "nowhere.jsonl"),
        (["data.prompt=question"], "question"),
        (["train.max_length=4096"], "train.max_length is 4096, but this model's window is 2048 tokens"),
        (["train.max_length=8"], "train.max_length"),
        (["adapter.targets=[W_Q]"], "has no W_Q"),
        (
            ["train.early_stopping=1", "train.eval_every=1", "data.eval_fraction=0"],
            "early_stopping needs held-out rows",
        ),
        (["adapter.method=dora"], "PEFT can't do that"),
        (["model.preset=null", "model.base=nowhere/at/all"], "nowhere/at/all"),
        (["model.preset=null", "model.base=deepseek-v3"], "only the config.json is known here"),
        (["model.device=cuda"], "torch sees no GPU here"),
    ],
)
def test_bad_input_is_told_and_nothing_is_written(
    cli, rows_file: Path, tmp_path: Path, sets: list[str], words: str
) -> None:
    if "model.device=cuda" in sets and torch.cuda.is_available():
        sets, words = ["data.path=nowhere.jsonl"], "nowhere.jsonl"
    done = cli("train", "--recipe", "safe", *options(rows_file, tmp_path / "run", *sets))
    assert done.code == 2, done.err
    assert words in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "run").exists()


def test_a_model_without_mla_says_what_it_is(cli, rows_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    folder.mkdir()
    config = {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8}
    (folder / "config.json").write_text(json.dumps(config))
    done = cli(
        "train", "--recipe", "safe", *options(rows_file, tmp_path / "run", "model.preset=null", f"model.base={folder}")
    )
    assert done.code == 2
    assert "grouped-query attention with 32 query and 8 key/value heads" in done.err
