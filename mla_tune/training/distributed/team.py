"""Let the processes of a run act together: share results, wait, shard and gather weights.

Work for all processes (checking hashes of a checkpoint, timing kernels, writing files) is done by the main process,
rank 0, and the others get its result.  An error ends its process; the launcher then ends the others.
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
#: Seconds that a process waits for the others before it gives up, unless $MLA_TUNE_TIMEOUT says otherwise: reading a
#: large base takes long.
TIMEOUT = 1800
#: Parts of the messages of torch and communication libraries where another process has ended.
_LOST_PROCESS_WORDS = (
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
    """All processes of a run, as one of them uses them."""

    here: Worker
    """This process."""

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that prints and writes files (rank 0)."""
        return self.here.is_main_process

    @property
    def is_distributed(self) -> bool:
        """Whether the run has several processes."""
        return self.here.world_size > 1

    @property
    def sharded(self) -> bool:
        """Whether each process holds only a shard of the model (FSDP2, ZeRO-3)."""
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
        """Return the main process's `value` in all processes.  All must call it."""
        if not self.is_distributed:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def main_process_only(self, work: Callable[[], T]) -> T:
        """Call `work` in the main process, and return its result in all processes.  All must call it.

        Where it raises, the main process raises that error, and the others raise `SystemExit` with its exit code: the
        error is printed once.
        """
        return self.broadcast(self._main_process_alone(work)) if self.is_distributed else work()  # type: ignore[return-value]

    def main_process_first(self, work: Callable[[], T]) -> T:
        """Call `work` in the main process, then in the others, which can use the files that the first call wrote.

        Errors of the main process are raised as in `main_process_only`.
        """
        if not self.is_distributed:
            return work()
        result = self._main_process_alone(work)
        return result if self.is_main_process else work()  # type: ignore[return-value]

    def _main_process_alone(self, work: Callable[[], T]) -> T | None:
        """Call `work` in the main process; the others wait, then return None, or raise `SystemExit` if it failed."""
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
    """Connect to the other processes, where a launcher started several, and return the `Team` of all."""
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
    """Wait for the other processes and disconnect, at the end of a run without an error."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def explain_lost_processes(team: Team, advice: Callable[[], str]) -> Iterator[None]:
    """Within this context, turn an error of communication into a `WorkError` that says that another process has ended.

    `advice` returns the end of its message: how to continue the run.
    """
    try:
        yield
    except MlaTuneError:
        raise
    except Exception as error:
        text = str(error).strip()
        if not team.is_distributed or not any(word in text.lower() for word in _LOST_PROCESS_WORDS):
            raise
        first = text.splitlines()[0][:160] if text else type(error).__name__
        raise WorkError(f"another process of this run ended, or does not answer ({first}){advice()}") from error


def warn_about_idle_gpus(here: Worker, device: torch.device) -> None:
    """Print a line where the run has one process and the machine has several GPUs."""
    if here.world_size == 1 and device.type == "cuda" and torch.cuda.device_count() > 1:
        n = torch.cuda.device_count()
        err.print(f"this machine has {n} GPUs, and one is used; to use all, add --processes {n}")


def set_up_sharding(accelerator: Any, full: bool) -> None:
    """Set up FSDP2 on a new `Accelerator` where accelerate's own setup does not fit.

    `full`: all weights are trained, not an adapter; they then compute in the dtype of mixed precision.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        # accelerate 1.15 supports FSDP on accelerators only: on a CPU it would silently train unsharded replicas.
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        for shared in (AcceleratorState._shared_state, PartialState._shared_state):
            shared["distributed_type"] = DistributedType.FSDP
    # A frozen base already has its dtype, and adapters stay in float32 as in one process.  accelerate's own policy
    # would also round gradients before they are summed, and every output, the loss included.
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision) if full else None
    state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    prepare = accelerator.prepare

    def prepare_with_buffers(*args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for model in args:
                if isinstance(model, torch.nn.Module):
                    prepare_for_fsdp(model)
                    stack.enter_context(_main_process_buffers(model))
            return prepare(*args, **kwargs)

    accelerator.prepare = prepare_with_buffers


@contextlib.contextmanager
def _main_process_buffers(model: torch.nn.Module) -> Iterator[None]:
    """Give all processes the main process's buffers, and hide these from accelerate within this context.

    accelerate 1.15 distributes weights that only the main process has read, and treats everything in a state dict as
    sharded, which buffers are not.
    """
    hidden = []
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is None or name in module._non_persistent_buffers_set:
                continue
            value = torch.empty_like(buffer, device="cpu") if buffer.is_meta else buffer.detach().cpu()
            dist.broadcast(value, src=0)
            module._buffers[name] = value if buffer.is_meta else buffer.copy_(value)
            module._non_persistent_buffers_set.add(name)
            hidden.append((module, name))
    try:
        yield
    finally:
        for module, name in hidden:
            module._non_persistent_buffers_set.discard(name)


def gather_trained_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the trained parameters of a sharded model by name, unsharded, on the CPU.  All processes must call it.

    Under FSDP2 only the main process gets them, and the others get an empty dictionary; under ZeRO-3 all get them.
    """
    if any(is_handle(p) for p in model.parameters()):
        return gather_parameters(model)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)  # type: ignore[return-value]
