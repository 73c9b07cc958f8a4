"""What there is to be judged in a checkpoint or an adapter, from config.json, adapter_config.json and headers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mla_tune.adapter.files import Adapter, LoraDelta
from mla_tune.adapter.methods import method_of, scaling, title_of
from mla_tune.arch.roles import ADAPTABLE, Role
from mla_tune.arch.site import Architecture, Site
from mla_tune.checkpoint.index import SINGLE_FILE, Checkpoint
from mla_tune.checkpoint.quantized.config import quantization_field
from mla_tune.checkpoint.quantized.fp8_config import CODES
from mla_tune.sockets import ADAPTER_METHODS

#: The other half of an adapted layer that engines fuse.
PARTNERS = {
    Role.W_DQ: Role.W_DKV,
    Role.W_DKV: Role.W_DQ,
    Role.GATE: Role.UP,
    Role.UP: Role.GATE,
    Role.SHARED_GATE: Role.SHARED_UP,
    Role.SHARED_UP: Role.SHARED_GATE,
}
#: What roles are computed as one layer, of one precision, with others of the same module.
_FUSED = {
    Role.W_DQ: "qkv_a",
    Role.W_DKV: "qkv_a",
    **dict.fromkeys((Role.GATE, Role.UP, Role.SHARED_GATE, Role.SHARED_UP), "gate_up"),
    **dict.fromkeys((Role.EXPERTS_GATE_UP, Role.EXPERTS_DOWN), "experts"),
}
#: Files that a tokenizer may consist of.
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json")


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to be judged: `subject` of the topic `about`, with what was seen of it.

    `count` is the number of matrices (0 where it is no matter of matrices), `detail` what a reader should see of it.
    """

    about: str
    subject: str
    seen: Mapping[str, Any] = field(default_factory=dict)
    count: int = 0
    detail: str = ""


def observations(arch: Architecture) -> dict[str, Any]:
    """What holds for the whole model: sizes C+R of the MLA cache and P+R of a query head among it."""
    d = arch.dims
    return {
        "family": arch.family.model_type,
        "model_type": arch.model_type,
        "layers": arch.num_layers,
        "query_compression": "no" if d.L is None else "yes",
        "mla_head": d.C + d.R,
        "qk_head": d.P + d.R,
    }


def model_items(checkpoint: Checkpoint, arch: Architecture) -> list[Item]:
    """What an engine could stumble over in a checkpoint."""
    config, keys = checkpoint.config, checkpoint.tensors
    d = arch.dims
    head = f"C+R {d.C + d.R}, P+R {d.P + d.R}"
    names = config.get("architectures")
    items = [
        Item("model", "family", detail=arch.model_type),
        Item("config", "architectures", {"value": "named" if names else "missing"}, detail=", ".join(names or [])),
        Item("model", "attention", detail=head),
    ]
    if any(key.endswith(".mlp.gate.e_score_correction_bias") for key in keys):
        for name in ("topk_method", "scoring_func"):
            value = str(config.get(name) or "missing")
            items.append(Item("config", name, {"value": value}, detail=value))
    missing = [p for p in arch.attention_paths if arch.key_mapping.on_disk(f"{p}.kv_b_proj.weight", keys) not in keys]
    kv_b = "fused" if not missing else "missing"
    items.append(Item("layout", "kv_b_proj", {"value": kv_b}, len(arch.attention_paths) - len(missing), kv_b))
    items += _extra_files(checkpoint)
    items += _quantized(checkpoint, arch)
    if arch.mtp_layers:
        layers = (re.match(r"model\.layers\.(\d+)\.", key) for key in keys)
        there = any(m and int(m[1]) >= arch.num_layers for m in layers)
        items.append(Item("layout", "MTP layers", {"value": "there" if there else "missing"}, 0, str(arch.mtp_layers)))
    dtypes = Counter(ref.dtype for ref in keys.values())
    if dtypes.most_common(1)[0][0] == "F32":  # 16-bit types are what engines are made for
        items.append(Item("layout", "dtype", {"value": "F32"}, detail="F32"))
    tokenizer = [name for name in _TOKENIZER if (checkpoint.folder / name).is_file()]
    value = "there" if tokenizer else "missing"
    items.append(Item("layout", "tokenizer", {"value": value}, detail=tokenizer[0] if tokenizer else "none"))
    return items


def _extra_files(checkpoint: Checkpoint) -> list[Item]:
    """Weight files beside the checkpoint's own: engines that read every *.safetensors of a folder load them."""
    own = {shard.file.name for shard in checkpoint.shards}
    extra = sorted(p.name for p in checkpoint.folder.glob("*.safetensors") if p.name not in own)
    index = "no" if checkpoint.index is None else "yes"
    items = []
    for value, which in (
        # llama.cpp and mlx-lm read all files whose name begins so.
        ("model*", [n for n in extra if n.startswith("model")]),
        ("other", [n for n in extra if not n.startswith("model")]),
    ):
        if which:
            more = f" and {len(which) - 1} more" if len(which) > 1 else ""
            items.append(Item("layout", "other files", {"value": value, "index": index}, detail=which[0] + more))
    if checkpoint.index is not None:
        unlisted = sum(len(shard.tensors) for shard in checkpoint.shards) - len(checkpoint.tensors)
        if unlisted:
            items.append(Item("layout", "unlisted keys", {}, unlisted, f"not in {SINGLE_FILE}.index.json"))
    return items


def _quantized(checkpoint: Checkpoint, arch: Architecture) -> list[Item]:
    """How weights are quantized, matrices whose precision config.json does not tell, fused layers of two precisions."""
    name = quantization_field(checkpoint.config)
    if name is None:
        return []
    quant = checkpoint.config[name] if isinstance(checkpoint.config[name], dict) else {}
    method, block = str(quant.get("quant_method", "unnamed")).lower(), quant.get("weight_block_size")
    size = "x".join(map(str, block)) if isinstance(block, list) else "none"
    rows = block[0] if isinstance(block, list) and block and isinstance(block[0], int) and block[0] > 0 else 1
    # The first part of a fused layer must end where a block of scales does.
    firsts = [s.shape[0] for s in arch if s.role in (Role.W_DQ, Role.GATE, Role.SHARED_GATE)]
    firsts += [s.shape[0] // 2 for s in arch.by_role(Role.EXPERTS_GATE_UP)]
    fits = "yes" if all(n % rows == 0 for n in firsts) else "no"
    detail = method if size == "none" else f"{method}, blocks of {size.replace('x', ' × ')}"
    items = [Item("layout", "quantization", {"value": method, "block": size, "block_fits": fits}, detail=detail)]
    codes = {site: _precisions(site, checkpoint) for site in arch if site.role in ADAPTABLE}
    layers: dict[tuple[str, str], set[bool]] = {}
    for site, found in codes.items():
        if site.role in _FUSED:
            layers.setdefault((site.path.rpartition(".")[0], _FUSED[site.role]), set()).update(found)
    mixed = sum(len(found) > 1 for found in layers.values())
    value = "mixed" if mixed else "one"
    items.append(Item("layout", "fused layers", {"value": value}, mixed, f"{value} precision a layer"))
    listed = [e for key in ("modules_to_not_convert", "ignored_layers", "ignore") for e in quant.get(key) or []]
    plain = [site for site, found in codes.items() if False in found and not _listed(site, listed)]
    if plain:
        items.append(Item("layout", "plain weights", {}, len(plain), f"first: {plain[0].path}"))
    return items


def _precisions(site: Site, checkpoint: Checkpoint) -> set[bool]:
    """Whether the tensors of a site are FP8 codes: both where some are."""
    keys = (*site.disk_keys(), site.path)
    return {checkpoint.tensors[key].dtype == CODES for key in keys if key in checkpoint.tensors}


def _listed(site: Site, entries: Iterable[str]) -> bool:
    """Whether a list of modules that stay as they are names this site: its full path, a parent, or a pattern."""
    path = site.path.rpartition(".")[0] if site.is_experts else site.path
    return any(
        path == e or path.startswith(f"{e}.") or (e.startswith("re:") and re.match(e[3:], path)) for e in entries
    )


def adapter_items(adapter: Adapter, arch: Architecture) -> list[Item]:
    """What an engine could stumble over in an adapter: each role it adapts, and each setting that needs support."""
    settings = adapter.settings
    items = [Item("adapter", "PEFT adapter", detail=title_of(settings))]
    by_role: dict[tuple[Role, str], list[LoraDelta]] = {}
    for delta in adapter.deltas:
        layout = "module"
        if delta.site.is_experts:
            layout = "fused experts" if delta.expert is None else "single experts"
        by_role.setdefault((delta.site.role, layout), []).append(delta)
    paths = {(d.site.path.rpartition(".")[0], d.site.role) for d in adapter.deltas}
    for (role, layout), deltas in by_role.items():
        partner = PARTNERS.get(role)
        alone = [d for d in deltas if (d.site.path.rpartition(".")[0], partner) not in paths]
        seen = {"layout": layout, "partner": "none" if partner is None else "not adapted" if alone else "adapted"}
        count = sum(d.site.count if d.expert is None else 1 for d in deltas)
        items.append(Item("role", role.value, seen, count, layout if layout != "module" else ""))
    return items + _settings(adapter, settings)


def _settings(adapter: Adapter, settings: Mapping[str, Any]) -> list[Item]:
    method = method_of(settings)
    items = [Item("setting", method.name)]
    # DoRA may have rsLoRA's scale: an engine has to know both.
    items += [
        Item("setting", other.name)
        for other in ADAPTER_METHODS.values()
        if other.switches and other is not method and other.matches(settings)
    ]
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    top = max((d.rank for d in adapter.deltas), default=0)
    items.append(Item("setting", "rank", {"value": top}, detail=str(top)))
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
