"""`RunRecord`: what run.json says about a run, typed.  `train` writes and returns it; report and `runs` read it."""

from __future__ import annotations

import types
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from mla_tune.checkpoint.atomic_files import write_json
from mla_tune.errors import FileError
from mla_tune.user_files import read_json_object

#: Name of the file, in the run folder.
RUN_FILE = "run.json"
#: What an error calls the file.
WHAT = "the record of the run"
#: `RunRecord.state` of a file that names none.
UNKNOWN = "unknown"


@dataclass(slots=True)
class ProcessRecord:
    """The process that does the run, so that a killed one is told from one that goes on."""

    #: Its number on its machine.
    pid: int
    #: The machine's name.
    host: str
    #: When it began, in seconds since 1970.
    started: float


@dataclass(slots=True)
class Processes:
    """How many processes a run has."""

    #: Processes, one for each GPU.
    count: int = 1
    #: How the model lies in them: `none` (each holds all of it), `fsdp2` or `zero3` (each holds a shard).
    sharding: str = "none"


@dataclass(slots=True)
class Steps:
    """Optimizer steps of a run."""

    #: Steps done so far, those before a resume included.
    done: int = 0
    #: Steps that the recipe asks for; None where it is not known yet.
    planned: int | None = None


@dataclass(slots=True)
class TrainedParameters:
    """What the run trains, by role (`W_O`, `gate`, …)."""

    #: `adapter.method` of the recipe; `none`: every weight is trained.
    method: str = "none"
    #: Adapted matrices.
    matrices: dict[str, int] = field(default_factory=dict)
    #: Rank r of the role's LoRAs.
    ranks: dict[str, int] = field(default_factory=dict)
    #: Parameters of A and B.
    params: dict[str, int] = field(default_factory=dict)
    #: Modules that are trained whole: parameters by path.
    modules_to_save: dict[str, int] = field(default_factory=dict)
    #: All parameters that are trained.
    trainable_params: int = 0
    #: Peak learning rate by role; with LoRA+ by `role.A` and `role.B`; `all` without an adapter.
    learning_rate: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class HeldOutLoss:
    """Mean loss over the held-out rows; nats a token with the objective `sft`."""

    #: Before the first step.
    before: float | None = None
    #: After the last step; None until then.
    after: float | None = None


@dataclass(slots=True)
class SampleAnswer:
    """A held-out prompt and what the model makes of it."""

    #: The prompt as text.
    prompt: str
    #: What the data says comes next.
    reference: str | None = None
    #: The model's answer before training; None where it was not asked yet.
    before: str | None = None
    #: The model's answer after training; None where it was not asked yet.
    after: str | None = None


@dataclass(slots=True)
class Samples:
    """All sample answers of a run."""

    #: Seconds that the answers took, by `before` and `after`.
    seconds: dict[str, float] = field(default_factory=dict)
    #: The answers, in the order of the held-out rows.
    answers: list[SampleAnswer] = field(default_factory=list)


@dataclass(slots=True)
class SpikeCounts:
    """What the spike guard did."""

    #: Steps left out.
    skipped: int = 0
    #: Cuts of all learning rates.
    cuts: int = 0


@dataclass(slots=True)
class MemoryUse:
    """Peaks of memory, in bytes."""

    #: Highest resident memory of the process.
    process_peak: int = 0
    #: Resident memory before the model was loaded.
    before_loading: int = 0
    #: Their difference: what the run itself needed.
    run_peak: int = 0
    #: Highest memory allocated on the GPU; None without one.
    gpu_peak: int | None = None


