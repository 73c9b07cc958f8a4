"""`train.activation_checkpointing: mla`: norms, MLA up-projections and what they make are
computed again in the backward pass.

DeepSeek-V3's report (arXiv:2412.19437, section 3.2.3) recomputes "all RMSNorm operations and MLA up-projections during
back-propagation", so that their outputs are not kept.  Kept are the latents (W_DQ's and W_DKV's outputs, C + R + L
numbers a token) and the attention's output; computed again are the norms, queries, keys and values of all heads
(H(2(P+R) + V) numbers a token) with their rotary part.  Attention itself, the dear part, is not computed again.

Three small pieces, whatever the family's own forward looks like:

- Norms are the lean ones of `train.norms`, which keep their input.
- A norm's output that something wants to keep (the A of a LoRA, the router) is kept as a note how to make it.
- An attention module runs inside torch's checkpoint with W_O taken out and the down-projections' results put in.
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
    notes = _Notes()
    use_lean_norms(model, notes.add)
    for module in model.modules():
        if hasattr(module, "kv_b_proj") and hasattr(module, "expand_kv"):
            _recompute_attention(module)
    inner = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        with torch.autograd.graph.saved_tensors_hooks(notes.pack, notes.unpack):
            return inner(*args, **kwargs)

    model.forward = forward


class _Notes:
    """Norm outputs of the forward pass under way, by their storage, and how to make each again."""

    def __init__(self) -> None:
        self.made: dict[tuple[int, torch.dtype, int], _Note] = {}

    def add(self, output: torch.Tensor, make: Callable[[], torch.Tensor]) -> None:
        key = self._key(output)
        self.made[key] = _Note(make)
        # Before another tensor can come to lie in its place.
        weakref.finalize(output, self.made.pop, key, None)

    @staticmethod
    def _key(t: torch.Tensor) -> tuple[int, torch.dtype, int]:
        return t.untyped_storage().data_ptr(), t.dtype, t.numel()

    def pack(self, t: torch.Tensor) -> Any:
        note = self.made.get(self._key(t)) if t.is_contiguous() else None
        return t if note is None else (note, t.shape)

    @staticmethod
    def unpack(kept: Any) -> torch.Tensor:
        return kept if isinstance(kept, torch.Tensor) else kept[0]().view(kept[1])


class _Note:
    """How to make a norm's output again; the tensor made is shared while somebody holds it."""

    def __init__(self, make: Callable[[], torch.Tensor]) -> None:
        self.make = make
        self.last: weakref.ref[torch.Tensor] | None = None

    def __call__(self) -> torch.Tensor:
        found = self.last() if self.last is not None else None
        if found is None:
            with torch.no_grad():
                found = self.make()
            self.last = weakref.ref(found)
        return found


class _Given(torch.nn.Module):
    """Stands for a module whose result is there already."""

    def __init__(self, result: torch.Tensor | None = None) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.result is None else self.result


@contextlib.contextmanager
def _swapped(module: torch.nn.Module, others: dict[str, torch.nn.Module]) -> Iterator[None]:
    kept = {name: module._modules[name] for name in others}
    module._modules.update(others)
    try:
        yield
    finally:
        module._modules.update(kept)


def _recompute_attention(attention: Any) -> None:
    original = attention.forward
    down = [name for name in DOWN if isinstance(attention._modules.get(name), torch.nn.Module)]
    dropouts = [m for m in attention.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    draws = bool(getattr(attention, "attention_dropout", 0)) or bool(dropouts)

    def core(hidden: torch.Tensor, given: dict[str, torch.Tensor], memo: list[Any], kwargs: dict[str, Any]) -> Any:
        others = {name: _Given(result) for name, result in given.items()}
        token = ATTENTION_CACHE.set(memo)
        try:
            with _swapped(attention, {**others, "o_proj": _Given()}):
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
            # The packed attention remembers its own result; a dispatcher takes microseconds for each operation.
            context_fn=noop_context_fn if attention.config._attn_implementation == NAME else _contexts,
        )
        return (attention.o_proj(out), *rest)

    attention.forward = torch.compiler.disable(forward)  # a compiled region plans for itself what it keeps


def _contexts() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_policy)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = op.name() if hasattr(op, "name") else str(op)
    kept = name.partition("::")[2].partition(".")[0] in _ATTENTION or "flash_attn" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
