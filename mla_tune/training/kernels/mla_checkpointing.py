"""`train.activation_checkpointing: mla`: the backward pass computes norms and MLA up-projections again.

DeepSeek-V3's report (arXiv:2412.19437, section 3.2.3) recomputes "all RMSNorm operations and MLA up-projections during
back-propagation", so that their outputs are not kept.  The latents (outputs of W_DQ and W_DKV, C + R + L numbers a
token) and the attention's output are kept.  The norms, and the queries, keys and values of all heads (H(2(P+R) + V)
numbers a token) with their rotary part, are computed again.  Attention itself, which costs most, is not.

Three parts, which work with any family's own forward:

- Norms are those of `rms_norm`, which keep their input.
- Where something keeps a norm's output (the A of a LoRA, the router), a recipe for computing it again is kept instead.
- An attention module runs inside torch's checkpoint, with W_O taken out and the down-projections' results put in.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from mla_tune.training.kernels.packed_attention import ATTENTION_CACHE, NAME
from mla_tune.training.kernels.rms_norm import use_lean_norms

#: Submodules whose results are kept, so that only what comes after them is computed again.
DOWN = ("q_a_proj", "kv_a_proj_with_mqa")
_aten = torch.ops.aten
#: torch's fused attention on each device; other libraries' are told by their name.
_ATTENTION = {
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
}


def enable_mla_checkpointing(model: torch.nn.Module) -> None:
    """Make every RMSNorm and MLA attention of `model` recompute; outputs stay the same bits, gradients too but for
    the order of sums.

    Call it after adapters are attached: modules are looked up when they run.
    """
    outputs = _NormOutputs()
    use_lean_norms(model, outputs.add)
    for module in model.modules():
        if hasattr(module, "kv_b_proj") and hasattr(module, "expand_kv"):
            _recompute_attention(module)
    inner = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        with torch.autograd.graph.saved_tensors_hooks(outputs.pack, outputs.unpack):
            return inner(*args, **kwargs)

    model.forward = forward


class _NormOutputs:
    """Norm outputs of the forward pass under way, found by their storage; each can be computed again.

    `pack` and `unpack` are autograd's hooks for saved tensors: where a norm's output is to be saved, how to compute it
    is saved instead.
    """

    def __init__(self) -> None:
        self.known: dict[tuple[int, torch.dtype, int], _Recomputable] = {}

    def add(self, output: torch.Tensor, recompute: Callable[[], torch.Tensor]) -> None:
        """Remember how to compute `output` again, as long as it exists."""
        key = self._key(output)
        self.known[key] = _Recomputable(recompute)
        # Before another tensor can get the same storage.
        weakref.finalize(output, self.known.pop, key, None)

    @staticmethod
    def _key(t: torch.Tensor) -> tuple[int, torch.dtype, int]:
        return t.untyped_storage().data_ptr(), t.dtype, t.numel()

    def pack(self, t: torch.Tensor) -> Any:
        """Return what is saved in the place of `t`."""
        found = self.known.get(self._key(t)) if t.is_contiguous() else None
        return t if found is None else (found, t.shape)

    @staticmethod
    def unpack(saved: Any) -> torch.Tensor:
        """Return the tensor that `pack` was given."""
        return saved if isinstance(saved, torch.Tensor) else saved[0]().view(saved[1])


class _Recomputable:
    """Computes a norm's output again when called; while the result is in use, further calls return the same tensor."""

    def __init__(self, recompute: Callable[[], torch.Tensor]) -> None:
        self.recompute = recompute
        self.last: weakref.ref[torch.Tensor] | None = None

    def __call__(self) -> torch.Tensor:
        found = self.last() if self.last is not None else None
        if found is None:
            with torch.no_grad():
                found = self.recompute()
            self.last = weakref.ref(found)
        return found


class _Constant(torch.nn.Module):
    """Stands in for a module whose result is known; without a result it returns its input."""

    def __init__(self, result: torch.Tensor | None = None) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.result is None else self.result


@contextlib.contextmanager
def _replaced_submodules(module: torch.nn.Module, others: dict[str, torch.nn.Module]) -> Iterator[None]:
    """Within this context `others` stand in the place of the submodules of the same names."""
    kept = {name: module._modules[name] for name in others}
    module._modules.update(others)
    try:
        yield
    finally:
        module._modules.update(kept)


def _recompute_attention(attention: Any) -> None:
    """Let an MLA module keep its latents and the attention's output, and compute the rest again."""
    original = attention.forward
    down = [name for name in DOWN if isinstance(attention._modules.get(name), torch.nn.Module)]
    dropouts = [m for m in attention.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    draws = bool(getattr(attention, "attention_dropout", 0)) or bool(dropouts)

    def core(hidden: torch.Tensor, given: dict[str, torch.Tensor], cache: list[Any], kwargs: dict[str, Any]) -> Any:
        others = {name: _Constant(result) for name, result in given.items()}
        token = ATTENTION_CACHE.set(cache)
        try:
            with _replaced_submodules(attention, {**others, "o_proj": _Constant()}):
                return original(hidden, **kwargs)
        finally:
            ATTENTION_CACHE.reset(token)

    def forward(hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return original(hidden_states, **kwargs)
        given = {name: attention._modules[name](hidden_states) for name in down}
        out, *rest = checkpoint(
            core,
            hidden_states,
            given,
            [],
            kwargs,
            use_reentrant=False,
            preserve_rng_state=attention.training and draws,
            # The packed attention keeps its result in the cache; a dispatcher would cost microseconds an operation.
            context_fn=noop_context_fn if attention.config._attn_implementation == NAME else _contexts,
        )
        return (attention.o_proj(out), *rest)

    attention.forward = torch.compiler.disable(forward)  # a compiled region decides itself what it keeps


def _contexts() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_policy)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = op.name() if hasattr(op, "name") else str(op)
    kept = name.partition("::")[2].partition(".")[0] in _ATTENTION or "flash_attn" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
