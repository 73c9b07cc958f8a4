"""Handle what differs under DeepSpeed ZeRO-3, where parameters are handles without numbers.

The numbers are in DeepSpeed's engine.  DeepSpeed is an optional dependency, imported only where it shards the model.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch


def use_gloo_alone() -> None:
    """Keep DeepSpeed on a CPU from compiling its own communication kernel, about which it prints on standard output."""
    from deepspeed import ops  # pyright: ignore[reportMissingImports]

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def gather_experts_as_unit(model: torch.nn.Module) -> None:
    """Let ZeRO-3 gather each block of routed experts as one unit.

    ZeRO-3 records the order in which modules run and needs the same order in all processes, but which experts run
    depends on the tokens of a process.
    """
    from deepspeed.utils import set_z3_leaf_modules  # pyright: ignore[reportMissingImports]

    blocks = {type(module) for module in model.modules() if hasattr(module, "experts")}
    if blocks:
        set_z3_leaf_modules(model, list(blocks))


def separate_optimizer_step(trainer: Any) -> None:
    """Take the optimizer's step out of the backward pass, so that the spike guard can skip it.

    Under DeepSpeed, accelerate's backward pass also does the optimizer's step.  After this call `optimizer.step()` of
    the Trainer does it.
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
    # torch's schedulers warn because they don't find the mark that they left on the replaced `optimizer.step`.
    for text in ("Detected call of `lr_scheduler.step", "Seems like `optimizer.step"):
        warnings.filterwarnings("ignore", message=text)


def local_gradient(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """Return this process's shard of the gradient of a ZeRO-3 parameter, in float32."""
    from deepspeed.utils import safe_get_local_grad  # pyright: ignore[reportMissingImports]

    return safe_get_local_grad(parameter)


def gradient(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """Return the gradient of a parameter, under ZeRO-3 and FSDP2 this process's shard of it."""
    return local_gradient(parameter) if is_handle(parameter) else parameter.grad


def gather_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the trained parameters by name, unsharded, in float32, on the CPU.  All processes must call it."""
    from deepspeed.utils import safe_get_full_fp32_param  # pyright: ignore[reportMissingImports]

    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            full: Any = safe_get_full_fp32_param(parameter)
            found[name] = full.detach().cpu().clone()
    return found


def is_handle(parameter: torch.Tensor) -> bool:
    """Return whether a parameter is a handle whose numbers ZeRO-3 holds."""
    return hasattr(parameter, "ds_id")
