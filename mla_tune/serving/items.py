"""Collect what an engine has to support in a checkpoint or an adapter, from configurations and headers.

An `Item` is one such thing: a role that the adapter adapts, a setting, a key of config.json, the layout of the files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mla_tune.adapter.deltas import Adapter, LoraDelta
from mla_tune.adapter.methods import method_of, scaling, title_of
from mla_tune.arch.roles import ADAPTABLE, Role
from mla_tune.arch.site import Architecture, Site
from mla_tune.checkpoint.index import SINGLE_FILE, Checkpoint
from mla_tune.checkpoint.quantized.config import (
    FUSED_LAYERS,
    ignored_modules,
    quantization_field,
    quantized_tensors,
)
from mla_tune.errors import InputError
from mla_tune.sockets import ADAPTER_METHODS

#: The role with which engines fuse a role into one layer, where an adapter may be on one of the two only.
PARTNERS = {
    Role.W_DQ: Role.W_DKV,
    Role.W_DKV: Role.W_DQ,
    Role.GATE: Role.UP,
    Role.UP: Role.GATE,
    Role.SHARED_GATE: Role.SHARED_UP,
    Role.SHARED_UP: Role.SHARED_GATE,
}
#: Files of which a tokenizer has at least one.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json")


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that an engine has to support.  A fact of engines.json is found by topic, subject and observations."""

    topic: str
    """One of `engines.TOPICS`; `about` of a fact."""
    subject: str
    """What is judged, within the topic: a role, a setting, a key; one of `of` of a fact."""
    seen: Mapping[str, Any] = field(default_factory=dict)
    """Observations on the subject: name → value, compared with `when` of a fact."""
    count: int = 0
    """The number of matrices; 0 for what is not about matrices."""
    detail: str = ""
    """What a reader should see of it beside the subject."""


def model_observations(arch: Architecture) -> dict[str, Any]:
    """Observations that hold for every item of a model, among them C+R, the numbers of a token in the MLA cache
    (`mla_head`), and P+R, the size of a query head (`qk_head`)."""
    d = arch.dims
    return {
        "family": arch.family.model_type,
        "model_type": arch.model_type,
        "layers": arch.num_layers,
        "query_compression": "no" if d.L is None else "yes",
        "mla_head": d.C + d.R,
        "qk_head": d.P + d.R,
    }


def checkpoint_items(checkpoint: Checkpoint, arch: Architecture) -> list[Item]:
    """What an engine has to support in a checkpoint."""
    config, tensors = checkpoint.config, checkpoint.tensors
    d = arch.dims
    names = config.get("architectures")
    items = [
        Item("model", "family", detail=arch.model_type),
        Item("config", "architectures", {"value": "named" if names else "missing"}, detail=", ".join(names or [])),
        Item("model", "attention", detail=f"C+R {d.C + d.R}, P+R {d.P + d.R}"),
    ]
    if any(key.endswith(".mlp.gate.e_score_correction_bias") for key in tensors):
        for name in ("topk_method", "scoring_func"):
            value = str(config.get(name) or "missing")
            items.append(Item("config", name, {"value": value}, detail=value))
    paths, on_disk = arch.attention_paths, arch.key_mapping.on_disk
    missing = [p for p in paths if on_disk(f"{p}.kv_b_proj.weight", tensors) not in tensors]
    kv_b = "fused" if not missing else "missing"
    items.append(Item("layout", "kv_b_proj", {"value": kv_b}, len(paths) - len(missing), kv_b))
    items += _unlisted_weights(checkpoint)
    items += _quantization(checkpoint, arch)
    if arch.mtp_layers:
        layers = (re.match(r"model\.layers\.(\d+)\.", key) for key in tensors)
        there = any(m and int(m[1]) >= arch.num_layers for m in layers)
        items.append(Item("layout", "MTP layers", {"value": "there" if there else "missing"}, 0, str(arch.mtp_layers)))
    dtypes = Counter(ref.dtype for ref in tensors.values())
    if dtypes.most_common(1)[0][0] == "F32":  # engines are made for 16-bit dtypes, which need no word
        items.append(Item("layout", "dtype", {"value": "F32"}, detail="F32"))
    tokenizer = [name for name in _TOKENIZER_FILES if (checkpoint.folder / name).is_file()]
    value = "there" if tokenizer else "missing"
    items.append(Item("layout", "tokenizer", {"value": value}, detail=tokenizer[0] if tokenizer else "none"))
    return items


