"""What a proof leaves behind: the result of `verify`, and the part of it that travels between two processes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mla_tune import __version__

if TYPE_CHECKING:
    from mla_tune.verification.logits.differences import LogitsReport
    from mla_tune.verification.weights import ProofReport


@dataclass(frozen=True, slots=True)
class Proven:
    """The proof of an output of merge-absorb, as documents that can be sent through a pipe."""

    #: `ProofReport.to_json`.
    proof: dict[str, Any]
    #: `LogitsReport.to_json`; None where logits were not asked for.
    logits: dict[str, Any] | None
    #: sha256 of each file of weights that was read; None for a file of the base, or one whose hash was known.
    hashes: dict[str, str | None]


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """The result of `mla_tune.verify`."""

    #: Folder of the merged checkpoint.
    output: str
    #: Folder of the base that it was compared with.
    base: str
    #: Path and weight of each adapter.
    adapters: list[tuple[str, float]]
    #: The numbers: what was recomputed, what is unchanged, and what differs.
    proof: ProofReport
    #: The logits; None where they were not asked for, or the numbers already differ.
    logits: LogitsReport | None
    #: What a user should know about the comparison, a sentence each.
    notes: list[str]
    mla_tune: str = __version__

    @property
    def holds(self) -> bool:
        """Whether every number is what it must be."""
        return not self.proof.failed

    def to_json(self) -> dict[str, Any]:
        """The document that `mla-tune verify --json` prints."""
        adapters = [{"path": path, "weight": weight} for path, weight in self.adapters]
        return asdict(self) | {"holds": self.holds, "adapters": adapters}
