"""Fixtures of the tests of inference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mla_tune.inference.latent_attention import LatentAttention


@pytest.fixture
def absorbed_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of query tokens of each absorbed attention call, in order."""
    calls: list[int] = []
    attend = LatentAttention.attend

    def counted(self: LatentAttention, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(query.shape[2])
        return attend(self, query, *args, **kwargs)

    monkeypatch.setattr(LatentAttention, "attend", counted)
    return calls
