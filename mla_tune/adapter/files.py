"""A PEFT adapter folder → which low-rank factors sit on which site, and which whole tensors replace the base's.

Everything is decided from adapter_config.json (`adapter.settings`) and the keys and shapes in the file's header
(`adapter.keys`); weights are read by `Adapter.check_finite` only.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from mla_tune.adapter.deltas import Adapter, LoraDelta, SavedTensor
from mla_tune.adapter.keys import AdapterKeys, KeyTarget, in_model, is_expert_key
from mla_tune.adapter.methods import method_of
from mla_tune.adapter.settings import CONFIG_FILE, AdapterSettings, read_settings
from mla_tune.arch.roles import Role
from mla_tune.arch.site import Architecture, Site
from mla_tune.checkpoint.dtypes import FLOATS
from mla_tune.checkpoint.index import TensorRef, read_shard
from mla_tune.checkpoint.pickles import PICKLES, convert_command
from mla_tune.errors import FileError, InputError
from mla_tune.sockets import ADAPTER_METHODS

WEIGHTS_FILE = "adapter_model.safetensors"
#: Where a run folder keeps its adapter.
ADAPTER_SUBFOLDER = "adapter"
#: Parameters and persistent buffers of the modules of these models; other endings on disk (FP8 scales) are none.
_LEAVES = ("weight", "bias", "e_score_correction_bias")


def adapter_folder(path: Path) -> Path:
    """The folder with adapter_config.json: `path` itself or, for a run folder, `path/adapter`."""
    for folder in (path, path / ADAPTER_SUBFOLDER):
        if (folder / CONFIG_FILE).is_file():
            return folder
    what = f"holds neither {CONFIG_FILE} nor {ADAPTER_SUBFOLDER}/{CONFIG_FILE}" if path.is_dir() else "no such folder"
    raise FileError(f"{path}: {what}: give a PEFT adapter folder or a run folder of mla-tune train")


def open_adapter(folder: Path, arch: Architecture, base_keys: Mapping[str, TensorRef], mtp: bool = False) -> Adapter:
    """Map every tensor of the adapter to a site of `arch` or to a tensor of the base, from headers alone.

    `base_keys` are the base's tensors by key (`Checkpoint.tensors`); `mtp`: sites of MTP layers are sites too.

    Raises `FileError` for files that are missing or damaged, `InputError` for settings that are not supported, pickles,
    a key that fits nothing in the base, a site with a part missing, trained tensors that the settings speak of and the
    file lacks, and shapes that differ from the base's.
    """
    settings = read_settings(folder)
    names = AdapterSettings(folder / CONFIG_FILE, settings)
    file = _weights_file(folder)
    keys = AdapterKeys(arch, names, mtp)
    parts: dict[str, tuple[KeyTarget, dict[str, TensorRef]]] = {}
    whole: list[TensorRef] = []
    tensors = read_shard(file).tensors
    for key, ref in tensors.items():
        if ref.dtype not in FLOATS:
            raise InputError(f"{file}: '{key}' is {ref.dtype}; an adapter in {', '.join(FLOATS)} was expected")
        if ".lora_" not in key:
            whole.append(ref)
            continue
        stem, part, place = keys.factor(str(file), key)
        _, found = parts.setdefault(stem, (place, {}))
        if part in found:
            raise InputError(f"{file}: '{key}' is there twice, with and without '.weight'")
        found[part] = ref
    if not tensors:
        raise InputError(f"{file}: the adapter holds no tensor")
    deltas = [_delta(file, stem, place, found, names, arch) for stem, (place, found) in parts.items()]
    order = {site.path: i for i, site in enumerate(arch.stored_sites)}
    deltas.sort(key=lambda d: (order[d.site.path], -1 if d.expert is None else d.expert, d.rows or (0, 0)))
    for one, other in pairwise(deltas):
        if one.site == other.site and one.expert is None:
            raise InputError(
                f"{file}: '{other.A.key}' and '{one.A.key}' both adapt {one.site.path}: adapters of single experts and "
                "of all at once can't be together"
            )
    for delta in deltas:
        if delta.bias is not None and delta.site.disk_key("bias") not in base_keys:
            raise InputError(
                f"{file}: '{delta.bias.key}' (lora_bias) needs the bias of {delta.site.path}, and the base model has "
                "none: such an adapter can't be merged into it. Train without lora_bias, or keep the adapter unmerged"
            )
    copies = _copies(settings, tensors)
    saved = tuple(
        SavedTensor(keys.saved(str(file), ref, parts, base_keys), ref) for ref in whole if ref.key not in copies
    )
    adapter = Adapter(folder, settings, tuple(deltas), saved)
    _check_complete(file, adapter, arch, base_keys)
    return adapter


def _weights_file(folder: Path) -> Path:
    file = folder / WEIGHTS_FILE
    if file.is_file():
        return file
    others = sorted(p for p in folder.glob("adapter_model*") if p.suffix in PICKLES)
    if others:
        raise InputError(
            f"{others[0]}: a pickle can run any code when it is read, so it is not opened. Turn it into safetensors "
            f"with\n  {convert_command(others[0], file)}"
        )
    raise FileError(f"{file}: no such file: the adapter's weights are missing")


def _delta(
    file: Path, stem: str, place: KeyTarget, found: dict[str, TensorRef], names: AdapterSettings, arch: Architecture
) -> LoraDelta:
    site, method = place.site, method_of(names.settings)
    optional = {"lora_B.bias": "lora_bias"}
    for other in ADAPTER_METHODS.values():
        optional |= dict.fromkeys(other.vectors, " and ".join(other.switches))
    wanted = {*method.vectors, *(["lora_B.bias"] if names.settings.get("lora_bias") else [])}
    if missing := sorted({"lora_A.weight", "lora_B.weight", *wanted} - found.keys()):
        raise InputError(f"{file}: the adapter of '{stem}' lacks {', '.join(missing)}: the adapter is not complete")
    for part, setting in optional.items():
        if part in found and part not in wanted:
            raise InputError(
                f"{file}: the adapter of '{stem}' has {part}, but {setting} is not set: {CONFIG_FILE} and the weights "
                "are of different adapters"
            )
    if not method.on_experts and site.is_experts and place.expert is None:
        key = found[method.vectors[0] if method.vectors else "lora_A.weight"].key
        raise InputError(f"{file}: '{key}': {method.title} on fused experts is not something PEFT has")
    rank, scale = names.rank_and_scale(place.name)
    rows = found["lora_A.weight"].shape[0] if found["lora_A.weight"].shape else 0
    experts = 1 if place.expert is not None else _experts(site, arch, rows // rank)
    out, inner = place.shape
    expected = {
        "lora_A.weight": (experts * rank, inner),
        "lora_B.weight": (out, rank * experts),
        "lora_B.bias": (out,),
        **dict.fromkeys(method.vectors, (out,)),
    }
    for part, ref in found.items():
        if ref.shape != expected[part]:
            of_experts = f" in each of {site.count} experts" if site.is_experts else ""
            raise InputError(
                f"{file}: '{ref.key}' is {ref.shape}, but {expected[part]} was expected: {site.path} of the base model "
                f"is {site.shape}{of_experts}, and {CONFIG_FILE} gives it the rank {rank}. "
                "Was the adapter trained on another base model?"
            )
    return LoraDelta(
        site=site,
        rank=rank,
        scale=scale,
        A=found["lora_A.weight"],
        B=found["lora_B.weight"],
        method=method,
        vectors=tuple(found[name] for name in method.vectors),
        experts=experts,
        expert=place.expert,
        rows=place.rows,
        bias=found.get("lora_B.bias"),
    )


def _experts(site: Site, arch: Architecture, held: int) -> int:
    """Experts in the factors of a site: its own, or as many as the router knows, if that is what the file holds.

    transformers gives LongCat-Flash's gate_up_proj rows for the identity experts too, which nothing reads.
    """
    if not site.is_experts:
        return 1
    routers = (s for s in arch.stored_sites if s.role == Role.ROUTER and s.layer == site.layer)
    outputs = [router.shape[0] for router in routers]
    return held if held in outputs else site.count


def _copies(settings: dict[str, Any], tensors: Mapping[str, TensorRef]) -> set[str]:
    """Keys of biases that PEFT writes twice more, beside the trained one, where `bias: all` meets a module of
    modules_to_save that has a bias: the base's own bias, and the trained one under a key that its loader ignores."""
    if settings.get("bias") != "all":
        return set()
    infixes = (".original_module.bias", ".modules_to_save.bias")
    return {k for k in tensors for i in infixes if k.endswith(i) and f"{k.removesuffix(i)}.bias" in tensors}


