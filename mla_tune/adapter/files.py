"""A PEFT adapter folder → which low-rank factors sit on which site.

Three namespaces meet here (deepseek_v3's dense and routed MLPs as examples):

    adapter key (base_model.model. before it)              module path, parameter name
    model.layers.0.mlp.gate_proj.lora_A.weight             model.layers.0.mlp.gate_proj, as module or as `.weight`
    model.layers.3.mlp.experts.base_layer.lora_A.weight    model.layers.3.mlp.experts.gate_up_proj, with down_proj
    model.layers.3.mlp.experts.lora_A.weight               …experts.down_proj, or the only parameter adapted there

PEFT wraps the parameters of one module inside each other in the order in which the module holds them, gate_up_proj
first (`BaseTuner._inject_parameters`), and a key says only how deep its wrapper lies.  Everything is decided from
adapter_config.json and the file's header; weights are read by `AdapterDelta.load` and `Adapter.check_finite`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mla_tune.arch.roles import Role
from mla_tune.arch.site import Architecture, Site
from mla_tune.checkpoint.files import read_json_object
from mla_tune.checkpoint.index import TensorRef, nearest, read_shard
from mla_tune.checkpoint.shards import FLOATS, read_tensor
from mla_tune.errors import FileError, InputError
from mla_tune.mla.lora import scaling

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
#: Where a run folder keeps its adapter.
RUN_SUBFOLDER = "adapter"

#: Settings that may have any value: they don't change what A and B mean.
_FREE = frozenset(
    {
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout"),
        *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # read by init_lora_weights only
        *("megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
    }
)
#: Values of the others that leave a plain LoRA; whatever else is set is refused.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # pissa, corda, olora, loftq and lora_ga change the base weights before training: W + s·B·A is not the model.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
}
_UNSET = (None, False, [], {})

_KEY = re.compile(
    r"base_model\.model\.(?P<stem>.+)\.(?:(?P<part>lora_[AB])\.weight|(?P<m>lora_magnitude_vector)(\.weight)?)"
)


@dataclass(frozen=True, slots=True)
class Factors:
    """The tensors of one adapted site, as stored: A (E·r, in) and B (out, r·E) for `experts` E, the scale s on B·A, and
    DoRA's magnitude (out) or None."""

    A: torch.Tensor
    B: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None
    experts: int


@dataclass(frozen=True, slots=True)
class AdapterDelta:
    """The adapter of one site, by reference: shapes are checked, weights not read.

    `experts` is the number of experts in the factors: 1 for a single matrix, and more than the site's where the model
    holds unused weights for its identity experts (LongCat-Flash); the site's come first.
    """

    site: Site
    rank: int
    scale: float
    A: TensorRef
    B: TensorRef
    magnitude: TensorRef | None
    experts: int

    def refs(self) -> Iterator[TensorRef]:
        yield self.A
        yield self.B
        if self.magnitude is not None:
            yield self.magnitude

    def load(self) -> Factors:
        magnitude = None if self.magnitude is None else read_tensor(self.magnitude)
        return Factors(read_tensor(self.A), read_tensor(self.B), self.scale, magnitude, self.experts)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter on an architecture: `deltas` in the order of the architecture's sites, one for each adapted site."""

    folder: Path
    settings: dict[str, Any]
    deltas: tuple[AdapterDelta, ...]

    @property
    def method(self) -> str:
        """What the adapter is, in the words of the recipe."""
        scale = "rslora" if self.settings.get("use_rslora") else "lora"
        if self.settings.get("use_dora"):
            return "dora" if scale == "lora" else "dora with rslora's scale"
        return scale

    def check_finite(self) -> None:
        """Read every tensor once.  Raises `InputError` naming the first with a NaN or an infinity."""
        for item in self.deltas:
            for ref in item.refs():
                if not bool(read_tensor(ref).isfinite().all()):
                    raise InputError(
                        f"{ref.file}: '{ref.key}' holds NaN or infinity: the training diverged or the file is damaged. "
                        "Take an earlier checkpoint of the run"
                    )


