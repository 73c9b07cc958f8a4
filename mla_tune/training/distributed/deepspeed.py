"""What DeepSpeed's ZeRO-3 does otherwise than torch: a parameter is a handle, its engine has the rest.

DeepSpeed is no dependency: it is imported where a launcher asked for it.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch


def use_gloo_alone() -> None:
    """On a CPU DeepSpeed would first compile a kernel for communication, and say so on standard output."""
    from deepspeed import ops  # pyright: ignore[reportMissingImports]

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def gather_experts_whole(model: torch.nn.Module) -> None:
    """ZeRO-3 learns in what order modules run, and all processes have to agree; but what a block of experts calls
    depends on its tokens.  So such a block is gathered as one."""
    from deepspeed.utils import set_z3_leaf_modules  # pyright: ignore[reportMissingImports]

    blocks = {type(module) for module in model.modules() if hasattr(module, "experts")}
    if blocks:
        set_z3_leaf_modules(model, list(blocks))


def step_apart(trainer: Any) -> None:
    """accelerate's backward pass steps too.  Here it makes gradients only, and the step is done where the Trainer asks
    for it, or left out where the gradients are a spike's."""
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
    """This process's shard of the gradient, float32."""
    from deepspeed.utils import safe_get_local_grad  # pyright: ignore[reportMissingImports]

    return safe_get_local_grad(parameter)


def gradient(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """A parameter's gradient; of a handle, and of one that fully_shard has, the shard that is here."""
    return local_gradient(parameter) if is_handle(parameter) else parameter.grad


def whole_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Trained parameters, whole, float32, on the CPU.  All processes call it."""
    from deepspeed.utils import safe_get_full_fp32_param  # pyright: ignore[reportMissingImports]

    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole: Any = safe_get_full_fp32_param(parameter)
            found[name] = whole.detach().cpu().clone()
    return found


def is_handle(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "ds_id")
