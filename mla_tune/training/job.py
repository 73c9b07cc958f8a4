"""`TrainingJob`: what the parts of a run share.  `run` fills it from top to bottom, `loop` works with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mla_tune.adapter.placement import Placement
from mla_tune.arch.site import Architecture
from mla_tune.data.prepare import Prepared
from mla_tune.model.load import Loaded
from mla_tune.recipe.schema import Recipe
from mla_tune.runs.folder import RunFolder
from mla_tune.runs.record import RunRecord
from mla_tune.training.distributed.team import Team
from mla_tune.training.objective import Objective


@dataclass
class TrainingJob:
    """One run of `train`."""

    #: The effective recipe.
    recipe: Recipe
    #: What is adapted.
    placement: Placement
    #: The model's architecture.
    arch: Architecture
    #: The processes of the run.
    team: Team
    #: What is minimized.
    objective: Objective
    #: Where the run writes.
    folder: RunFolder = field(init=False)
    #: The checkpoint that a resumed run goes on from; None at the start.
    checkpoint: Path | None = field(init=False)
    #: The base's tokenizer.
    tokenizer: Any = field(init=False)
    #: The rows.
    data: Prepared = field(init=False)
    #: The base model.
    loaded: Loaded = field(init=False)
    #: Resident bytes of the process before the model was loaded.
    start_memory: int = field(init=False)
    #: The contents of run.json.
    record: RunRecord = field(default_factory=RunRecord)

    def write_record(self) -> None:
        """Write run.json, in the main process."""
        if self.team.is_main_process:
            self.folder.write(self.record)
