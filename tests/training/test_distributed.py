"""Runs of two processes on a CPU (gloo): the oracle is one process with the same global batch."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mla_tune.resources import CONFIGS, EMBEDDED_MODEL
from mla_tune.training.distributed.launch import NAMES, environment_of
from tests.helpers.fp8 import make_fp8
from tests.helpers.runs import cut_back
from tests.helpers.spikes import BAD, rows_with_bad_batches

WORDS = ["red", "green", "blue", "one", "two", "three", "stone", "river", "wood", "rain", "a much longer answer"]
#: 19 training rows in batches of 4: neither an epoch nor the held-out rows are whole batches.
SETS = ["train.max_steps=8", "train.max_length=64", "train.packing=false", "train.log_every=1", "train.save_every=4"]
SETS += ["train.eval_every=4", "train.keep_checkpoints=9", "optimizer.learning_rate=1e-2", "data.eval_fraction=0.1"]
SETS += ["model.device=cpu", "model.attention=packed", "model.experts=eager", "adapter.targets=all-linear"]
#: What starts two processes: torchrun, or our own launcher.
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mla_tune")
WAYS: dict[str, list[str]] = {
    "ddp": [],
    "fsdp2": ["--processes", "2", "--launch", "fsdp2"],
    "zero3": ["--processes", "2", "--launch", "zero3"],
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [
        {"prompt": f"Say {w} {n}.", "completion": f"{w} {w}" * (1 + i % 3)} for n in "ab" for i, w in enumerate(WORDS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def command(rows: Path, out: Path, batch: int, *more: str) -> list[str]:
    """`train` of the tiny preset; of many processes each has `batch` rows."""
    sets = [*SETS, "model.base=null", "model.preset=tiny", f"data.path={rows}", f"train.batch_size={batch}"]
    return ["train", "--recipe", "safe", "--output", str(out), *(x for s in sets for x in ("--set", s)), *more]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "MLA_TUNE_TIMEOUT": "60"}


def run(arguments: list[str], *launcher: str) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, *(launcher or ("-m", "mla_tune")), *arguments]
    return subprocess.run(start, capture_output=True, text=True, timeout=240, env=environment())


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[tuple[int, str, float]]:
    return [(x["step"], key, x[key]) for x in lines(out) for key in ("loss", "eval_loss") if key in x]


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def assert_same_run(out: Path, wanted: Path, within: float = 1e-5) -> None:
    """Losses, norms, counted tokens and the adapter, each relative."""
    assert [x[:2] for x in losses(out)] == [x[:2] for x in losses(wanted)]
    assert [x[2] for x in losses(out)] == pytest.approx([x[2] for x in losses(wanted)], rel=within)
    for ours, theirs in zip(lines(out), lines(wanted), strict=True):
        assert ours.get("tokens") == theirs.get("tokens")
        if "loss" in ours:
            assert ours["grad_norms"] == pytest.approx(theirs["grad_norms"], rel=1e-3)
    ours, theirs = adapter(out), adapter(wanted)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        # Of the tensor, not of each number: Adam's first steps are ±1 whatever the gradient, so one that is nearly zero
        # may go either way.
        assert (ours[name] - tensor).norm() <= 1e-3 * tensor.norm(), name


@pytest.fixture(scope="module")
def one(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "run"
    done = run(command(rows, out, 4))
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_as_one_does_and_resume(way: str, rows: Path, one: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    launcher = () if WAYS[way] else TORCHRUN
    done = run(command(rows, out, 2, *WAYS[way]), *launcher)
    assert done.returncode == 0, done.stderr
    assert_same_run(out, one)
    record = json.loads((out / "run.json").read_text())
    assert record["state"] == "done"
    assert record["processes"] == {"count": 2, "sharding": "none" if way == "ddp" else way}
    assert record["held_out_loss"] == pytest.approx(
        json.loads((one / "run.json").read_text())["held_out_loss"], rel=1e-5
    )
    again = shlex.join(WAYS[way] or ["--processes", "2"])
    assert (
        f"mla-tune train --recipe {out}/recipe.yaml --output {out}-again {again}" in (out / "report.html").read_text()
    )
    # The first process talks, writes and asks; nobody else does.
    assert done.stdout.count("run folder:") == 1
    assert done.stderr.count("held-out prompts before training") == 1
    assert done.stderr.count("step 8/8") == 1
    assert {p.name for p in (out / "adapter").iterdir()} == {p.name for p in (one / "adapter").iterdir()}
    assert record["samples"]["answers"] == json.loads((one / "run.json").read_text())["samples"]["answers"]

    # Plain PEFT reads the adapter, on the base that the first process wrote.
    base = AutoModelForCausalLM.from_pretrained(one / "base")
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(base, one / "adapter")(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(out / "base")
        found = PeftModel.from_pretrained(base, out / "adapter")(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)

    again = tmp_path / "again"
    shutil.copytree(out, again)
    cut_back(again, 4)
    resumed = run(command(rows, again, 2, *WAYS[way], "--resume"), *launcher)
    assert resumed.returncode == 0, resumed.stderr
    assert losses(again) == losses(out)
    for name, tensor in adapter(out).items():
        assert torch.equal(adapter(again)[name], tensor), name


#: Trains as the command line does, and every process writes how many bytes of codes it holds.
COUNTED = """
import json, os, sys
from pathlib import Path
from transformers import TrainerCallback
from mla_tune.model.quantized_linear import QuantizedWeight
from mla_tune.recipe.load import load_recipe
from mla_tune.training.distributed.launch import apply_launch_config, exit_worker
from mla_tune.training.run import train
class Count(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        weights = [m for m in model.modules() if isinstance(m, QuantizedWeight)]
        parts = [getattr(weight, name) for weight in weights for name in weight.large_buffers]
        own = sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in parts)
        Path(sys.argv[1] + os.environ.get("RANK", "")).write_text(json.dumps([own, sum(p.nbytes for p in parts)]))
