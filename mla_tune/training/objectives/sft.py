"""`train.objective: sft`: the cross-entropy of the trained tokens, in nats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mla_tune.training.kernels.chunked_loss import KEYWORD, use_chunked_loss
from mla_tune.training.objective import Objective, SummedLoss


class SupervisedFineTuning(Objective):
    """Cross-entropy summed over the trained tokens (those with a label), computed without all logits at once."""

    def prepare_model(self, model: Any) -> None:
        """Let the model answer with its loss, scored a chunk of tokens at a time."""
        use_chunked_loss(model)

    def loss(self, model: Any, batch: Mapping[str, Any]) -> SummedLoss:
        """Sum of −log p(token) over the trained tokens; no metrics."""
        return SummedLoss(model(**batch, **{KEYWORD: True}))
