"""How a run comes to have many processes: what a launcher left in the environment, and a launcher of our own.

`torchrun` and `accelerate launch` start the same command once for each GPU and say in the environment which one it is.
What shards the model, accelerate reads from the environment too: `accelerate launch` puts it there from its
configuration file, `--launch` from one of those that ship (`configs/launch`).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from mla_tune.errors import InputError, Interrupted, WorkError
from mla_tune.resources import CONFIGS

NAMES = ("ddp", "fsdp2", "zero3")
#: Seconds that workers have for their checkpoint after SIGTERM, before the launcher ends them.
PATIENCE = 120


@dataclass(frozen=True, slots=True)
class Worker:
    """This process among those of its run.  `sharding`: what of the model each holds: `none` is all of it."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    launched: bool = False
    sharding: str = "none"

    @property
    def is_main_process(self) -> bool:
        """The one that talks and writes."""
        return self.rank == 0


def worker() -> Worker:
    """What the environment says; one process where it says nothing."""
    env = os.environ
    on = {name: env.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1") for name in ("FSDP", "DEEPSPEED")}
    sharding = "fsdp2" if on["FSDP"] else "zero3" if on["DEEPSPEED"] else "none"
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return Worker(sharding=sharding)
    world_size = int(env["WORLD_SIZE"])
    local = int(env.get("LOCAL_RANK", env["RANK"]))
    return Worker(int(env["RANK"]), local, world_size, int(env.get("LOCAL_WORLD_SIZE", world_size)), True, sharding)


def launch_file(name: str) -> Path:
    """The shipped configuration for `accelerate launch`."""
    return CONFIGS / "launch" / f"{name}.yaml"


def use(name: str) -> None:
    """Put a shipped configuration into the environment, as `accelerate launch` would."""
    os.environ.update(environment_of(name))


def environment_of(name: str) -> dict[str, str]:
    """What accelerate reads, from a shipped configuration."""
    import yaml

    settings: dict[str, Any] = yaml.safe_load(launch_file(name).read_text(encoding="utf-8"))

    def word(value: Any) -> str:
        return str(value).lower() if isinstance(value, bool) else str(value)

    if "fsdp_config" in settings:
        return {"ACCELERATE_USE_FSDP": "true"} | {k.upper(): word(v) for k, v in settings["fsdp_config"].items()}
    if "deepspeed_config" in settings:
        found = {"ACCELERATE_USE_DEEPSPEED": "true"}
        for key, value in settings["deepspeed_config"].items():
            if key != "deepspeed_multinode_launcher":
                short = "ZERO3_INIT" if key == "zero3_init_flag" else key.upper()
                found[f"ACCELERATE_DEEPSPEED_{short}"] = word(value)
        return found
    return {}


def check_options(launch: str | None, processes: int | None) -> None:
    """Raises `InputError` where `--launch` and `--processes` contradict each other or the launcher that is there."""
    if launch is not None and launch not in NAMES:
        raise InputError(f"--launch: unknown configuration '{launch}'. Allowed: {', '.join(NAMES)}")
    here = worker()
    if processes is not None and here.launched:
        raise InputError(
            f"--processes is for a run without a launcher, and a launcher started {here.world_size} processes already: "
            "leave it out"
        )
    if processes is not None and processes < 1:
        raise InputError("--processes must be at least 1")
    if processes == 1 and launch is not None:
        raise InputError(f"--launch {launch} with one process: leave it out, or give --processes 2 or more")
    wanted = {"ddp": "none"}.get(launch or "", launch)
    if launch is not None and here.launched and here.sharding not in ("none", wanted):
        raise InputError(
            f"--launch {launch}, but the launcher's own configuration says {here.sharding}: give one of them"
        )


def start(arguments: list[str], launch: str | None, processes: int | None) -> None:
    """Run `mla-tune ARGUMENTS` in `processes` processes (None: one a GPU) and wait for their end.

    Raises `WorkError` if one was killed, `Interrupted` if this process was told to stop and the workers did, and
    `SystemExit` with the code of the worker that failed first, which has said itself what is wrong.
    """
    count = processes if processes is not None else _gpus()
    extra = ["--launch", launch] if launch else []
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    options = ["--standalone", "--nproc-per-node", str(count), "--shutdown-timeout", str(PATIENCE)]
    command = get_args_parser().parse_args([*options, "-m", "mla_tune", *arguments, *extra])
    if not os.environ.get("MLA_TUNE_DEBUG"):
        logging.disable(logging.ERROR)  # what torch says of workers that failed: they did so themselves
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    try:
        run(command)
    except ChildFailedError as error:
        raise _what_failed(error, count) from None
    except SignalException as error:
        name = signal.Signals(error.sigval).name
        raise Interrupted(f"{name}: all {count} processes were told to save a checkpoint and stop") from None
    finally:
        logging.disable(logging.NOTSET)


def _gpus() -> int:
    import torch

    count = torch.cuda.device_count()
    if count < 2:
        raise InputError(
            f"--launch: one process a GPU, and there {'is one GPU' if count else 'are none'} here; "
            "say how many with --processes"
        )
    return count


def _what_failed(error: Any, count: int) -> BaseException:
    killed = [(rank, f) for rank, f in error.failures.items() if f.exitcode < 0 and f.exitcode != -signal.SIGTERM]
    if not killed:
        first = min(error.failures.values(), key=lambda f: f.timestamp)
        return SystemExit(first.exitcode if first.exitcode > 0 else 1)
    rank, failure = min(killed)
    name = signal.Signals(-failure.exitcode).name
    why = " (by somebody, or by the system for want of memory)" if name == "SIGKILL" else ""
    return WorkError(f"process {rank} of {count} was killed by {name}{why}; the others were stopped")


def end_worker() -> None:
    """End a launched process whose work went well, without the interpreter's own way out: there threads of
    communication libraries that are still alive can abort it, and the launcher would call a finished run failed."""
    if worker().launched:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def is_first_to_say(text: str) -> bool:
    """Whether no other process of this run has said `text` yet: what all of them find wrong is said once.

    True where the launcher's store can't be asked.
    """
    if not worker().launched or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    key = "mla_tune/said/" + hashlib.sha256(text.encode()).hexdigest()
    with contextlib.suppress(Exception):
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=20))
        return store.add(key, 1) == 1
    return True


def silence_other_processes() -> None:
    """Silence the two consoles of every other process; its errors still come through."""
    from mla_tune import console

    if not worker().is_main_process:
        console.out.quiet = console.err.quiet = True
