"""An adapter in the names of NeMo, Megatron-Bridge or Automodel → a PEFT adapter for transformers' model.

Factors are moved, cut and stacked, never multiplied: ΔW = alpha/r · B A is the same before and after.

    linear_fc1      A (r, D), B (2I, r)     →   gate_proj (A, B[:I])  and  up_proj (A, B[I:])
    routed experts  one adapter an expert   →   A (E·r, in), B (out, r·E), rank-major, as PEFT has fused experts; an
                                                expert without one gets zeros
                    one for all experts     →   the same factors for each
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mla_tune.adapter.files import WEIGHTS_FILE, open_adapter
from mla_tune.adapter.keys import PREFIX, AdapterKeys
from mla_tune.adapter.megatron import MegatronFactor
from mla_tune.adapter.megatron import MegatronNames as Megatron
from mla_tune.adapter.peft_config import peft_config
from mla_tune.adapter.placement import Placement, PlannedSite
from mla_tune.adapter.settings import CONFIG_FILE, AdapterSettings
from mla_tune.arch.site import Architecture, Site
from mla_tune.checkpoint.index import TensorRef
from mla_tune.checkpoint.pickles import PICKLES, convert_folder_command
from mla_tune.errors import FileError, InputError
from mla_tune.user_files import read_json_object

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Imported:
    """What was written: `sites` by role, the rank of most, alpha, and keys that were left out."""

    out: str
    roles: dict[str, int]
    rank: int
    alpha: float
    tensors: int
    ignored: int


def import_adapter(
    source: Path, arch: Architecture, base: dict[str, TensorRef], base_name: str, out: Path, alpha: float | None
) -> Imported:
    """Read the adapter in `source` (a folder or a safetensors file) and write it to `out` for PEFT.

    `base` are the base's tensors by key, `base_name` what adapter_config.json will say the base is.  `alpha` is needed
    where the source's adapter_config.json does not give it.  Raises `FileError` and `InputError` for what can't be
    read, a key that means nothing here, factors that are missing or don't fit the base, and an `out` that is taken.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileError(f"{out}: is there already: name another folder with --out")
    tensors, alpha = _read(source), _alpha(source, alpha)
    factors, ignored = _sorted(source, tensors, arch)
    sites = {site.path: site for site, _ in factors}
    found = {path: _site_factors(source, site, factors, tensors) for path, site in sites.items()}
    ranks = {path: _rank(sites[path], A) for path, (A, _) in found.items()}
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    order = [site for site in arch.stored_sites if site.path in sites]
    planned = tuple(PlannedSite(site, ranks[site.path], alpha, 1.0) for site in order)
    config = peft_config(arch, Placement("lora", 0.0, rank, alpha, planned))
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    settings = {"target_parameters": list(config.target_parameters or ())}
    stems = {
        place.site.path: stem
        for stem, place in reversed(
            AdapterKeys(arch, AdapterSettings(out / CONFIG_FILE, settings), mtp=True).stems.items()
        )
    }
    state: dict[str, torch.Tensor] = {}
    for path, (A, B) in found.items():
        state |= {f"{PREFIX}{stems[path]}.lora_A.weight": A, f"{PREFIX}{stems[path]}.lora_B.weight": B}
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(out))
    save_file(
        {k: t.clone(memory_format=torch.contiguous_format) for k, t in state.items()},
        out / WEIGHTS_FILE,
        {"format": "pt"},
    )
    open_adapter(out, arch, base, mtp=True).check_finite()  # every key and shape against the base's headers
    roles: dict[str, int] = {}
    for site in order:
        roles[site.role.value] = roles.get(site.role.value, 0) + 1
    return Imported(str(out), roles, rank, alpha, len(tensors) - ignored, ignored)


def _read(source: Path) -> dict[str, torch.Tensor]:
    if source.is_file() and source.suffix == ".safetensors":
        return load_file(source)
    if not source.is_dir():
        raise FileError(f"{source}: no such folder or safetensors file")
    files = sorted(source.glob("*.safetensors"))
    if not files:
        if any(p.suffix in PICKLES for p in source.iterdir()):
            raise InputError(
                f"{source}: holds pickles, which can run any code when they are read. Turn them into safetensors with\n"
                f"  {convert_folder_command(source)}"
            )
        if any(p.suffix == ".distcp" for p in source.rglob("*.distcp")):
            raise InputError(
                f"{source}: a distributed checkpoint of Megatron (*.distcp): export its adapter weights to safetensors "
                "with Megatron-Bridge first, in its own names or in Hugging Face's"
            )
        raise FileError(f"{source}: holds no safetensors file")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors |= load_file(file)
    return tensors