def _check_complete(file: Path, adapter: Adapter, arch: Architecture, base_keys: Mapping[str, TensorRef]) -> None:
    """Raise `InputError` where adapter_config.json speaks of trained tensors that the file does not hold."""
    settings, held = adapter.settings, {s.key for s in adapter.saved}
    bias, modules = settings.get("bias", "none"), settings.get("modules_to_save") or []
    trained: list[str] = []
    if bias == "all":
        trained = [key for key in base_keys if key.endswith(".bias")]
    elif bias == "lora_only":
        trained = [key for d in adapter.deltas if (key := d.site.disk_key("bias")) in base_keys]
    if lost := [key for key in trained if key not in held and in_model(key, arch)]:
        # Older versions of PEFT looked for q_a_proj.bias with `lora_only`, and it lies in q_a_proj.base_layer.bias.
        raise InputError(
            f"{file}: {CONFIG_FILE} says bias: {bias!r}, but the trained '{lost[0]}' is not in the file"
            f"{_more(lost)}; older versions of PEFT lost them when saving. Take them from a full checkpoint of the "
            f'training, or, to merge with the biases of the base, set "bias": "none" in {CONFIG_FILE}'
        )
    head = [arch.head_key] if arch.tied else []
    # PEFT takes every module whose path ends in the name, at no border between names: `norm` means all norms.
    lost = [
        key
        for key in dict.fromkeys([*base_keys, *head] if modules else [])
        if any(f"{name}." in key for name in modules)
        and key not in held
        and key.rpartition(".")[2] in _LEAVES
        and in_model(key, arch)
        and not is_expert_key(key)
    ]
    if lost:
        raise InputError(
            f"{file}: {CONFIG_FILE} says modules_to_save: {', '.join(modules)}, but the trained '{lost[0]}' is not in "
            f"the file{_more(lost)}: the adapter is not complete. Save it again with PeftModel.save_pretrained"
        )


def _more(keys: list[str]) -> str:
    return f", nor are {len(keys) - 1:,} others" if len(keys) > 1 else ""
