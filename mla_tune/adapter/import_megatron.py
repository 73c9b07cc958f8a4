"""Import an adapter of NVIDIA's NeMo, Megatron-Bridge or Automodel as a PEFT adapter for transformers' model.

Factors are renamed, cut and stacked, but their numbers don't change: ΔW = alpha/r · B A is the same before and after.

    linear_fc1      A (r, D), B (2I, r)     →   gate_proj (A, B[:I])  and  up_proj (A, B[I:])
    routed experts  an adapter for each     →   A (E·r, in), B (out, r·E), rank-major, as PEFT stores fused experts;
                                                an expert without an adapter gets zeros
                    one for all experts     →   the same factors for each expert
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
from mla_tune.adapter.megatron import MegatronFactor, MegatronNames
from mla_tune.adapter.peft_config import peft_config
from mla_tune.adapter.placement import Placement, PlannedSite
from mla_tune.adapter.settings import CONFIG_FILE, AdapterSettings
from mla_tune.arch.site import Architecture, Site
from mla_tune.checkpoint.index import TensorRef
from mla_tune.checkpoint.pickles import PICKLES, convert_folder_command
from mla_tune.errors import FileError, InputError
from mla_tune.user_files import read_json_object

#: How many keys with a problem an error shows.
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class ImportedAdapter:
    """What `import_adapter` wrote."""

    out: str
    """The folder."""
    roles: dict[str, int]
    """Number of adapted matrices (or stacks of experts) by role."""
    rank: int
    """The most frequent rank."""
    alpha: float
    """LoRA's alpha."""
    tensors: int
    """Number of tensors of the source that were used."""
    ignored: int
    """Number of tensors of the source that hold nothing of an adapter."""


def import_adapter(
    source: Path, arch: Architecture, base: dict[str, TensorRef], base_name: str, out: Path, alpha: float | None
) -> ImportedAdapter:
    """Read the adapter in `source` (a folder or a safetensors file) and write it to the folder `out` for PEFT.

    `base` are the base's tensors by key, `base_name` is what adapter_config.json will name as the base.  `alpha` is
    needed if the source's adapter_config.json does not give it.

    Raises `FileError` for files that can't be read and an `out` that is not empty.  Raises `InputError` for a key that
    is not one of an adapter on this architecture, and for factors that are missing or don't fit the base.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileError(f"{out}: exists already: name a new or empty folder with --out")
    tensors, alpha = _read_tensors(source), _alpha(source, alpha)
    factors, ignored = _match_factors(source, tensors, arch)
    sites = {site.path: site for site, _ in factors}
    found = {path: _site_factors(source, site, factors, tensors) for path, site in sites.items()}
    ranks = {path: _rank(sites[path], A) for path, (A, _) in found.items()}
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    order = [site for site in arch.stored_sites if site.path in sites]
    planned = tuple(PlannedSite(site, ranks[site.path], alpha, 1.0) for site in order)
    config = peft_config(arch, Placement("lora", 0.0, rank, alpha, planned))
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    stems = _stems(
        arch, AdapterSettings(out / CONFIG_FILE, {"target_parameters": list(config.target_parameters or ())})
    )
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
    open_adapter(out, arch, base, mtp=True).check_finite()  # checks every key and shape against the base's headers
    roles: dict[str, int] = {}
    for site in order:
        roles[site.role.value] = roles.get(site.role.value, 0) + 1
    return ImportedAdapter(str(out), roles, rank, alpha, len(tensors) - ignored, ignored)


def _stems(arch: Architecture, settings: AdapterSettings) -> dict[str, str]:
    """Return, by the path of each site, the stem under which PEFT writes its factors with these settings."""
    # Several stems may mean one site; the first is PEFT's own, so it is assigned last.
    return {target.site.path: stem for stem, target in reversed(AdapterKeys(arch, settings, mtp=True).stems.items())}


def _read_tensors(source: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of the source.  Raises `FileError`, and `InputError` for pickles and distributed checkpoints."""
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
    """Return `given`, or else `lora_alpha` (PEFT's name) or `alpha` (NeMo's) of the source's adapter_config.json.

    Raises `InputError` if there is none, and if the adapter is one of DoRA or rsLoRA.
    """
    folder = source if source.is_dir() else source.parent
    if given is not None:
        return given
    if (folder / CONFIG_FILE).is_file():
        settings = read_json_object(folder / CONFIG_FILE, "the adapter's configuration")
        if settings.get("use_dora") or settings.get("use_rslora"):
            raise InputError(f"{folder / CONFIG_FILE}: only LoRA can be imported, not DoRA or rsLoRA")
        for name in ("lora_alpha", "alpha"):
            if isinstance(settings.get(name), int | float):
                return float(settings[name])
    raise InputError(f"{source}: does not say what alpha is: give it with --alpha (ΔW = alpha/r · B A)")