def _alpha(source: Path, given: float | None) -> float:
    """`lora_alpha` (PEFT's name) or `alpha` (NeMo's) of the source's adapter_config.json, or what was given."""
    folder = source if source.is_dir() else source.parent
    if given is not None:
        return given
    if (folder / CONFIG_FILE).is_file():
        settings = read_json_object(folder / CONFIG_FILE, "the adapter's configuration")
        if settings.get("use_dora") or settings.get("use_rslora"):
            raise InputError(f"{folder / CONFIG_FILE}: DoRA and rsLoRA of these tools are not imported")
        for name in ("lora_alpha", "alpha"):
            if isinstance(settings.get(name), int | float):
                return float(settings[name])
    raise InputError(f"{source}: says nowhere what alpha is: give it with --alpha (ΔW = alpha/r · B A)")


def _sorted(
    source: Path, tensors: dict[str, torch.Tensor], arch: Architecture
) -> tuple[list[tuple[Site, MegatronFactor]], int]:
    """Each factor with each of its sites, and how many keys were left out."""
    names, problems, factors, ignored = Megatron(arch), [], [], 0
    for key in tensors:
        what = names.source(key)
        if what is None:
            ignored += 1
        elif isinstance(what, str):
            problems.append(f"{key}: {what}")
        else:
            factors += [(site, what) for site in what.sites]
    if names.ambiguous and any(not s.is_experts for s, _ in factors):
        raise InputError(f"{source}: {arch.title} has two attentions a layer, which these names can't tell apart")
    if problems or not factors:
        more = [f"… and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        shown = "\n  ".join([*problems[:_SHOWN], *more]) or "it holds no adapter"
        raise InputError(f"{source}: can't be imported for {arch.title}:\n  {shown}")
    return factors, ignored


def _site_factors(
    source: Path, site: Site, factors: Iterable[tuple[Site, MegatronFactor]], tensors: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of one site in PEFT's layout."""
    mine = [f for s, f in factors if s.path == site.path]
    by_expert: dict[int | None, dict[bool, MegatronFactor]] = {}
    for factor in mine:
        pair = by_expert.setdefault(factor.expert, {})
        if factor.is_a in pair:
            raise InputError(f"{source}: '{factor.key}' and '{pair[factor.is_a].key}' are the same factor")
        pair[factor.is_a] = factor
    for pair in by_expert.values():
        if len(pair) < 2:
            (only,) = pair.values()
            raise InputError(f"{source}: '{only.key}' stands alone: its other factor is missing")
    if None in by_expert and len(by_expert) > 1:
        raise InputError(f"{source}: {site.path} has adapters of single experts and of all at once")
    pairs = {e: (tensors[p[True].key], _rows(site, p[False], tensors)) for e, p in by_expert.items()}
    for expert, (A, B) in pairs.items():
        _check(source, site, by_expert[expert], A, B)
    if not site.is_experts:
        return pairs[None]
    return _stacked(source, site, pairs)


def _rows(site: Site, factor: MegatronFactor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """B, or the half of it that is this site's: gate's rows come first."""
    B = tensors[factor.key]
    if len(factor.sites) == 1:
        return B
    index = [s.path for s in factor.sites].index(site.path)
    return B.chunk(2, dim=-2)[index]


def _check(source: Path, site: Site, pair: dict[bool, MegatronFactor], A: torch.Tensor, B: torch.Tensor) -> None:
    out, inner = site.shape
    stack = (site.count,) if A.dim() == 3 and site.is_experts else ()
    rank = A.shape[-2] if A.dim() > 1 else 0
    if A.shape != (*stack, rank, inner) or B.shape != (*stack, out, rank) or not rank:
        raise InputError(
            f"{source}: '{pair[True].key}' is {tuple(A.shape)} and '{pair[False].key}' gives {tuple(B.shape)}, but "
            f"{site.path} of the base is {site.shape}: (r, {inner}) and ({out}, r) are needed. A file of one "
            "tensor-parallel rank holds a part only: gather the adapter first"
        )


def _stacked(source: Path, site: Site, pairs: dict[Any, tuple[torch.Tensor, torch.Tensor]]) -> tuple[Any, Any]:
    """A (E·r, in) and B (out, r·E), rank-major, of all experts."""
    E = site.count
    if None in pairs:
        A, B = pairs[None]
        every = [(A[e], B[e]) if A.dim() == 3 else (A, B) for e in range(E)]
    else:
        beyond = [e for e in pairs if e >= E]
        if beyond:
            raise InputError(f"{source}: expert {beyond[0]} of {site.path}: the base has {E}")
        ranks = {A.shape[0] for A, _ in pairs.values()}
        if len(ranks) > 1:
            raise InputError(f"{source}: experts of {site.path} have different ranks {sorted(ranks)}: not imported")
        one, other = next(iter(pairs.values()))
        every = [pairs.get(e, (torch.zeros_like(one), torch.zeros_like(other))) for e in range(E)]
    A = torch.cat([a for a, _ in every])
    B = torch.stack([b for _, b in every], dim=-1)  # (out, r, E)
    return A, B.flatten(1)


def _rank(site: Site, A: torch.Tensor) -> int:
    return A.shape[0] // site.count if site.is_experts else A.shape[0]