if "RANK" in os.environ:
    apply_launch_config("fsdp2")
train(load_recipe("safe", sys.argv[2:]), callbacks=[Count()])
exit_worker()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_fsdp2_shards_quantized_bases(kind: str, rows: Path, tmp_path: Path) -> None:
    """Losses and adapter as in one process; each of two holds half of the codes."""
    base = "embedded"
    if kind == "fp8":
        base = str(make_fp8(EMBEDDED_MODEL, tmp_path / "fp8", block=(128, 128)))
    sets = [s for s in SETS if not any(key in s for key in ("max_steps", "save_every", "model.experts"))]
    sets += [f"model.base={base}", f"data.path={rows}", "train.max_steps=4", "train.save_every=2", "output.samples=0"]
    sets += ["model.quantize=nf4"] if kind == "nf4" else []
    script = tmp_path / "counted.py"
    script.write_text(COUNTED)
    for name, batch, launcher in (("one", 4, ()), ("two", 2, TORCHRUN[:-2])):
        own = [*sets, f"output.dir={tmp_path / name}", f"train.batch_size={batch}"]
        done = run([str(script), str(tmp_path / f"bytes-{name}"), *own], *(launcher or ("-u",)))
        assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "two", tmp_path / "one")
    whole, _ = json.loads((tmp_path / "bytes-one").read_text())
    halves = [json.loads((tmp_path / f"bytes-two{rank}").read_text())[0] for rank in (0, 1)]
    assert sum(halves) == pytest.approx(whole, rel=0.01)
    assert max(halves) <= 0.52 * whole


#: Trains on the rows in the file's order, two a step.
IN_ORDER = """
import sys
from mla_tune.recipe.load import load_recipe
from mla_tune.training.distributed.launch import apply_launch_config, exit_worker
from mla_tune.training.distributed.sampler import PaddedDistributedSampler as Sampler
from mla_tune.training.run import train
from mla_tune.training.trainer import RoleTrainer
RoleTrainer._get_train_sampler = lambda self, rows=None: Sampler(
    len(self.train_dataset) - self.team.is_distributed, 2, None)
if sys.argv[1] != "none":
    apply_launch_config(sys.argv[1])
train(load_recipe("safe", sys.argv[2:]))
exit_worker()
"""


@pytest.mark.slow
def test_all_processes_skip_the_same_spikes(tmp_path: Path) -> None:
    """Planted bad batches: skipped, counted, and the rate cut, as in one process; the adapter is the same too."""
    single = rows_with_bad_batches(tmp_path / "single.jsonl").read_text().splitlines(keepends=True)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(line * 2 for line in single))
    script = tmp_path / "in_order.py"
    script.write_text(IN_ORDER)
    keys = ["train.packing=false", f"train.max_steps={len(single)}", "data.eval_fraction=0", "train.spike.window=8"]
    keys += ["train.spike.width=6", "train.spike.patience=2", "optimizer.learning_rate=5e-3", "output.samples=0"]
    keys += ["optimizer.schedule=constant", "model.device=cpu", "model.attention=packed", "model.experts=eager"]
    for way in ("none", "fsdp2", "zero3"):
        own = [
            *keys,
            f"data.path={rows}",
            f"output.dir={tmp_path / way}",
            f"train.batch_size={2 if way == 'none' else 1}",
        ]
        launcher = ("-u",) if way == "none" else TORCHRUN[:-2]
        done = run([str(script), way, *own], *launcher)
        assert done.returncode == 0, done.stderr
        spikes = [x["step"] for x in lines(tmp_path / way) if "spike" in x]
        assert spikes == list(BAD), way
        assert json.loads((tmp_path / way / "run.json").read_text())["spikes"] == {"skipped": 2, "cuts": 1}
        assert_same_run(tmp_path / way, tmp_path / "none")


