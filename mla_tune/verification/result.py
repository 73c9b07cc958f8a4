"""What a proof returns: the result of `verify`, and the documents that the proving process sends to the merge."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mla_tune import __version__

if TYPE_CHECKING:
    from mla_tune.verification.logits.differences import LogitsReport
    from mla_tune.verification.weights import ProofReport


@dataclass(frozen=True, slots=True)
class ProofDocuments:
    """The proof of an output of merge-absorb as plain dictionaries, which can be sent through a pipe."""

    proof: dict[str, Any]
    """`ProofReport.to_json()`."""
    logits: dict[str, Any] | None
    """`LogitsReport.to_json()`; None if logits were not asked for."""
    hashes: dict[str, str | None]
    """Name of each weight file → its sha256; None for a file of the base, or one that the merge has hashed itself."""


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """The result of `mla_tune.verify`."""

    output: str
    """Folder of the merged checkpoint."""
    base: str
    """Folder of the base that it was compared with."""
    adapters: list[tuple[str, float]]
    """Path and weight of each adapter."""
    proof: ProofReport
    """Which tensors were recomputed, which are unchanged, and which are wrong."""
    logits: LogitsReport | None
    """The comparison of logits; None if it was not asked for, or if tensors are wrong already."""
    notes: list[str]
    """What a user should know about the comparison, a sentence each."""
    mla_tune: str = __version__
    """Version of mla-tune that made this result."""

    @property
    def holds(self) -> bool:
        """Whether every tensor and file is what it must be."""
        return not self.proof.failed

    def to_json(self) -> dict[str, Any]:
        """Return the document that `mla-tune verify --json` prints."""
        adapters = [{"path": path, "weight": weight} for path, weight in self.adapters]
        return asdict(self) | {"holds": self.holds, "adapters": adapters}