def adapter_folder(path: Path) -> Path:
    """The folder with adapter_config.json: `path` itself or, for a run folder, `path/adapter`."""
    for folder in (path, path / RUN_SUBFOLDER):
        if (folder / CONFIG_FILE).is_file():
            return folder
    what = f"holds neither {CONFIG_FILE} nor {RUN_SUBFOLDER}/{CONFIG_FILE}" if path.is_dir() else "no such folder"
    raise FileError(f"{path}: {what}: give a PEFT adapter folder or a run folder of mla-tune train")


def read_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json of `folder`.

    Raises `FileError` for a file that can't be read and `InputError` for settings that make the adapter anything but
    LoRA, rsLoRA or DoRA.
    """
    file = folder / CONFIG_FILE
    settings = read_json_object(file, "the adapter's configuration")
    problems = []
    for name, value in settings.items():
        allowed = _PLAIN.get(name, _UNSET)
        if name not in _FREE and not any(value == a and type(value) is type(a) for a in allowed):
            problems.append(f"{name}: {value!r}")
    if settings.get("peft_type") is None:
        problems.append("no peft_type")
    if problems:
        raise InputError(
            f"{file}: not supported: {'; '.join(problems)}. Supported are plain LoRA, rsLoRA and DoRA as PEFT 0.21 "
            "writes them, with rank_pattern, alpha_pattern and target_parameters"
        )
    return settings


def open_adapter(folder: Path, arch: Architecture) -> Adapter:
    """Map every tensor of the adapter to a site of `arch`, from headers alone.

    Raises `FileError` for files that are missing or damaged, `InputError` for settings that are not supported, a key
    that fits no site, a site with a part missing, and shapes that differ from the site's.
    """
    settings = read_settings(folder)
    names = _Names(folder / CONFIG_FILE, settings)
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        others = sorted(p.name for p in folder.glob("adapter_model*"))
        has = f" ({others[0]} is not read: load the adapter with PEFT and save it again)" if others else ""
        raise FileError(f"{file}: no such file{has}")
    stems = _stems(arch, names)
    parts: dict[str, dict[str, TensorRef]] = {}
    for key, ref in read_shard(file).tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or match["stem"] not in stems:
            raise InputError(f"{file}: '{key}' fits no weight of the base model{_hint(key, stems)}")
        part = match["part"] or match["m"]
        if part in parts.setdefault(match["stem"], {}):
            raise InputError(f"{file}: '{key}' is there twice, with and without '.weight'")
        parts[match["stem"]][part] = ref
    if not parts:
        raise InputError(f"{file}: the adapter holds no tensor")
    deltas = {stems[stem].path: _delta(file, stem, stems[stem], found, names, arch) for stem, found in parts.items()}
    return Adapter(folder, settings, tuple(deltas[s.path] for s in arch.sites if s.path in deltas))


class _Names:
    """What adapter_config.json says about one name: targeted as a parameter or not, its rank, its alpha."""

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self.file, self.settings = file, settings
        self.parameters = [str(t) for t in settings.get("target_parameters") or []]

    def is_parameter(self, parameter: str) -> bool:
        """As `BaseTuner._inject_parameters` matches `target_parameters`."""
        return any(parameter == t or parameter.endswith(f".{t}") for t in self.parameters)

    def number(self, default: str, pattern: str, name: str) -> float:
        """`r` or `lora_alpha` of one name: the first pattern that matches it at its end, else the default
        (`peft.utils.other.get_pattern_key`)."""
        patterns = self.settings.get(pattern) or {}
        value = self.settings.get(default)
        for key, special in patterns.items():
            try:
                if re.match(rf"(.*\.)?({key})$", name):
                    value = special
                    break
            except re.error as error:
                raise InputError(f"{self.file}: {pattern}: '{key}' is not a regular expression: {error}") from error
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise InputError(f"{self.file}: {default} of {name} is {value!r}: a positive number was expected")
        return value


def _stems(arch: Architecture, names: _Names) -> dict[str, Site]:
    """Key stem (the module path that PEFT puts into a key) → site."""
    stems = {s.path: s for s in arch.sites if not s.is_experts}
    for up in arch.by_role(Role.EXPERTS_GATE_UP):
        container = up.path.rpartition(".")[0]
        downs = [s for s in arch.by_role(Role.EXPERTS_DOWN) if s.path.rpartition(".")[0] == container]
        adapted = [s for s in (up, *downs) if names.is_parameter(s.parameter)]
        for depth, site in enumerate(reversed(adapted)):
            stems[container + ".base_layer" * depth] = site
    return stems


def _delta(
    file: Path, stem: str, site: Site, found: dict[str, TensorRef], names: _Names, arch: Architecture
) -> AdapterDelta:
    needed = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if names.settings.get("use_dora") else set())
    if found.keys() != needed:
        extra, missing = sorted(found.keys() - needed), sorted(needed - found.keys())
        what = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(extra)}, but use_dora is not set"
        raise InputError(f"{file}: the adapter of '{stem}' {what}: the adapter is not complete")
    # PEFT matches patterns against the parameter's name where a parameter was targeted, else the module's.
    name = site.parameter if names.is_parameter(site.parameter) else site.path
    rank = int(names.number("r", "rank_pattern", name))
    alpha = names.number("lora_alpha", "alpha_pattern", name)
    rows = found["lora_A"].shape[0] if found["lora_A"].shape else 0
    experts = _experts(site, arch, rows // rank)
    out, inner = site.shape
    expected = {
        "lora_A": (experts * rank, inner),
        "lora_B": (out, rank * experts),
        "lora_magnitude_vector": (out,),
    }
    for part, ref in found.items():
        if ref.dtype not in FLOATS:
            raise InputError(f"{file}: '{ref.key}' is {ref.dtype}; an adapter in {', '.join(FLOATS)} was expected")
        if ref.shape != expected[part]:
            of_experts = f" in each of {site.count} experts" if site.is_experts else ""
            raise InputError(
                f"{file}: '{ref.key}' is {ref.shape}, but {expected[part]} was expected: {site.path} of the base model "
                f"is {site.shape}{of_experts}, and {CONFIG_FILE} gives it the rank {rank}. "
                "Was the adapter trained on another base model?"
            )
    return AdapterDelta(
        site=site,
        rank=rank,
        scale=scaling(alpha, rank, bool(names.settings.get("use_rslora"))),
        A=found["lora_A"],
        B=found["lora_B"],
        magnitude=found.get("lora_magnitude_vector"),
        experts=experts,
    )


def _experts(site: Site, arch: Architecture, held: int) -> int:
    """Experts in the factors of a site: its own, or as many as the router knows, if that is what the file holds.

    transformers gives LongCat-Flash's gate_up_proj rows for the identity experts too, which nothing reads.
    """
    if not site.is_experts:
        return 1
    outputs = [router.shape[0] for router in arch.by_role(Role.ROUTER) if router.layer == site.layer]
    return held if held in outputs else site.count


def _hint(key: str, stems: Iterable[str]) -> str:
    if re.search(r"\.experts\.\d+\.", key):
        return (
            ": it is the adapter of a single expert, as PEFT wrote them before transformers 5. "
            "Load the adapter with PEFT 0.21 and save it again"
        )
    if re.search(r"\.experts\.(base_layer\.)?lora_", key):
        return f": target_parameters in {CONFIG_FILE} does not say which of the experts' weights it adapts"
    if "lora_embedding" in key:
        return ": adapters on the embedding are not supported"
    if ".lora_" not in key:
        return (
            ": it is a whole weight saved beside the LoRA. Save the adapter again, with save_embedding_layers=False "
            "where PEFT added the embedding or the output head by itself"
        )
    return nearest(key, [f"base_model.model.{stem}{key[key.rfind('.lora_') :]}" for stem in stems])
