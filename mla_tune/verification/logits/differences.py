"""How far two sets of logits lie from each other, and the report of a comparison."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class LogitsDifference:
    """Logits of one way (`reference`) and another (`other`), over all tokens.

    `max_error` is the largest difference of two logits, `largest` the largest logit of the reference (without sign),
    `kl` the mean over tokens of KL(reference ‖ other) in nats, `top1` the share of tokens with the same best next one.
    """

    reference: str
    other: str
    max_error: float
    largest: float
    kl: float
    top1: float


@dataclass(frozen=True, slots=True)
class LogitsReport:
    """What the logits said.

    `ran` tells whether anything was compared; `reason` why not, or why not everything (empty: everything was).
    `effect` compares the base with base + adapters, `merged` base + adapters with the merged model, `absorbed` the
    merged model with its absorbed form; None where it was not compared.  `idle`: the adapters change no logit by
    more than float32's rounding does, so that a merge can't be told from none.  `memory` is the estimate in bytes
    that `dtype` was chosen by.
    """

    ran: bool
    reason: str
    tokens: int
    seed: int
    dtype: str | None
    effect: LogitsDifference | None
    merged: LogitsDifference | None
    absorbed: LogitsDifference | None
    idle: bool
    memory: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The document under `logits` in the results of `verify` and `merge-absorb`."""
        return asdict(self)


def difference(reference: str, a: torch.Tensor, other: str, b: torch.Tensor) -> LogitsDifference:
    """Of logits (T, vocabulary), token by token: in float64 all of them at once are more than a layer's weights."""
    kl = same = 0.0
    for x, y in zip(a, b, strict=True):
        p, q = x.double().log_softmax(-1), y.double().log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        same += float(x.argmax() == y.argmax())
    return LogitsDifference(
        reference=reference,
        other=other,
        max_error=float((a - b).abs().max()),
        largest=float(a.abs().max()),
        kl=kl / len(a),
        top1=same / len(a),
    )
