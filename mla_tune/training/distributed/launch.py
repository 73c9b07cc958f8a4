"""How a run gets several processes: reads what a launcher put into the environment, and starts processes itself.

`torchrun` and `accelerate launch` start the same command once for each GPU, and tell each process by environment
variables which one it is.  accelerate reads from the environment too how the model is sharded: `accelerate launch` puts
it there from its configuration file, and `--launch` from a shipped one (`configs/launch`).
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
#: Seconds that processes have to save a checkpoint after SIGTERM, before the launcher kills them.
PATIENCE = 120


@dataclass(frozen=True, slots=True)
class Worker:
    """This process among those of its run."""

    #: Number of this process among all, from 0.
    rank: int = 0
    #: Number of this process among those of its machine, from 0.
    local_rank: int = 0
    #: Processes of the run.
    world_size: int = 1
    #: Processes on this machine.
    local_world_size: int = 1
    #: Whether a launcher started this process.
    launched: bool = False
    #: How the model lies in the processes: `none` (each holds all of it), `fsdp2` or `zero3` (each holds a shard).
    sharding: str = "none"

    @property
    def is_main_process(self) -> bool:
        """Whether this process is the one that prints and writes files."""
        return self.rank == 0


def current_worker() -> Worker:
    """Return what the environment says of this process; without a launcher it is the only one."""
    env = os.environ
    on = {name: env.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1") for name in ("FSDP", "DEEPSPEED")}
    sharding = "fsdp2" if on["FSDP"] else "zero3" if on["DEEPSPEED"] else "none"
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return Worker(sharding=sharding)
    world_size = int(env["WORLD_SIZE"])
    local = int(env.get("LOCAL_RANK", env["RANK"]))
    return Worker(int(env["RANK"]), local, world_size, int(env.get("LOCAL_WORLD_SIZE", world_size)), True, sharding)


def launch_file(name: str) -> Path:
    """Return the shipped configuration file for `accelerate launch`; `name` is a value of `--launch`."""
    return CONFIGS / "launch" / f"{name}.yaml"


def apply_launch_config(name: str) -> None:
    """Put a shipped configuration into the environment, as `accelerate launch` would do."""
    os.environ.update(environment_of(name))


def environment_of(name: str) -> dict[str, str]:
    """Return the environment variables by which accelerate learns of a shipped configuration."""
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
    """Raise `InputError` if `--launch` and `--processes` contradict each other, or the launcher of this process."""
    if launch is not None and launch not in NAMES:
        raise InputError(f"--launch: unknown configuration '{launch}'. Allowed: {', '.join(NAMES)}")
    here = current_worker()
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


def launch_processes(arguments: list[str], launch: str | None, processes: int | None) -> None:
    """Run `mla-tune ARGUMENTS` in `processes` processes (None: one for each GPU) and wait until they end.

    Raises `WorkError` if one was killed; `Interrupted` if this process got a signal and the others stopped; and
    `SystemExit` with the exit code of the process that failed first, which has printed its error itself.
    """
    count = processes if processes is not None else _gpus()
    extra = ["--launch", launch] if launch else []
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    options = ["--standalone", "--nproc-per-node", str(count), "--shutdown-timeout", str(PATIENCE)]
    command = get_args_parser().parse_args([*options, "-m", "mla_tune", *arguments, *extra])
    if not os.environ.get("MLA_TUNE_DEBUG"):
        logging.disable(logging.ERROR)  # torch's words on a failed process, which has printed its error itself
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
            f"--launch starts one process for each GPU, and there {'is one GPU' if count else 'are none'} here; "
            "give the number of processes with --processes"
        )
    return count


def _what_failed(error: Any, count: int) -> BaseException:
    killed = [(rank, f) for rank, f in error.failures.items() if f.exitcode < 0 and f.exitcode != -signal.SIGTERM]
    if not killed:
        first = min(error.failures.values(), key=lambda f: f.timestamp)
        return SystemExit(first.exitcode if first.exitcode > 0 else 1)
    rank, failure = min(killed)
    name = signal.Signals(-failure.exitcode).name
    why = " (by a user, or by the system because memory ran out)" if name == "SIGKILL" else ""
    return WorkError(f"process {rank} of {count} was killed by {name}{why}; the others were stopped")


def exit_worker() -> None:
    """End a launched process whose work is done, at once.

    While the interpreter shuts down, threads of communication libraries that still run can abort the process, and the
    launcher would take a finished run for a failed one.
    """
    if current_worker().launched:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def is_first_to_say(text: str) -> bool:
    """Return whether no other process of this run has asked for `text` yet: an error that all find is printed once.

    True without a launcher, and where its store can't be asked.
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
    """Silence standard output and standard error of all but the main process; errors are still printed."""
    from mla_tune import console

    if not current_worker().is_main_process:
        console.out.quiet = console.err.quiet = True