def _match_factors(
    source: Path, tensors: dict[str, torch.Tensor], arch: Architecture
) -> tuple[list[tuple[Site, MegatronFactor]], int]:
    """Return (pairs of a site and a factor of it, number of keys that were ignored).

    Raises `InputError` for keys that are not those of an adapter, and for names that are ambiguous here.
    """
    names, problems, factors, ignored = MegatronNames(arch), [], [], 0
    for key in tensors:
        resolved = names.resolve(key)
        if resolved is None:
            ignored += 1
        elif isinstance(resolved, str):
            problems.append(f"{key}: {resolved}")
        else:
            factors += [(site, resolved) for site in resolved.sites]
    if names.is_ambiguous and any(not s.is_experts for s, _ in factors):
        raise InputError(
            f"{source}: {arch.title} has two attention modules in a layer, which the names can't tell apart"
        )
    if problems or not factors:
        more = [f"… and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        shown = "\n  ".join([*problems[:_SHOWN], *more]) or "it holds no adapter"
        raise InputError(f"{source}: can't be imported for {arch.title}:\n  {shown}")
    return factors, ignored


def _site_factors(
    source: Path, site: Site, factors: Iterable[tuple[Site, MegatronFactor]], tensors: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B of one site in PEFT's layout.  Raises `InputError` if factors are missing or don't fit."""
    by_expert: dict[int | None, dict[bool, MegatronFactor]] = {}  # expert → {is_a: factor}
    for factor in (f for s, f in factors if s.path == site.path):
        pair = by_expert.setdefault(factor.expert, {})
        if factor.is_a in pair:
            raise InputError(f"{source}: '{factor.key}' and '{pair[factor.is_a].key}' are the same factor")
        pair[factor.is_a] = factor
    for pair in by_expert.values():
        if len(pair) < 2:
            (only,) = pair.values()
            raise InputError(f"{source}: '{only.key}' is only one factor of a pair: the other one is missing")
    if None in by_expert and len(by_expert) > 1:
        raise InputError(f"{source}: {site.path} has adapters of single experts and of all at once")
    pairs = {e: (tensors[p[True].key], _rows_of_site(site, p[False], tensors)) for e, p in by_expert.items()}
    for expert, (A, B) in pairs.items():
        _check_shapes(source, site, by_expert[expert], A, B)
    if not site.is_experts:
        return pairs[None]
    return _stack_experts(source, site, pairs)


def _rows_of_site(site: Site, factor: MegatronFactor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return B, or the half of it that belongs to this site: gate's rows come first, then up's."""
    B = tensors[factor.key]
    if len(factor.sites) == 1:
        return B
    index = [s.path for s in factor.sites].index(site.path)
    return B.chunk(2, dim=-2)[index]


def _check_shapes(source: Path, site: Site, pair: dict[bool, MegatronFactor], A: torch.Tensor, B: torch.Tensor) -> None:
    """Raise `InputError` unless A is (r, in) and B (out, r) of this site, or a stack of them for its experts."""
    out, inner = site.shape
    stack = (site.count,) if A.dim() == 3 and site.is_experts else ()
    rank = A.shape[-2] if A.dim() > 1 else 0
    if A.shape != (*stack, rank, inner) or B.shape != (*stack, out, rank) or not rank:
        raise InputError(
            f"{source}: '{pair[True].key}' is {tuple(A.shape)} and '{pair[False].key}' gives {tuple(B.shape)}, but "
            f"{site.path} of the base is {site.shape}: (r, {inner}) and ({out}, r) are needed. A file of one "
            "tensor-parallel rank holds a part only: gather the adapter first"
        )


def _stack_experts(source: Path, site: Site, pairs: dict[Any, tuple[torch.Tensor, torch.Tensor]]) -> tuple[Any, Any]:
    """Return A (E·r, in) and B (out, r·E), rank-major, of all experts; zeros for those without an adapter.

    `pairs` holds A and B by expert, or under None the pair or stack of all.  Raises `InputError` for an expert that the
    base lacks and for experts with different ranks.
    """
    E = site.count
    if None in pairs:
        A, B = pairs[None]
        all_pairs = [(A[e], B[e]) if A.dim() == 3 else (A, B) for e in range(E)]
    else:
        beyond = [e for e in pairs if e >= E]
        if beyond:
            raise InputError(f"{source}: has expert {beyond[0]} of {site.path}; the base has experts 0 to {E - 1}")
        ranks = {A.shape[0] for A, _ in pairs.values()}
        if len(ranks) > 1:
            raise InputError(
                f"{source}: experts of {site.path} have different ranks {sorted(ranks)}, and PEFT has one rank for all "
                "experts of a layer: not imported"
            )
        A, B = next(iter(pairs.values()))
        zeros = torch.zeros_like(A), torch.zeros_like(B)
        all_pairs = [pairs.get(e, zeros) for e in range(E)]
    A = torch.cat([a for a, _ in all_pairs])
    B = torch.stack([b for _, b in all_pairs], dim=-1)  # (out, r, E)
    return A, B.flatten(1)


def _rank(site: Site, A: torch.Tensor) -> int:
    """Return the rank of a site's A, which is (r, in), or (E·r, in) for a stack of experts."""
    return A.shape[0] // site.count if site.is_experts else A.shape[0]
