"""Gradients of a step: which adapters get none, and the squared norms by role."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from mla_tune.model.attach import attached_loras
from mla_tune.model.modules_to_save import modules_to_save_copies
from mla_tune.training.distributed.deepspeed import gradient, is_handle


def gradient_problems(model: torch.nn.Module) -> list[str]:
    """Return a line for each LoRA (without adapters: each weight) whose gradient is missing, zero, or not finite.

    Of a LoRA one of A and B has to have a gradient that is not zero: with B = 0, A's is zero in the first step.
    """
    problems = []
    loras = attached_loras(model)
    named = (
        [(a.parameter, [*a.layer.lora_A.parameters(), *a.layer.lora_B.parameters()]) for a in loras]
        if loras
        else [(n, [p]) for n, p in model.named_parameters() if p.requires_grad]
    )
    if loras:
        named += [(path, list(copy.parameters())) for path, copy in modules_to_save_copies(model).items()]
    exists, not_finite, not_zero = _inspect_gradients([parameters for _, parameters in named])
    for i, (name, _) in enumerate(named):
        if not exists[i]:
            problems.append(f"{name}: no gradient reached it")
        elif not_finite[i]:
            problems.append(f"{name}: its gradient is not finite")
        elif loras and not not_zero[i]:
            problems.append(f"{name}: its gradient is zero")
    return problems


def _inspect_gradients(groups: list[list[Any]]) -> list[list[int]]:
    """Return three lists of 0 or 1, one for each group of parameters: whether one of them has a gradient at all, one
    with a number that is not finite, and one with a number that is not zero.

    Where gradients are sharded, each process inspects its shards, and the answers are combined.
    """
    found = torch.zeros(3, len(groups), dtype=torch.int32)
    sharded = False
    for i, parameters in enumerate(groups):
        for parameter in parameters:
            grad: Any = gradient(parameter)
            if grad is None:
                continue
            sharded = sharded or is_handle(parameter)
            if hasattr(grad, "to_local"):
                sharded, grad = True, grad.to_local()
            found[0, i] = 1
            found[1, i] |= int(not torch.isfinite(grad).all())
            found[2, i] |= int(grad.any())
    if sharded:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.tolist()


def squared_norms(groups: list[tuple[str, list[Any]]]) -> dict[str, torch.Tensor]:
    """Return Σ g² by role, float32, for the roles that have gradients; under ZeRO-3 of this process's shards.

    `groups` are pairs (role, parameters); a role may come more than once.
    """
    squares: dict[str, torch.Tensor] = {}
    for role, parameters in groups:
        grads = [g for g in map(gradient, parameters) if g is not None]
        if grads:
            square = _square_of_norm(grads)
            squares[role] = squares[role] + square if role in squares else square
    return squares


def _square_of_norm(grads: list[torch.Tensor]) -> torch.Tensor:
    """Return Σ g², float32; of gradients that fully_shard has sharded, over all shards."""
    norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads])
    total = norms.square().sum()
    return total.full_tensor() if hasattr(total, "full_tensor") else total  # type: ignore[operator]
