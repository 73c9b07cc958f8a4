"""How far two sets of logits differ, and the report on a comparison of logits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class LogitsDifference:
    """How far the logits `other` differ from the logits `reference`, over all tokens."""

    reference: str
    """What computed the one: `base`, `base + adapters`, `merged`."""
    other: str
    """What computed the other."""
    max_error: float
    """The largest absolute difference of two logits."""
    largest: float
    """The largest absolute logit of the reference."""
    kl: float
    """KL(reference ‖ other) in nats, mean over tokens."""
    top1: float
    """Share of tokens after which both have the same most likely next token (0 to 1)."""


@dataclass(frozen=True, slots=True)
class LogitsReport:
    """The result of a comparison of logits."""

    ran: bool
    """Whether anything was compared."""
    reason: str
    """Why nothing, or not everything, was compared; empty where everything was."""
    tokens: int
    """How many random tokens were the input."""
    seed: int
    """Seed of these tokens."""
    dtype: str | None
    """The dtype computed in, `float32` or `bfloat16`; None where nothing was computed."""
    effect: LogitsDifference | None
    """Base against base + adapters; None where it was not compared, as for the next two."""
    merged: LogitsDifference | None
    """Base + adapters against the merged model."""
    absorbed: LogitsDifference | None
    """The merged model against the merged model with absorbed attention."""
    idle: bool
    """The adapters change no logit by more than float32's rounding does, so `merged` can't tell a merge from none."""
    memory: int
    """Estimated bytes of memory, by which `dtype` was chosen."""
    seconds: float
    """Seconds that were spent."""

    def to_json(self) -> dict[str, Any]:
        """Return the document under `logits` in the results of `verify` and `merge-absorb`."""
        return asdict(self)


def difference(reference: str, a: torch.Tensor, other: str, b: torch.Tensor) -> LogitsDifference:
    """Compare logits `a`, computed by `reference`, with `b`, computed by `other`: (T, vocabulary), float32."""
    # One token at a time: all of them in float64 may take more memory than a layer's weights.
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
