"""LoRA of routed experts by its factors, with an adapter for each row of a batch where asked for.

PEFT computes W + s·B A of all experts of a layer in every forward, and refuses rows with different adapters there.

    E experts   r rank   N tokens of all rows   K experts of a token   n = N·K pairs of a token and an expert
    A (E·r, in), expert by expert      B (out, r·E), where the index of the expert varies fastest

transformers' `batched_mm` form of routed experts indexes each weight W (E, out, in) with the expert of every pair, and
multiplies.  In place of W it gets a `GroupedExpertWeights`, which computes for each pair

    x → W[e] x + Σ s·B[e] (A[e] x)              with A, B and s of the token's adapters

sorted by expert and adapter, so that every matrix is read once.  Experts without that form (longcat_flash, where some
experts have no weights) run in the loop of the model's class, once for each adapter, on the tokens of that adapter.

A *group* is the set of tokens with the same adapters.
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
#: The factors of one group's adapters, by the name of the parameter that they adapt.
ExpertFactors = dict[str, list[StackFactors]]


def is_experts(layer: Any) -> bool:
    """Whether `layer`, of PEFT, adapts the stacked weights (E, out, in) of routed experts."""
    if not isinstance(layer, ParamWrapper):
        return False
    weights = layer.get_base_layer()._parameters
    return all(
        w._did_swap_in_out_features and (W := weights.get(w.parameter_name)) is not None and W.dim() == 3
        for w in wrappers(layer)
    )


def wrappers(layer: Any) -> Iterator[Any]:
    """Yield `layer` and the layers inside it: PEFT nests one for each adapted parameter of a module."""
    while isinstance(layer, ParamWrapper):
        yield layer
        layer = layer.base_layer


class ExpertLora:
    """The adapters of `layer`, PEFT's outermost layer around a module of routed experts.

    The forward methods take tokens x (N, D), and the index and the weight of each token's experts, both (N, K).
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        #: Contiguous copies of B (E, out, r) by (parameter name, adapter name), each after PEFT's parameter, its
        #: version and its place in memory when the copy was made.  In PEFT's B the matrix of one expert is scattered,
        #: and reading it there takes ten times as long.
        self._contiguous_B: dict[tuple[str, str], tuple[Any, int, int, torch.Tensor]] = {}

    def forward_active(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Compute all tokens with the active adapters."""
        return self._run([self._group(self.layer.active_adapters, cache_B=False)], None, x, index, weights)

    def forward_batched(
        self, names: Sequence[str], x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Compute row i of the batch with the adapter `names[i]`; x holds the tokens row after row.

        Raises `InputError` where the number of tokens is no multiple of that of names, or adapters are merged.
        """
        for wrapper in wrappers(self.layer):
            refuse_merged(wrapper)
        if x.dim() != 2 or x.shape[0] % len(names) or {index.dim(), weights.dim()} != {2}:
            raise InputError(
                f"adapter_names has {len(names)} names, but experts got an input of shape {tuple(x.shape)}"
            )
        tokens = x.shape[0] // len(names)
        if tokens > 1:
            self._contiguous_B.clear()  # several tokens a row: a prompt begins
        group_of_name = {name: i for i, name in enumerate(dict.fromkeys(names))}
        groups = [self._group([name], cache_B=True) for name in group_of_name]
        token_groups = torch.tensor([group_of_name[name] for name in names], device=x.device).repeat_interleave(tokens)
        return self._run(groups, token_groups, x, index, weights)

    def _group(self, names: Sequence[str], *, cache_B: bool) -> ExpertFactors:
        """Return the factors of the adapters `names`."""
        group: ExpertFactors = {}
        for wrapper in wrappers(self.layer):
            present = [name for name in names if name in wrapper.lora_A] if not wrapper.disable_adapters else []
            if present:
                group[wrapper.parameter_name] = [self._factors(wrapper, name, cache_B=cache_B) for name in present]
        return group

    def _factors(self, wrapper: Any, name: str, *, cache_B: bool) -> StackFactors:
        """Return the factors of one adapter: views of PEFT's parameters, or a cached contiguous B where asked for."""
        E, key = wrapper.num_experts, (wrapper.parameter_name, name)
        A, p = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
        B = p.view(p.shape[0], -1, E).permute(2, 0, 1)
        if cache_B and not (torch.is_grad_enabled() and p.requires_grad):
            cached = self._contiguous_B.get(key)
            if cached is None or cached[0] is not p or cached[1:3] != (p._version, p.data_ptr()):
                cached = self._contiguous_B[key] = (p, p._version, p.data_ptr(), B.contiguous())
            B = cached[3]
        return A.view(E, -1, A.shape[1]), B, float(wrapper.scaling[name])

    def _run(
        self,
        groups: list[ExpertFactors],
        token_groups: torch.Tensor | None,
        x: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """Run the experts.  `token_groups` (N) is the index of each token's group; None where there is one group."""
        experts = self.layer.get_base_layer()
        if not any(groups):
            return experts(x, index, weights)
        if not _has_batched_form(experts):
            return _run_loop(experts, groups, token_groups, x, index, weights)
        pairs = SortedPairs.sort(index, token_groups, len(groups))
        stacks = {
            name: GroupedExpertWeights(W, [group.get(name, []) for group in groups], pairs)
            for name, W in experts._parameters.items()
            # Weights without an adapter too, because `batched_mm` would copy W[e] for each pair.
            if W is not None and W.dim() == 3
        }
        with _weights_replaced(experts, stacks):
            return ALL_EXPERTS_FUNCTIONS["batched_mm"](experts, x, index, weights)


def _has_batched_form(experts: Any) -> bool:
    """Whether `batched_mm` of transformers can run these experts with our objects in place of their weights."""
    return hasattr(experts, "has_gate") and not experts._is_expert_parallel and not hasattr(experts, "parametrizations")


@contextmanager
def _weights_replaced(experts: Any, stacks: Mapping[str, Any]) -> Iterator[None]:
    """Let `experts.NAME` be `stacks[NAME]` within the block."""
    experts.__dict__.update(stacks)  # Python looks there before torch looks among the parameters
    try:
        yield
    finally:
        for name in stacks:
            del experts.__dict__[name]


@dataclass(frozen=True, slots=True)
class SortedPairs:
    """The n pairs of a token and one of its experts, and their order by expert and group."""

    ids: torch.Tensor
    """Expert of each pair (n); the pairs of a token follow each other."""
    order: torch.Tensor
    """Indices (n) that sort the pairs by expert, then by group."""
    inverse: torch.Tensor
    """Indices (n) that undo that order."""
    segments: list[tuple[int, list[tuple[int, int, int]]]]
    """For each expert that has pairs, in order: the expert, and (group, first, last) of each group among its pairs, as
    a range of sorted pairs."""

    @classmethod
    def sort(cls, index: torch.Tensor, token_groups: torch.Tensor | None, count: int) -> SortedPairs:
        """Sort the pairs of `index` (N, K), the experts of each token; `token_groups` (N) are below `count`."""
        ids = index.reshape(-1)
        keys = ids if token_groups is None else ids * count + token_groups.repeat_interleave(index.shape[1])
        keys, order = torch.sort(keys)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        segments: list[tuple[int, list[tuple[int, int, int]]]] = []
        first = 0
        distinct, sizes = torch.unique_consecutive(keys, return_counts=True)
        for key, size in zip(distinct.tolist(), sizes.tolist(), strict=True):
            e, group = divmod(key, count)
            if not segments or segments[-1][0] != e:
                segments.append((e, []))
            segments[-1][1].append((group, first, first + size))
            first += size
        return cls(ids, order, inverse, segments)


class GroupedExpertWeights:
    """Stands for the weights W (E, out, in) of all experts, with the factors of each group, in `batched_mm`."""

    def __init__(self, W: torch.Tensor, groups: list[list[StackFactors]], pairs: SortedPairs) -> None:
        self.W, self.groups, self.pairs = W, groups, pairs

    def __getitem__(self, ids: torch.Tensor) -> _SelectedWeights:
        if not torch.equal(ids, self.pairs.ids):
            raise CheckError("transformers' batched_mm of routed experts no longer orders pairs by token")
        return _SelectedWeights(self)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Return (n, out) for x (n, in), one row a pair."""
        x, parts = x[self.pairs.order], []
        for e, segments in self.pairs.segments:
            start = segments[0][1]
            y = F.linear(x[start : segments[-1][2]], self.W[e])
            for group, first, last in segments:
                part = y[first - start : last - start]
                for A, B, s in self.groups[group]:
                    part = _add_lora(part, x[first:last], A[e], B[e], s)
                parts.append(part)
        return torch.cat(parts)[self.pairs.inverse]


class _SelectedWeights:
    """Stands for `W[ids]` (n, out, in), which is never computed: `torch.bmm` is the only operation it supports."""

    def __init__(self, weights: GroupedExpertWeights) -> None:
        self.weights = weights

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.bmm or kwargs or not isinstance(args[0], cls):
            return NotImplemented
        selected, x = args
        return selected.weights.multiply(x.squeeze(-1)).unsqueeze(-1)


def _run_loop(
    experts: Any,
    groups: list[ExpertFactors],
    token_groups: torch.Tensor | None,
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Run the loop over experts of the model's class, once for each group, on that group's tokens."""
    forward = type(experts).forward
    loop = getattr(forward, "__wrapped__", forward)  # transformers' decorator would choose another form

    def run(group: ExpertFactors, *inputs: torch.Tensor) -> torch.Tensor:
        stacks = {name: LoopExpertWeights(getattr(experts, name), factors) for name, factors in group.items()}
        with _weights_replaced(experts, stacks):
            return loop(experts, *inputs)

    if token_groups is None:
        return run(groups[0], x, index, weights)
    out = torch.empty_like(x)
    for i, group in enumerate(groups):
        tokens = (token_groups == i).nonzero().squeeze(1)
        out[tokens] = run(group, x[tokens], index[tokens], weights[tokens])
    return out


class LoopExpertWeights:
    """Stands for the weights W (E, out, in), with the factors of one group, in a loop over the experts."""

    def __init__(self, W: torch.Tensor, factors: list[StackFactors]) -> None:
        self.W, self.factors = W, factors

    def __getitem__(self, e: Any) -> _LoopExpertWeight:
        return _LoopExpertWeight(self.W[e], [(A[e], B[e], s) for A, B, s in self.factors])


class _LoopExpertWeight:
    """Stands for the weight (out, in) of one expert; `F.linear` is the only operation it supports."""

    def __init__(self, W: torch.Tensor, factors: list[StackFactors]) -> None:
        self.W, self.factors = W, factors

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear or kwargs or len(args) != 2:
            return NotImplemented
        x, self = args
        y = F.linear(x, self.W)
        for A, B, s in self.factors:
            y = _add_lora(y, x, A, B, s)
        return y


def _add_lora(y: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, s: float) -> torch.Tensor:
    """Return y + s·B (A x) for y (m, out) and x (m, in)."""
    inner = F.linear(x.to(A.dtype), A)
    if y.dtype == inner.dtype:
        return torch.addmm(y, inner, B.mT, alpha=s)
    return y + (F.linear(inner, B) * s).to(y.dtype)