@dataclass(slots=True)
class RunRecord:
    """The contents of run.json.  What is not known (yet) is None or empty."""

    #: running, done, interrupted (by a signal), failed, or killed; `unknown` where the file does not say.
    state: str = UNKNOWN
    #: Why it failed or stopped.
    error: str | None = None
    #: The process that does the run.
    process: ProcessRecord | None = None
    #: The folder in which the run was started.
    working_folder: str | None = None
    #: Path of the recipe, with all defaults spelled out.
    recipe: str | None = None
    #: `model_type` of the base's config.json.
    model_type: str | None = None
    #: transformers' auto class that loads the base.
    auto_class: str | None = None
    #: The base as the recipe names it.
    base: str | None = None
    #: The base's folder, hub id, or the word `embedded`.
    base_path: str | None = None
    #: `kind` (of what) and `sha256` of the base's weights.
    base_hash: dict[str, str] | None = None
    #: Source, hash and counts of the data, as `plan` shows them (`data.prepare.Prepared.summary`).
    data: dict[str, Any] | None = None
    #: Seed of initialization, data order and dropout.
    seed: int | None = None
    #: Device of the training, as torch names it.
    device: str | None = None
    #: Dtype of the base's weights in memory.
    dtype: str | None = None
    #: `kind`, and numbers of `matrices`, `weights` and `bytes`, of a base kept quantized; None for plain weights.
    quantized: dict[str, Any] | None = None
    #: The processes of the run.
    processes: Processes = field(default_factory=Processes)
    #: Versions, machine, and `date`, when the run was begun or last gone on with (ISO 8601).
    environment: dict[str, Any] = field(default_factory=dict)
    #: Kernels that the run uses: `attention`, and `experts` where there are routed experts.
    kernels: dict[str, str] | None = None
    #: What is trained.
    adapter: TrainedParameters | None = None
    #: How far the run is.
    steps: Steps = field(default_factory=Steps)
    #: Answers to held-out prompts.
    samples: Samples = field(default_factory=Samples)
    #: None where no rows are held out.
    held_out_loss: HeldOutLoss | None = None
    #: Whether the run ended before the planned steps.
    stopped_early: bool | None = None
    #: Seconds of training, without loading; those before a resume included.
    seconds: float = 0.0
    #: Real tokens a second, since the latest start.
    tokens_per_s: float | None = None
    #: What the spike guard did.
    spikes: SpikeCounts | None = None
    #: Peaks of memory, since the latest start.
    memory: MemoryUse | None = None
    #: What a streamed data set has read: records, samples, passes, and rows left out.
    streamed: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON document of run.json."""
        return asdict(self)

    @staticmethod
    def from_json(document: dict[str, Any], where: str) -> RunRecord:
        """Read a JSON document; `where` names it in errors.  Keys that are not known are left out.

        Raises `FileError` with the key whose value is of another type than it should be.
        """
        found: RunRecord = _decode(RunRecord, document, where, ())
        return found

    @staticmethod
    def read(file: Path) -> RunRecord:
        """Read run.json.  Raises `FileError` for a file that is missing, damaged, or of another program."""
        return RunRecord.from_json(read_json_object(file, WHAT), str(file))

    def write(self, file: Path) -> None:
        """Write run.json whole, in one step.  Raises `OSError`."""
        write_json(file, self.to_json())


def _decode(hint: Any, value: Any, where: str, path: tuple[str, ...]) -> Any:
    """The value at `path` of a JSON document as the type `hint` wants it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return None if value is None else _decode(arguments[0], value, where, path)
    if is_dataclass(hint):
        return _decode_record(hint, value, where, path)
    if origin is dict and isinstance(value, dict):
        return {key: _decode(arguments[1], x, where, (*path, key)) for key, x in value.items()}
    if origin is list and isinstance(value, list):
        return [_decode(arguments[0], x, where, (*path, str(i))) for i, x in enumerate(value)]
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is hint:
        return value
    raise _wrong(f"{'.'.join(path)} holds {str(value)[:40]!r}", where)


def _decode_record(hint: Any, value: Any, where: str, path: tuple[str, ...]) -> Any:
    if not isinstance(value, dict):
        raise _wrong(f"{'.'.join(path)} holds {str(value)[:40]!r}", where)
    hints = get_type_hints(hint)
    found = {}
    for entry in fields(hint):
        if entry.name in value:
            found[entry.name] = _decode(hints[entry.name], value[entry.name], where, (*path, entry.name))
        elif entry.default is MISSING and entry.default_factory is MISSING:
            raise _wrong(f"{'.'.join((*path, entry.name))} is missing", where)
    return hint(**found)


def _wrong(what: str, where: str) -> FileError:
    return FileError(f"{where}: {what}, so this is no record of mla-tune train, or one that was edited")