@pytest.mark.parametrize("name", NAMES)
def test_shipped_configurations_are_what_accelerate_reads(name: str) -> None:
    """accelerate's own parser and environment against ours."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    file = CONFIGS / "launch" / f"{name}.yaml"
    config = load_config_from_file(str(file))
    assert config.num_processes == 8
    args = launch_command_parser().parse_args(["--config_file", str(file), "script.py"])
    args, _, _ = _validate_launch_command(args)
    if name == "zero3":
        from accelerate.utils.launch import prepare_deepspeed_cmd_env

        args.deepspeed_fields_from_accelerate_config = ""  # set by what is left out here, to look for contradictions
        _, found = prepare_deepspeed_cmd_env(args)
    else:
        found = prepare_multi_gpu_env(args)
    ours = environment_of(name)
    assert ours.keys() <= found.keys() | ours.keys()
    for key, value in ours.items():
        assert found[key] == value, key


def wait_for(done: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def has_checkpoint(out: Path) -> bool:
    return any((out / "checkpoints").glob("checkpoint-*"))


@pytest.fixture
def long_run(rows: Path, tmp_path: Path) -> tuple[subprocess.Popen[str], Path, list[str]]:
    """Under way, with a checkpoint behind it."""
    out = tmp_path / "run"
    arguments = command(rows, out, 2, "--set", "train.max_steps=4000", "--set", "output.samples=0", "--processes", "2")
    start = [sys.executable, "-m", "mla_tune", *arguments]
    process = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    wait_for(lambda: has_checkpoint(out), process)
    return process, out, arguments


@pytest.mark.slow
def test_a_killed_worker_ends_the_job_and_resume_goes_on(
    long_run: tuple[subprocess.Popen[str], Path, list[str]],
) -> None:
    process, out, arguments = long_run
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "mla_tune" in " ".join(p.cmdline())]
    victim = next(p for p in workers if p.environ().get("RANK") == "1")
    victim.send_signal(signal.SIGKILL)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "error: process 1 of 2 was killed by SIGKILL" in err
    assert "go on with --resume" in err
    assert "Traceback" not in err
    assert json.loads((out / "run.json").read_text())["state"] == "killed"
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in workers)
    # So many steps that the schedule is the same, and an end soon after.
    at = max(int(p.name.rpartition("-")[2]) for p in (out / "checkpoints").glob("checkpoint-*"))
    start = [sys.executable, "-m", "mla_tune", *arguments, "--resume"]
    again = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    wait_for(lambda: lines(out)[-1]["step"] > at + 2, again)
    again.send_signal(signal.SIGTERM)
    _, err = again.communicate(timeout=100)
    assert again.returncode == 130, err
    assert "all 2 processes were told to save a checkpoint and stop" in err
    assert json.loads((out / "run.json").read_text())["state"] == "interrupted"
    seen = [x["step"] for x in lines(out) if "loss" in x]
    assert seen == list(range(1, len(seen) + 1))
    last = max(int(p.name.rpartition("-")[2]) for p in (out / "checkpoints").glob("checkpoint-*"))
    assert last == seen[-1], "the checkpoint is of the step at which all stopped"


@pytest.mark.parametrize(("launched", "leaves"), [(True, "at once"), (False, "the usual way")])
def test_a_launched_process_leaves_without_the_interpreters_way_out(
    launched: bool, leaves: str, tmp_path: Path
) -> None:
    """There threads of communication libraries could still abort it."""
    told = "import atexit\natexit.register(lambda: print('the usual way'))\n"
    (tmp_path / "sitecustomize.py").write_text(told)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    if launched:
        environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    command = [sys.executable, "-m", "mla_tune", "inspect", "embedded"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "DeepSeek-V3" in done.stdout
    assert ("the usual way" in done.stdout) == (leaves == "the usual way")


@pytest.mark.slow
def test_what_all_find_wrong_is_said_once(rows: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text(rows.read_text() + '{"prompt": \n')
    done = run([*command(broken, tmp_path / "run", 2), "--processes", "2"])
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert "broken.jsonl" in done.stderr


@pytest.mark.parametrize(
    "more, says",
    [
        (["--launch", "fsdp2", "--processes", "1"], "--launch fsdp2 with one process"),
        (["--launch", "fsdp3"], "unknown configuration 'fsdp3'"),
        (["--processes", "0"], "--processes is 0; it must be at least 1"),
        (["--launch", "fsdp2"], "one process for each GPU, and this machine has no GPU"),
    ],
)
def test_options_that_contradict(
    more: list[str], says: str, cli: Callable[..., Any], rows: Path, tmp_path: Path
) -> None:
    done = cli(*command(rows, tmp_path / "run", 2, *more))
    assert done.code == 2
    assert says in done.err


def test_sharding_with_one_process_is_refused(
    cli: Callable[..., Any], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`accelerate launch --config_file fsdp2.yaml --num_processes 1`."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    done = cli(*command(rows, tmp_path / "run", 2))
    assert done.code == 2
    assert "FSDP2 shards a model over processes, and this is one process" in done.err
