"""LoRA of routed experts by its factors.  PEFT makes W + s·B A of all experts of a layer for every token, and refuses
rows with adapters of their own there.

    E experts   r rank   N tokens, those of all rows in a line   K experts of a token   n = N·K pairs of the two
    A (E·r, in), experts one after another      B (out, r·E), the experts counted fastest

transformers' batched form of the family's own experts asks its weights for the expert of every pair.  It is given
stacks in their place that multiply each pair's x as

    x → W[e] x + Σ s·B[e] (A[e] x)              A, B and s of the token's own adapter

sorted by expert and adapter, so that every matrix is read once.  Experts without that form (longcat_flash, where some
have no weights) run through the model's own loop, once for each adapter, on that adapter's tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import ParamWrapper
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mla_tune.errors import CheckError, InputError
from mla_tune.inference.lora_tensors import refuse_merged

#: A (E, r, in), B (E, out, r) and s of one adapter.
StackFactors = tuple[torch.Tensor, torch.Tensor, float]
#: What the tokens of one choice of adapters add, by the name of the parameter.
ExpertFactors = dict[str, list[StackFactors]]


def is_experts(layer: Any) -> bool:
    """Whether `layer`, of PEFT, is one on the stacked weights (E, out, in) of routed experts."""
    if not isinstance(layer, ParamWrapper):
        return False
    weights = layer.get_base_layer()._parameters
    return all(
        w._did_swap_in_out_features and (W := weights.get(w.parameter_name)) is not None and W.dim() == 3
        for w in wrappers(layer)
    )


def wrappers(layer: Any) -> Iterator[Any]:
    """`layer` and those inside it: PEFT nests one in the other where several parameters of a module are adapted."""
    while isinstance(layer, ParamWrapper):
        yield layer
        layer = layer.base_layer


class ExpertLora:
    """The adapters of `layer`, PEFT's outermost wrapper of a module of routed experts.

    The experts are given x (N, D), and index and weights (N, K) of each token's experts.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        #: B (E, out, r) in one piece, of the parameter, version and place before it: a matrix of one expert lies all
        #: over PEFT's B, and reading it there takes ten times as long.
        self._kept: dict[tuple[str, str], tuple[Any, int, int, torch.Tensor]] = {}

    def active(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """All tokens with the adapters that are active now."""
        return self._run([self._choice(self.layer.active_adapters, keep=False)], None, x, index, weights)

    def rows(self, names: Sequence[str], x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Each row of the batch with its own adapter; the tokens of a row follow each other."""
        for wrapper in wrappers(self.layer):
            refuse_merged(wrapper)
        if x.dim() != 2 or x.shape[0] % len(names) or {index.dim(), weights.dim()} != {2}:
            raise InputError(f"adapter_names has {len(names)} rows, and experts are given {tuple(x.shape)}")
        tokens = x.shape[0] // len(names)
        if tokens > 1:
            self._kept.clear()  # a prompt: what is derived from parameters is made anew
        numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
        choices = [self._choice([name], keep=True) for name in numbers]
        choice = torch.tensor([numbers[name] for name in names], device=x.device).repeat_interleave(tokens)
        return self._run(choices, choice, x, index, weights)

    def _choice(self, names: Sequence[str], keep: bool) -> ExpertFactors:
        found: ExpertFactors = {}
        for wrapper in wrappers(self.layer):
            here = [name for name in names if name in wrapper.lora_A] if not wrapper.disable_adapters else []
            if here:
                found[wrapper.parameter_name] = [self._factors(wrapper, name, keep) for name in here]
        return found

    def _factors(self, wrapper: Any, name: str, keep: bool) -> StackFactors:
        """Views of PEFT's parameters, but for a kept B."""
        E, key = wrapper.num_experts, (wrapper.parameter_name, name)
        A, p = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
        B = p.view(p.shape[0], -1, E).permute(2, 0, 1)
        if keep and not (torch.is_grad_enabled() and p.requires_grad):
            kept = self._kept.get(key)
            if kept is None or kept[0] is not p or kept[1:3] != (p._version, p.data_ptr()):
                kept = self._kept[key] = (p, p._version, p.data_ptr(), B.contiguous())
            B = kept[3]
        return A.view(E, -1, A.shape[1]), B, float(wrapper.scaling[name])

    def _run(
        self,
        choices: list[ExpertFactors],
        choice: torch.Tensor | None,
        x: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """`choice` (N) is the number of each token's choice; None: there is one."""
        experts = self.layer.get_base_layer()
        if not any(choices):
            return experts(x, index, weights)
        if not _has_batched_form(experts):
            return _by_loop(experts, choices, choice, x, index, weights)
        pairs = Pairs.of(index, choice, len(choices))
        stacks = {
            name: PairStack(W, [c.get(name, []) for c in choices], pairs)
            for name, W in experts._parameters.items()
            if W is not None and W.dim() == 3  # those without an adapter too: the batched form copies W for each pair
        }
        with _in_their_place(experts, stacks):
            return ALL_EXPERTS_FUNCTIONS["batched_mm"](experts, x, index, weights)


def _has_batched_form(experts: Any) -> bool:
    """Whether transformers has one for the class; not where other code has changed what its weights are."""
    return hasattr(experts, "has_gate") and not experts._is_expert_parallel and not hasattr(experts, "parametrizations")


@contextmanager
def _in_their_place(experts: Any, stacks: Mapping[str, Any]) -> Iterator[None]:
    experts.__dict__.update(stacks)  # found before the parameters
    try:
        yield
    finally:
        for name in stacks:
            del experts.__dict__[name]


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs of tokens and experts, a token's own beside each other, and how they lie when sorted.

    `ids` (n) is the expert of each pair, `order` (n) sorts pairs by expert, then by choice, `back` (n) undoes it.
    `segments`: for each expert that is hit, the choices of its tokens with their first and last place in the order.
    """

    ids: torch.Tensor
    order: torch.Tensor
    back: torch.Tensor
    segments: list[tuple[int, list[tuple[int, int, int]]]]

    @classmethod
    def of(cls, index: torch.Tensor, choice: torch.Tensor | None, count: int) -> Pairs:
        """`index` (N, K) of experts; `choice` (N), below `count`."""
        ids = index.reshape(-1)
        keys = ids if choice is None else ids * count + choice.repeat_interleave(index.shape[1])
        keys, order = torch.sort(keys)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        segments: list[tuple[int, list[tuple[int, int, int]]]] = []
        first = 0
        found, sizes = torch.unique_consecutive(keys, return_counts=True)
        for key, size in zip(found.tolist(), sizes.tolist(), strict=True):
            e, number = divmod(key, count)
            if not segments or segments[-1][0] != e:
                segments.append((e, []))
            segments[-1][1].append((number, first, first + size))
            first += size
        return cls(ids, order, back, segments)


class PairStack:
    """The weights W (E, out, in) of all experts, with the factors of each choice, for transformers' batched form."""

    def __init__(self, W: torch.Tensor, choices: list[list[StackFactors]], pairs: Pairs) -> None:
        self.W, self.choices, self.pairs = W, choices, pairs

    def __getitem__(self, ids: torch.Tensor) -> _Picked:
        if not torch.equal(ids, self.pairs.ids):
            raise CheckError("transformers' batched experts take pairs in another order than that of the tokens")
        return _Picked(self)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """(n, out) of x (n, in)."""
        x, parts = x[self.pairs.order], []
        for e, segments in self.pairs.segments:
            start = segments[0][1]
            y = F.linear(x[start : segments[-1][2]], self.W[e])
            for number, first, last in segments:
                part = y[first - start : last - start]
                for A, B, s in self.choices[number]:
                    part = _plus(part, x[first:last], A[e], B[e], s)
                parts.append(part)
        return torch.cat(parts)[self.pairs.back]


class _Picked:
    """`stack[ids]`, which only `bmm` asks for numbers."""

    def __init__(self, stack: PairStack) -> None:
        self.stack = stack

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.bmm or kwargs or not isinstance(args[0], cls):
            return NotImplemented
        picked, x = args
        return picked.stack.multiply(x.squeeze(-1)).unsqueeze(-1)


def _by_loop(
    experts: Any,
    choices: list[ExpertFactors],
    choice: torch.Tensor | None,
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    own = type(experts).forward
    loop = getattr(own, "__wrapped__", own)  # under transformers' choice of another form

    def run(factors: ExpertFactors, *given: torch.Tensor) -> torch.Tensor:
        stacks = {name: LoopStack(getattr(experts, name), found) for name, found in factors.items()}
        with _in_their_place(experts, stacks):
            return loop(experts, *given)

    if choice is None:
        return run(choices[0], x, index, weights)
    out = torch.empty_like(x)
    for number, factors in enumerate(choices):
        tokens = (choice == number).nonzero().squeeze(1)
        out[tokens] = run(factors, x[tokens], index[tokens], weights[tokens])
    return out


class LoopStack:
    """W (E, out, in) with the factors of one choice, for a loop over the experts."""

    def __init__(self, W: torch.Tensor, factors: list[StackFactors]) -> None:
        self.W, self.factors = W, factors

    def __getitem__(self, e: Any) -> _LoopExpert:
        return _LoopExpert(self.W[e], [(A[e], B[e], s) for A, B, s in self.factors])


class _LoopExpert:
    """W (out, in), A (r, in), B (out, r) and s of one expert, which only `linear` asks for numbers."""

    def __init__(self, W: torch.Tensor, factors: list[StackFactors]) -> None:
        self.W, self.factors = W, factors

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear or kwargs or len(args) != 2:
            return NotImplemented
        x, self = args
        y = F.linear(x, self.W)
        for A, B, s in self.factors:
            y = _plus(y, x, A, B, s)
        return y


def _plus(y: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, s: float) -> torch.Tensor:
    """y + s·B (A x), y (m, out), x (m, in)."""
    inner = F.linear(x.to(A.dtype), A)
    if y.dtype == inner.dtype:
        return torch.addmm(y, inner, B.mT, alpha=s)
    return y + (F.linear(inner, B) * s).to(y.dtype)
