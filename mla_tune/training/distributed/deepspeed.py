"""Where DeepSpeed ZeRO-3 differs from torch: a parameter is a handle without numbers; DeepSpeed's engine has those.

DeepSpeed is an optional dependency, imported where a launcher asks for it.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch


def use_gloo_alone() -> None:
    """Keep DeepSpeed on a CPU from compiling a kernel for communication, which it reports on standard output."""
    from deepspeed import ops  # pyright: ignore[reportMissingImports]

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def gather_experts_as_unit(model: torch.nn.Module) -> None:
    """Let ZeRO-3 gather each block of routed experts as one unit.

    ZeRO-3 records in what order modules run, which has to be the same in all processes, and which experts run depends
    on a process's tokens.
    """
    from deepspeed.utils import set_z3_leaf_modules  # pyright: ignore[reportMissingImports]

    blocks = {type(module) for module in model.modules() if hasattr(module, "experts")}
    if blocks:
        set_z3_leaf_modules(model, list(blocks))


def separate_optimizer_step(trainer: Any) -> None:
    """Separate the optimizer's step from the backward pass, so that the step of a spike can be left out.

    accelerate's backward pass under DeepSpeed does the step too; after this call the Trainer's own `optimizer.step()`
    does it.
    """
    wrapped, optimizer = trainer.accelerator.deepspeed_engine_wrapped, trainer.optimizer
    engine = wrapped.engine

    def backward(loss: torch.Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        engine.backward(loss, **kwargs)

    def step(*args: Any, **kwargs: Any) -> None:
        if trainer.spike is None:
            engine.step()
        else:
            engine.optimizer.zero_grad()

    wrapped.backward, optimizer.step = backward, step
    # torch's schedulers look for a mark that they left on the optimizer's own step.
    for text in ("Detected call of `lr_scheduler.step", "Seems like `optimizer.step"):
        warnings.filterwarnings("ignore", message=text)


def local_gradient(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """Return this process's shard of the gradient of a handle, float32."""
    from deepspeed.utils import safe_get_local_grad  # pyright: ignore[reportMissingImports]

    return safe_get_local_grad(parameter)


def gradient(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """Return a parameter's gradient; under ZeRO-3 and FSDP2 this process's shard of it."""
    return local_gradient(parameter) if is_handle(parameter) else parameter.grad


def gather_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the trained parameters by name, whole, float32, on the CPU.  All processes call it."""
    from deepspeed.utils import safe_get_full_fp32_param  # pyright: ignore[reportMissingImports]

    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole: Any = safe_get_full_fp32_param(parameter)
            found[name] = whole.detach().cpu().clone()
    return found


def is_handle(parameter: torch.Tensor) -> bool:
    """Return whether ZeRO-3 holds the numbers of a parameter."""
    return hasattr(parameter, "ds_id")
