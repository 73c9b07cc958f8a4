"""What the parts of a run share: `run` fills it from top to bottom, `loop` works with it."""

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
from mla_tune.training.distributed.team import Team
from mla_tune.training.objective import Objective


@dataclass
class Job:
    """A run of `train`.  `run` is what run.json holds; `checkpoint` where it goes on from."""

    recipe: Recipe
    placement: Placement
    arch: Architecture
    team: Team
    objective: Objective
    folder: RunFolder = field(init=False)
    checkpoint: Path | None = field(init=False)
    tokenizer: Any = field(init=False)
    data: Prepared = field(init=False)
    loaded: Loaded = field(init=False)
    start_memory: int = field(init=False)
    run: dict[str, Any] = field(default_factory=dict)

    def record(self) -> None:
        """Write run.json."""
        if self.team.is_main_process:
            self.folder.write(self.run)
