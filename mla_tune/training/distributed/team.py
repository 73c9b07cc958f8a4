"""`Team`: the processes of a run, seen from one of them; how they start, decide together, and end together.

Work that is done once for all (checking a checkpoint's hashes, timing kernels, writing files) is done by the main
process, rank 0, and the others get its result.  An error ends its process; the launcher sees that and ends the rest.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mla_tune.console import err
from mla_tune.errors import MlaTuneError, WorkError
from mla_tune.model.load import pick_device
from mla_tune.model.quantized_linear import prepare_for_fsdp
from mla_tune.recipe.schema import Recipe
from mla_tune.training.distributed.deepspeed import gather_parameters, is_handle, use_gloo_alone
from mla_tune.training.distributed.launch import Worker, current_worker

T = TypeVar("T")
#: Seconds that a process waits for the others before it gives up ($MLA_TUNE_TIMEOUT): reading a large base takes long.
TIMEOUT = 1800
#: What torch's and the communication libraries' errors say when another process is gone.
_LOST = (
    "connection closed by peer",
    "connection reset",
    "timed out",
    "timeout",
    "gloo",
    "nccl",
    "socket",
    "broken pipe",
)


@dataclass(frozen=True, slots=True)
class Team:
    """The processes of a run, seen from one of them."""

    #: This process.
    here: Worker

    @property
    def is_main_process(self) -> bool:
        """Whether this process is the one that prints and writes files (rank 0)."""
        return self.here.is_main_process

    @property
    def is_distributed(self) -> bool:
        """Whether the run has several processes."""
        return self.here.world_size > 1

    @property
    def sharded(self) -> bool:
        """Whether each process holds a shard of the model only (FSDP2, ZeRO-3)."""
        return self.is_distributed and self.here.sharding != "none"

    @property
    def uses_zero3(self) -> bool:
        """Whether DeepSpeed ZeRO-3 shards the model."""
        return self.is_distributed and self.here.sharding == "zero3"

    def wait(self) -> None:
        """Wait until all processes have called it."""
        if self.is_distributed:
            dist.barrier()

    def broadcast(self, value: T) -> T:
        """Return the main process's `value`, in all processes.  All call it."""
        if not self.is_distributed:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def main_process_only(self, work: Callable[[], T]) -> T:
        """Call `work` in the main process, and return its result in all processes.  All call it.

        If it raises, the main process raises that error, and the others raise `SystemExit` with its exit code, so the
        error is told once.
        """
        return self.broadcast(self._main_process_alone(work)) if self.is_distributed else work()  # type: ignore[return-value]

    def main_process_first(self, work: Callable[[], T]) -> T:
        """Call `work` in the main process, then in the others, which find the files that the main process wrote.

        Errors of the main process are raised as by `main_process_only`.
        """
        if not self.is_distributed:
            return work()
        result = self._main_process_alone(work)
        return result if self.is_main_process else work()  # type: ignore[return-value]

    def _main_process_alone(self, work: Callable[[], T]) -> T | None:
        result, error = None, None
        if self.is_main_process:
            try:
                result = work()
            except Exception as caught:
                error = caught
        code = self.broadcast(getattr(error, "exit_code", 1) if error is not None else 0)
        if error is not None:
            raise error
        if code:
            raise SystemExit(code)
        return result


def init_distributed(recipe: Recipe) -> Team:
    """Connect to the other processes, if a launcher started several, and return all of them as a `Team`."""
    here = current_worker()
    if here.world_size > 1 and not dist.is_initialized():
        gpu = pick_device(recipe.model.device).type == "cuda"
        if gpu:
            torch.cuda.set_device(here.local_rank)
        elif here.sharding == "zero3":
            use_gloo_alone()
        timeout = timedelta(seconds=float(os.environ.get("MLA_TUNE_TIMEOUT", TIMEOUT)))
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timeout)
    return Team(here)


def destroy_distributed() -> None:
    """At the end of a run that went well: wait for the other processes and disconnect."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def explain_lost_processes(team: Team, advice: Callable[[], str]) -> Iterator[None]:
    """Within this context a failed communication raises a `WorkError` that says that another process is gone.

    `advice` returns the end of its sentence: how to go on.
    """
    try:
        yield
    except MlaTuneError:
        raise
    except Exception as error:
        text = str(error).strip()
        if not team.is_distributed or not any(word in text.lower() for word in _LOST):
            raise
        first = text.splitlines()[0][:160] if text else type(error).__name__
        raise WorkError(f"another process of this run ended, or does not answer ({first}){advice()}") from error


def warn_about_idle_gpus(here: Worker, device: torch.device) -> None:
    """Print a line if the run has one process and the machine has several GPUs."""
    if here.world_size == 1 and device.type == "cuda" and torch.cuda.device_count() > 1:
        n = torch.cuda.device_count()
        err.print(f"{n} GPUs are here and one is used; all of them: add --processes {n}")


def set_up_sharding(accelerator: Any, full: bool) -> None:
    """Do for FSDP2 what an `Accelerator` does not do by itself, right after it was made.

    `full`: all weights are trained, not an adapter; they compute in the mixed precision's dtype.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        # accelerate 1.15 knows FSDP on accelerators only: on a CPU it would train replicas without a word.
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        for shared in (AcceleratorState._shared_state, PartialState._shared_state):
            shared["distributed_type"] = DistributedType.FSDP
    # A frozen base is in its dtype already, and adapters stay in float32 as in one process.  accelerate's own policy
    # also rounds gradients before they are added up, and every output, the loss included.
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision) if full else None
    state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    prepare = accelerator.prepare

    def prepare_with_buffers(*args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for model in args:
                if isinstance(model, torch.nn.Module):
                    prepare_for_fsdp(model)
                    stack.enter_context(_buffers_of_the_first(model))
            return prepare(*args, **kwargs)

    accelerator.prepare = prepare_with_buffers


@contextlib.contextmanager
def _buffers_of_the_first(model: torch.nn.Module) -> Iterator[None]:
    """Give all processes the main process's buffers, and hide them from accelerate while it shards the weights.

    accelerate 1.15 hands out weights that only the main process has read, and takes everything in a state dict for
    sharded; buffers are not.
    """
    hidden = []
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is None or name in module._non_persistent_buffers_set:
                continue
            whole = torch.empty_like(buffer, device="cpu") if buffer.is_meta else buffer.detach().cpu()
            dist.broadcast(whole, src=0)
            module._buffers[name] = whole if buffer.is_meta else buffer.copy_(whole)
            module._non_persistent_buffers_set.add(name)
            hidden.append((module, name))
    try:
        yield
    finally:
        for module, name in hidden:
            module._non_persistent_buffers_set.discard(name)


def gather_trained_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the trained parameters of a sharded model by name, whole, on the CPU.  All processes call it.

    Under FSDP2 only the main process gets them, and the others an empty dictionary; under ZeRO-3 all get them.
    """
    if any(is_handle(p) for p in model.parameters()):
        return gather_parameters(model)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)  # type: ignore[return-value]