def _unlisted_weights(checkpoint: Checkpoint) -> list[Item]:
    """Weight files and keys that are not part of the checkpoint, which engines that read every *.safetensors load."""
    own = {shard.file.name for shard in checkpoint.shards}
    extra = sorted(p.name for p in checkpoint.folder.glob("*.safetensors") if p.name not in own)
    index = "no" if checkpoint.index is None else "yes"
    items = []
    for value, files in (
        # llama.cpp and mlx-lm read all files whose name begins so.
        ("model*", [n for n in extra if n.startswith("model")]),
        ("other", [n for n in extra if not n.startswith("model")]),
    ):
        if files:
            more = f" and {len(files) - 1} more" if len(files) > 1 else ""
            items.append(Item("layout", "other files", {"value": value, "index": index}, detail=files[0] + more))
    if checkpoint.index is not None:
        unlisted = sum(len(shard.tensors) for shard in checkpoint.shards) - len(checkpoint.tensors)
        if unlisted:
            items.append(Item("layout", "unlisted keys", {}, unlisted, f"not in {SINGLE_FILE}.index.json"))
    return items


def _quantization(checkpoint: Checkpoint, arch: Architecture) -> list[Item]:
    """How weights are quantized, fused layers whose parts differ, and plain weights that config.json does not name."""
    field_name = quantization_field(checkpoint.config)
    if field_name is None:
        return []
    quant = checkpoint.config[field_name] if isinstance(checkpoint.config[field_name], dict) else {}
    method, block = str(quant.get("quant_method", "unnamed")).lower(), quant.get("weight_block_size")
    size = "x".join(map(str, block)) if isinstance(block, list) else "none"
    rows = block[0] if isinstance(block, list) and block and isinstance(block[0], int) and block[0] > 0 else 1
    # The first part of a fused layer must end where a block of scales does.
    first_parts = [s.shape[0] for s in arch if s.role in (Role.W_DQ, Role.GATE, Role.SHARED_GATE)]
    first_parts += [s.shape[0] // 2 for s in arch.by_role(Role.EXPERTS_GATE_UP)]
    fits = "yes" if all(n % rows == 0 for n in first_parts) else "no"
    detail = method if size == "none" else f"{method}, blocks of {size.replace('x', ' × ')}"
    items = [Item("layout", "quantization", {"value": method, "block": size, "block_fits": fits}, detail=detail)]
    return items + _precision_items(checkpoint, arch, ignored_modules(quant))


def _precision_items(checkpoint: Checkpoint, arch: Architecture, ignored: list[str]) -> list[Item]:
    """Fused layers whose parts have different formats, and unquantized matrices that config.json does not name.

    `ignored` are the modules that config.json says are not quantized.
    """
    formats = _formats_of_sites(checkpoint, arch)
    if formats is None:
        return [Item("layout", "fused layers", {"value": "unread"}, detail="mla-tune can't read this quantization")]
    by_layer: dict[tuple[str, str], set[str | None]] = {}
    for site, found in formats.items():
        if site.role in FUSED_LAYERS:
            by_layer.setdefault((site.path.rpartition(".")[0], FUSED_LAYERS[site.role]), set()).update(found)
    mixed = sum(len(found) > 1 for found in by_layer.values())
    value = "mixed" if mixed else "one"
    items = [Item("layout", "fused layers", {"value": value}, mixed, f"{value} precision a layer")]
    plain = [site for site, found in formats.items() if None in found and not _is_ignored(site, ignored)]
    if plain:
        items.append(Item("layout", "plain weights", {}, len(plain), f"first: {plain[0].path}"))
    return items


def _formats_of_sites(checkpoint: Checkpoint, arch: Architecture) -> dict[Site, set[str | None]] | None:
    """Adaptable site → titles of the formats of its tensors, None standing for an unquantized one.

    The registered formats are asked (`sockets.QUANT_FORMATS`).  None where no format reads the checkpoint.
    """
    try:
        quantized = quantized_tensors(checkpoint)
    except InputError:
        return None
    result: dict[Site, set[str | None]] = {}
    for site in arch:
        if site.role in ADAPTABLE:
            keys = (*site.disk_keys(), site.path)
            plain = {None for key in keys if key in checkpoint.tensors and key not in quantized}
            result[site] = plain | {quantized[key].format.title for key in keys if key in quantized}
    return result


def _is_ignored(site: Site, ignored: Iterable[str]) -> bool:
    """Whether a list of unquantized modules names this site: by its full path, a parent, or a pattern (`re:`)."""
    path = site.path.rpartition(".")[0] if site.is_experts else site.path
    return any(
        path == e or path.startswith(f"{e}.") or (e.startswith("re:") and re.match(e[3:], path)) for e in ignored
    )


def adapter_items(adapter: Adapter) -> list[Item]:
    """What an engine has to support in an adapter: each role that it adapts, and each setting."""
    items = [Item("adapter", "PEFT adapter", detail=title_of(adapter.settings))]
    by_role: dict[tuple[Role, str], list[LoraDelta]] = {}
    for delta in adapter.deltas:
        layout = "module"
        if delta.site.is_experts:
            layout = "fused experts" if delta.expert is None else "single experts"
        by_role.setdefault((delta.site.role, layout), []).append(delta)
    adapted = {(d.site.path.rpartition(".")[0], d.site.role) for d in adapter.deltas}
    for (role, layout), deltas in by_role.items():
        partner = PARTNERS.get(role)
        alone = [d for d in deltas if (d.site.path.rpartition(".")[0], partner) not in adapted]
        seen = {"layout": layout, "partner": "none" if partner is None else "not adapted" if alone else "adapted"}
        count = sum(d.site.count if d.expert is None else 1 for d in deltas)
        items.append(Item("role", role.value, seen, count, layout if layout != "module" else ""))
    return items + _setting_items(adapter)


def _setting_items(adapter: Adapter) -> list[Item]:
    """The settings of an adapter that an engine has to support."""
    settings = adapter.settings
    method = method_of(settings)
    items = [Item("setting", method.name)]
    # DoRA may have rsLoRA's scale: an engine has to know both.
    items += [
        Item("setting", other.name)
        for other in ADAPTER_METHODS.values()
        if other.switches and other is not method and other.matches(settings)
    ]
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    highest = max((d.rank for d in adapter.deltas), default=0)
    items.append(Item("setting", "rank", {"value": highest}, detail=str(highest)))
    # The patterns themselves may change nothing: what counts is the rank and scale that each matrix has.
    if any(d.rank != rank for d in adapter.deltas):
        ranks = ", ".join(map(str, sorted({d.rank for d in adapter.deltas})))
        items.append(Item("setting", "rank_pattern", detail=f"ranks {ranks}, r {rank}"))
    rslora = bool(settings.get("use_rslora"))
    if isinstance(alpha, int | float) and any(
        abs(d.scale - scaling(alpha, d.rank, rslora)) > 1e-9 * abs(d.scale) for d in adapter.deltas
    ):
        items.append(Item("setting", "alpha_pattern"))
    targets = settings.get("target_modules")
    if isinstance(targets, str):
        shorthand = targets in ("all-linear", "all")
        items.append(Item("setting", "target_modules", {"value": "shorthand" if shorthand else "pattern"}, 0, targets))
    if settings.get("target_parameters"):
        items.append(Item("setting", "target_parameters"))
    if any(d.bias is not None for d in adapter.deltas):
        items.append(Item("setting", "lora_bias"))
    if settings.get("bias", "none") != "none":
        items.append(Item("setting", "bias", detail=str(settings["bias"])))
    if saved := [s.key for s in adapter.saved if not s.key.endswith(".bias")]:
        items.append(Item("setting", "modules_to_save", count=len(saved), detail=saved[0]))
    return items
