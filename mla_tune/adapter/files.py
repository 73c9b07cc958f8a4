"""Open a PEFT adapter folder: which low-rank update belongs to which site, which tensors replace tensors of the base.

Everything is decided from adapter_config.json (`adapter.settings`) and from the keys and shapes in the header of the
weights file (`adapter.keys`).  The weights themselves are not read.
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

#: Name of the weights file in an adapter folder.
WEIGHTS_FILE = "adapter_model.safetensors"
#: Name of the adapter's folder in a run folder.
ADAPTER_SUBFOLDER = "adapter"
#: Last parts of the names of parameters and persistent buffers of the supported models.  Tensors on disk with other
#: endings (scales of FP8) are not in the model, so no adapter can hold them.
_PARAMETER_ENDINGS = ("weight", "bias", "e_score_correction_bias")


def adapter_folder(path: Path) -> Path:
    """Return the folder with adapter_config.json: `path` itself or, for a run folder, `path/adapter`.

    Raises `FileError` if neither has one.
    """
    for folder in (path, path / ADAPTER_SUBFOLDER):
        if (folder / CONFIG_FILE).is_file():
            return folder
    found = f"holds neither {CONFIG_FILE} nor {ADAPTER_SUBFOLDER}/{CONFIG_FILE}" if path.is_dir() else "no such folder"
    raise FileError(f"{path}: {found}: give a PEFT adapter folder or a run folder of mla-tune train")


def open_adapter(folder: Path, arch: Architecture, base_keys: Mapping[str, TensorRef], mtp: bool = False) -> Adapter:
    """Map every tensor of the adapter to a site of `arch` or to a tensor of the base, from headers alone.

    `base_keys` are the base's tensors by key (`Checkpoint.tensors`); `mtp`: the adapter may be on MTP layers.

    Raises `FileError` for files that are missing or damaged.  Raises `InputError` for: settings that are not supported;
    pickles; a key that fits nothing in the base; a site of which a part is missing; trained tensors that the settings
    name and the file lacks; a shape that does not fit the base.
    """
    settings = read_settings(folder)
    names = AdapterSettings(folder / CONFIG_FILE, settings)
    file = _weights_file(folder)
    tensors = read_shard(file).tensors
    keys = AdapterKeys(arch, names, mtp)
    by_stem, without_lora = _group_by_stem(file, tensors, keys)
    deltas = [_build_delta(file, stem, target, parts, names, arch) for stem, (target, parts) in by_stem.items()]
    order = {site.path: i for i, site in enumerate(arch.stored_sites)}
    deltas.sort(key=lambda d: (order[d.site.path], -1 if d.expert is None else d.expert, d.rows or (0, 0)))
    _check_deltas(file, deltas, base_keys)
    duplicates = _duplicate_bias_keys(settings, tensors)
    saved = tuple(
        SavedTensor(keys.replaced_key(str(file), ref, by_stem, base_keys), ref)
        for ref in without_lora
        if ref.key not in duplicates
    )
    adapter = Adapter(folder, settings, tuple(deltas), saved)
    _check_complete(file, adapter, arch, base_keys)
    return adapter


def _weights_file(folder: Path) -> Path:
    """Return the path of the weights file.  Raises `InputError` for a pickle and `FileError` if there is no file."""
    file = folder / WEIGHTS_FILE
    if file.is_file():
        return file
    pickles = sorted(p for p in folder.glob("adapter_model*") if p.suffix in PICKLES)
    if pickles:
        raise InputError(
            f"{pickles[0]}: a pickle can run any code when it is read, so it is not opened. Turn it into safetensors "
            f"with\n  {convert_command(pickles[0], file)}"
        )
    raise FileError(f"{file}: no such file: the adapter's weights are missing")


def _group_by_stem(
    file: Path, tensors: Mapping[str, TensorRef], keys: AdapterKeys
) -> tuple[dict[str, tuple[KeyTarget, dict[str, TensorRef]]], list[TensorRef]]:
    """Return (stem → its target and its tensors by part, all tensors without `lora_` in the key).

    Raises `InputError` for an empty file, a tensor that is not of floats, and a part that is there twice.
    """
    by_stem: dict[str, tuple[KeyTarget, dict[str, TensorRef]]] = {}
    without_lora: list[TensorRef] = []
    for key, ref in tensors.items():
        if ref.dtype not in FLOATS:
            raise InputError(f"{file}: '{key}' is {ref.dtype}; an adapter in {', '.join(FLOATS)} was expected")
        if ".lora_" not in key:
            without_lora.append(ref)
            continue
        stem, part, target = keys.parse_lora_key(str(file), key)
        _, parts = by_stem.setdefault(stem, (target, {}))
        if part in parts:
            raise InputError(f"{file}: '{key}' is there twice, with and without '.weight'")
        parts[part] = ref
    if not tensors:
        raise InputError(f"{file}: the adapter holds no tensor")
    return by_stem, without_lora


def _build_delta(
    file: Path, stem: str, target: KeyTarget, parts: dict[str, TensorRef], names: AdapterSettings, arch: Architecture
) -> LoraDelta:
    """Return the update that the tensors `parts` of one stem are.  Raises `InputError` for wrong parts and shapes."""
    site, method = target.site, method_of(names.settings)
    _check_parts(file, stem, parts, names)
    if not method.on_experts and site.is_experts and target.expert is None:
        key = parts[method.vectors[0] if method.vectors else "lora_A.weight"].key
        raise InputError(f"{file}: '{key}': PEFT has no {method.title} on fused experts")
    rank, scale = names.rank_and_scale(target.name)
    rows = parts["lora_A.weight"].shape[0] if parts["lora_A.weight"].shape else 0
    experts = 1 if target.expert is not None else _expert_count(site, arch, rows // rank)
    out, inner = target.shape
    expected = {
        "lora_A.weight": (experts * rank, inner),
        "lora_B.weight": (out, rank * experts),
        "lora_B.bias": (out,),
        **dict.fromkeys(method.vectors, (out,)),
    }
    for part, ref in parts.items():
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
        A=parts["lora_A.weight"],
        B=parts["lora_B.weight"],
        method=method,
        vectors=tuple(parts[name] for name in method.vectors),
        experts=experts,
        expert=target.expert,
        rows=target.rows,
        bias=parts.get("lora_B.bias"),
    )


def _check_parts(file: Path, stem: str, parts: Mapping[str, TensorRef], names: AdapterSettings) -> None:
    """Raise `InputError` if parts are missing, or if there are parts of a setting that is not on."""
    setting_of = {"lora_B.bias": "lora_bias"}
    for method in ADAPTER_METHODS.values():
        setting_of |= dict.fromkeys(method.vectors, " and ".join(method.switches))
    lora_bias = ["lora_B.bias"] if names.settings.get("lora_bias") else []
    needed = {*method_of(names.settings).vectors, *lora_bias}
    if missing := sorted({"lora_A.weight", "lora_B.weight", *needed} - parts.keys()):
        raise InputError(f"{file}: the adapter of '{stem}' lacks {', '.join(missing)}: the adapter is not complete")
    for part, setting in setting_of.items():
        if part in parts and part not in needed:
            raise InputError(
                f"{file}: the adapter of '{stem}' has {part}, but {setting} is not set: {CONFIG_FILE} and the weights "
                "are from different adapters"
            )


def _expert_count(site: Site, arch: Architecture, in_file: int) -> int:
    """Return the number of experts in the factors of a site, 1 for a single matrix.

    It is `in_file` if that is the number of the router's outputs: transformers gives LongCat-Flash's gate_up_proj
    weights for its identity experts too, which nothing reads.  Otherwise it is the site's own number of experts.
    """
    if not site.is_experts:
        return 1
    routers = (s for s in arch.stored_sites if s.role == Role.ROUTER and s.layer == site.layer)
    router_outputs = [router.shape[0] for router in routers]
    return in_file if in_file in router_outputs else site.count


def _check_deltas(file: Path, deltas: list[LoraDelta], base_keys: Mapping[str, TensorRef]) -> None:
    """Raise `InputError` for two updates of one site that contradict each other, and for a bias that has no base.

    `deltas` are in the order of the sites.
    """
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


def _duplicate_bias_keys(settings: dict[str, Any], tensors: Mapping[str, TensorRef]) -> set[str]:
    """Return the keys of two needless copies that PEFT writes beside a trained bias.

    With `bias: all` and a module of modules_to_save that has a bias, it writes the base's own bias, and the trained one
    under a key that its loader ignores.
    """
    if settings.get("bias") != "all":
        return set()
    infixes = (".original_module.bias", ".modules_to_save.bias")
    return {k for k in tensors for i in infixes if k.endswith(i) and f"{k.removesuffix(i)}.bias" in tensors}


def _check_complete(file: Path, adapter: Adapter, arch: Architecture, base_keys: Mapping[str, TensorRef]) -> None:
    """Raise `InputError` if adapter_config.json names trained tensors that the file does not hold."""
    settings, held = adapter.settings, {s.key for s in adapter.saved}
    bias, modules = settings.get("bias", "none"), settings.get("modules_to_save") or []
    trained: list[str] = []
    if bias == "all":
        trained = [key for key in base_keys if key.endswith(".bias")]
    elif bias == "lora_only":
        trained = [key for d in adapter.deltas if (key := d.site.disk_key("bias")) in base_keys]
    if missing := [key for key in trained if key not in held and in_model(key, arch)]:
        # Older versions of PEFT looked for q_a_proj.bias with `lora_only`, but it is called q_a_proj.base_layer.bias.
        raise InputError(
            f"{file}: {CONFIG_FILE} says bias: {bias!r}, but the trained '{missing[0]}' is not in the file"
            f"{_and_others(missing)}; older versions of PEFT lost them when saving. Take them from a full checkpoint "
            f'of the training, or, to merge with the biases of the base, set "bias": "none" in {CONFIG_FILE}'
        )
    head = [arch.head_key] if arch.tied else []
    # PEFT takes every module whose path ends with these letters, also within a name: `norm` means all norms.
    missing = [
        key
        for key in dict.fromkeys([*base_keys, *head] if modules else [])
        if any(f"{name}." in key for name in modules)
        and key not in held
        and key.rpartition(".")[2] in _PARAMETER_ENDINGS
        and in_model(key, arch)
        and not is_expert_key(key)
    ]
    if missing:
        raise InputError(
            f"{file}: {CONFIG_FILE} says modules_to_save: {', '.join(modules)}, but the trained '{missing[0]}' is not "
            f"in the file{_and_others(missing)}: the adapter is not complete. Save it again with "
            "PeftModel.save_pretrained"
        )


def _and_others(keys: list[str]) -> str:
    return f", nor are {len(keys) - 1:,} others" if len(keys) > 1 else ""
