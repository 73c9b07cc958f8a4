"""Recompute norms and MLA up-projections in the backward pass (`train.activation_checkpointing: mla`).

DeepSeek-V3's report (arXiv:2412.19437, section 3.2.3) recomputes "all RMSNorm operations and MLA up-projections during
back-propagation", so that their outputs need not be saved.

- Saved: the latents (outputs of W_DQ and W_DKV, C + R + L numbers a token) and the output of attention.
- Recomputed: the norms, and queries, keys and values of all heads with their rotary part (H(2(P+R) + V) numbers a
  token).  Attention itself, which costs most, is not recomputed.

It works with the forward of any family, in three parts:

- Norms are those of `rms_norm`, which save their input.
- Where autograd would save a norm's output (for the A of a LoRA, for the router), it saves a function that computes the
  output again.
- An attention module runs inside torch's checkpoint.  Its down-projections are computed before and their outputs are
  passed in; W_O is computed after it.
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

#: Down-projections, whose outputs are saved: only what follows them is recomputed.
DOWN_PROJECTIONS = ("q_a_proj", "kv_a_proj_with_mqa")
_aten = torch.ops.aten
#: torch's fused attention on each device; that of other libraries is recognized by "flash_attn" in its name.
_ATTENTION_OPS = {
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
}


def enable_mla_checkpointing(model: torch.nn.Module) -> None:
    """Let the backward pass recompute every RMSNorm and MLA attention of `model`.

    Outputs are equal bit for bit; gradients may differ by the order of sums.  Call it after adapters are attached:
    whether there is dropout, which a LoRA may have, is found out here.  Submodules are looked up when they run.
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
    """The outputs of norms in the current forward pass, and how to recompute each.

    `pack` and `unpack` are autograd's hooks for saved tensors: in the place of a norm's output, autograd saves how to
    recompute it.
    """

    def __init__(self) -> None:
        #: Storage, dtype and size of an output → how to recompute it.
        self.known: dict[tuple[int, torch.dtype, int], _Recomputable] = {}

    def add(self, output: torch.Tensor, recompute: Callable[[], torch.Tensor]) -> None:
        """Remember how to recompute `output`, as long as it exists."""
        key = self._key(output)
        self.known[key] = _Recomputable(recompute)
        # Forgotten when the output is freed, because another tensor can get the same storage then.
        weakref.finalize(output, self.known.pop, key, None)

    @staticmethod
    def _key(t: torch.Tensor) -> tuple[int, torch.dtype, int]:
        return t.untyped_storage().data_ptr(), t.dtype, t.numel()

    def pack(self, t: torch.Tensor) -> Any:
        """Return what autograd saves in the place of `t`: (how to recompute it, its shape), or `t` itself."""
        found = self.known.get(self._key(t)) if t.is_contiguous() else None
        return t if found is None else (found, t.shape)

    @staticmethod
    def unpack(saved: Any) -> torch.Tensor:
        """Return the tensor that was given to `pack`."""
        return saved if isinstance(saved, torch.Tensor) else saved[0]().view(saved[1])


class _Recomputable:
    """Recomputes a norm's output when it is called; while a result is in use, further calls return the same tensor."""

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
    """A module that returns a given result, or without one its input."""

    def __init__(self, result: torch.Tensor | None = None) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.result is None else self.result


@contextlib.contextmanager
def _replaced_submodules(module: torch.nn.Module, replacements: dict[str, torch.nn.Module]) -> Iterator[None]:
    """Replace the submodules of these names within this context."""
    originals = {name: module._modules[name] for name in replacements}
    module._modules.update(replacements)
    try:
        yield
    finally:
        module._modules.update(originals)


def _recompute_attention(attention: Any) -> None:
    """Let an MLA module save its latents and the output of attention, and recompute the rest."""
    original = attention.forward
    down = [name for name in DOWN_PROJECTIONS if isinstance(attention._modules.get(name), torch.nn.Module)]
    dropouts = [m for m in attention.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    has_dropout = bool(getattr(attention, "attention_dropout", 0)) or bool(dropouts)

    def recomputed(
        hidden: torch.Tensor, latents: dict[str, torch.Tensor], cache: list[Any], kwargs: dict[str, Any]
    ) -> Any:
        """Run the module with the outputs of its down-projections given, and without W_O."""
        replacements = {name: _Constant(result) for name, result in latents.items()}
        token = ATTENTION_CACHE.set(cache)
        try:
            with _replaced_submodules(attention, {**replacements, "o_proj": _Constant()}):
                return original(hidden, **kwargs)
        finally:
            ATTENTION_CACHE.reset(token)

    def forward(hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return original(hidden_states, **kwargs)
        latents = {name: attention._modules[name](hidden_states) for name in down}
        out, *rest = checkpoint(
            recomputed,
            hidden_states,
            latents,
            [],
            kwargs,
            use_reentrant=False,
            preserve_rng_state=attention.training and has_dropout,
            # Packed attention takes its output from the cache, so it needs no selective checkpointing, whose dispatcher
            # costs microseconds for each operation.
            context_fn=noop_context_fn if attention.config._attn_implementation == NAME else _contexts,
        )
        return (attention.o_proj(out), *rest)

    attention.forward = torch.compiler.disable(forward)  # a compiled region decides by itself what it saves


def _contexts() -> tuple[Any, Any]:
    """Contexts in which torch's checkpoint saves the output of fused attention."""
    return create_selective_checkpoint_contexts(_policy)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = op.name() if hasattr(op, "name") else str(op)
    is_attention = name.partition("::")[2].partition(".")[0] in _ATTENTION_OPS or "flash_attn" in name
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE
