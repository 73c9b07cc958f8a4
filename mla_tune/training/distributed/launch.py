"""Start the processes of a run, and find out which of them this one is.

`torchrun` and `accelerate launch` start the same command once for each GPU; environment variables tell each process its
rank.  accelerate also reads from the environment how the model is sharded: `accelerate launch` sets these variables
from its configuration file, and `--launch` sets them from a shipped one (`configs/launch`).
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

#: Values of `--launch`.
NAMES = ("ddp", "fsdp2", "zero3")
#: Seconds that processes have after SIGTERM to save a checkpoint, before the launcher kills them.
SHUTDOWN_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Worker:
    """This process and its place in the run."""

    rank: int = 0
    """Number of this process in the run, from 0."""
    local_rank: int = 0
    """Number of this process on its machine, from 0."""
    world_size: int = 1
    """Number of processes of the run."""
    local_world_size: int = 1
    """Number of processes on this machine."""
    launched: bool = False
    """Whether a launcher started this process."""
    sharding: str = "none"
    """How the model is sharded: `none` (each process holds all of it), `fsdp2` or `zero3` (each holds a shard)."""

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that prints and writes files (rank 0)."""
        return self.rank == 0


def current_worker() -> Worker:
    """Return this process as the environment describes it; without a launcher it is the only one."""
    env = os.environ
    uses = {name: env.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1") for name in ("FSDP", "DEEPSPEED")}
    sharding = "fsdp2" if uses["FSDP"] else "zero3" if uses["DEEPSPEED"] else "none"
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return Worker(sharding=sharding)
    world_size = int(env["WORLD_SIZE"])
    local = int(env.get("LOCAL_RANK", env["RANK"]))
    return Worker(int(env["RANK"]), local, world_size, int(env.get("LOCAL_WORLD_SIZE", world_size)), True, sharding)


def launch_file(name: str) -> Path:
    """Return the shipped configuration file for `accelerate launch`; `name` is a value of `--launch`."""
    return CONFIGS / "launch" / f"{name}.yaml"


def apply_launch_config(name: str) -> None:
    """Set the environment variables of a shipped configuration, as `accelerate launch` would."""
    os.environ.update(environment_of(name))


def environment_of(name: str) -> dict[str, str]:
    """Return the environment variables from which accelerate reads a shipped configuration."""
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
    """Raise `InputError` where `--launch` and `--processes` contradict each other, or the launcher of this process."""
    if launch is not None and launch not in NAMES:
        raise InputError(f"--launch: unknown configuration '{launch}'. Allowed: {', '.join(NAMES)}")
    here = current_worker()
    if processes is not None and here.launched:
        raise InputError(
            f"--processes starts processes, but a launcher has already started {here.world_size} of them: leave it out"
        )
    if processes is not None and processes < 1:
        raise InputError(f"--processes is {processes}; it must be at least 1")
    if processes == 1 and launch is not None:
        raise InputError(f"--launch {launch} with one process: leave it out, or give --processes 2 or more")
    wanted = {"ddp": "none"}.get(launch or "", launch)
    if launch is not None and here.launched and here.sharding not in ("none", wanted):
        raise InputError(
            f"--launch is {launch}, but the launcher's own configuration says {here.sharding}: give only one of them"
        )


def launch_processes(arguments: list[str], launch: str | None, processes: int | None) -> None:
    """Run `mla-tune ARGUMENTS` in `processes` processes (None: one for each GPU), and wait until they end.

    Raises `WorkError` where a process was killed, `Interrupted` where this process got a signal and stopped the others,
    and otherwise `SystemExit` with the exit code of the process that failed first, which has printed its error itself.
    """
    count = processes if processes is not None else _gpus()
    extra = ["--launch", launch] if launch else []
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    options = ["--standalone", "--nproc-per-node", str(count), "--shutdown-timeout", str(SHUTDOWN_SECONDS)]
    command = get_args_parser().parse_args([*options, "-m", "mla_tune", *arguments, *extra])
    if not os.environ.get("MLA_TUNE_DEBUG"):
        logging.disable(logging.ERROR)  # torch logs a failed process, but that has printed its error itself
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    try:
        run(command)
    except ChildFailedError as error:
        raise _exit_reason(error, count) from None
    except SignalException as error:
        name = signal.Signals(error.sigval).name
        raise Interrupted(f"{name}: all {count} processes were told to save a checkpoint and stop") from None
    finally:
        logging.disable(logging.NOTSET)


def _gpus() -> int:
    """The number of GPUs of this machine.  Raises `InputError` for less than two."""
    import torch

    count = torch.cuda.device_count()
    if count < 2:
        raise InputError(
            f"--launch starts one process for each GPU, and this machine has {'one GPU' if count else 'no GPU'}; "
            "give the number of processes with --processes"
        )
    return count


def _exit_reason(error: Any, count: int) -> BaseException:
    """The exception for a failed run: which process was killed, or the exit code of the one that failed first."""
    killed = [(rank, f) for rank, f in error.failures.items() if f.exitcode < 0 and f.exitcode != -signal.SIGTERM]
    if not killed:
        first = min(error.failures.values(), key=lambda f: f.timestamp)
        return SystemExit(first.exitcode if first.exitcode > 0 else 1)
    rank, failure = min(killed)
    name = signal.Signals(-failure.exitcode).name
    why = " (by a user, or by the system because memory ran out)" if name == "SIGKILL" else ""
    return WorkError(f"process {rank} of {count} was killed by {name}{why}; the others were stopped")


def exit_worker() -> None:
    """End a launched process whose work is done, without the interpreter's shutdown.

    During the shutdown, threads of communication libraries that still run can abort the process, and the launcher would
    take a finished run for a failed one.
    """
    if current_worker().launched:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def is_first_to_say(text: str) -> bool:
    """Return whether this is the first process of the run to call this with `text`, so that an error is printed once.

    It is true without a launcher, and where the launcher's store does not answer.
    """
    if not current_worker().launched or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    key = "mla_tune/said/" + hashlib.sha256(text.encode()).hexdigest()
    with contextlib.suppress(Exception):
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=20))
        return store.add(key, 1) == 1
    return True


def silence_other_processes() -> None:
    """Turn off mla-tune's output in all processes but the main one; errors are still printed."""
    from mla_tune import console

    if not current_worker().is_main_process:
        console.out.quiet = console.err.quiet = True
