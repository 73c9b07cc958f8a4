"""Facts about a model from its config.json, as one JSON document: what `mla-tune inspect` shows."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mla_tune.arch.dims import DTYPE_BYTES
from mla_tune.arch.roles import FACTS
from mla_tune.arch.site import Architecture, Site
from mla_tune.errors import InputError

if TYPE_CHECKING:  # imported at run time it would load pydantic, a fifth of the command's time, without need
    from mla_tune.adapter.placement import Placement

#: LoRA rank r that parameters of an adapter are counted for unless another is given.
DEFAULT_RANK = 16


def inspect_architecture(
    arch: Architecture, rank: int = DEFAULT_RANK, dtype: str = "bfloat16", placement: Placement | None = None
) -> dict[str, Any]:
    """The facts of `arch` as a JSON document.

    Arguments:
        rank: the LoRA rank that `lora_params` is counted for.
        dtype: dtype of the KV cache.
        placement: an adapter.  Its ranks are used instead of `rank`, `selected` of each entry says whether it is
            adapted (None without a placement), and `adapted` sums the adapter up.

    `layers` has one entry for each matrix or fused stack of experts, `mtp` those of MTP layers where their layout is
    known.  Bytes of the cache are per token, over all attention modules.  Parameters exclude MTP layers.  Raises
    `InputError` for a dtype that a cache can't have.
    """
    if dtype not in DTYPE_BYTES:
        raise InputError(f"unknown KV cache dtype '{dtype}'. Allowed: {', '.join(DTYPE_BYTES)}")
    d, (latent, expanded) = arch.dims, arch.kv_bytes(dtype)
    ranks = {p.site.path: p.rank for p in placement.sites} if placement else None
    document: dict[str, Any] = {
        "model_type": arch.model_type,
        "family": arch.family.model_type,
        "title": arch.title,
        "prefix": arch.prefix,
        "num_layers": arch.num_layers,
        "mla_layers": len({a.layer for a in arch.attention}),
        "attention_modules": len(arch.attention),
        "dims": asdict(d),
        "other_dims": _other_dims(arch),
        "vocab_size": arch.vocab_size,
        "max_position_embeddings": arch.max_position_embeddings,
        "params_total": arch.params_total,
        "params_active": arch.active_params,
        "tied_embeddings": arch.tied,
        "quantization": arch.quantization,
        "mtp_layers": arch.mtp_layers,
        "kv_cache": {
            "dtype": dtype,
            "latent_bytes_per_token": latent,
            "expanded_bytes_per_token": expanded,
            "ratio": round(expanded / latent, 2),
            "indexer_bytes_per_token": arch.indexer_bytes(dtype),
        },
        "rank": placement.rank if placement else rank,
        "notes": _notes(arch),
        "layers": [_layer(site, rank, ranks) for site in arch.sites],
        "mtp": [_layer(site, rank, ranks) for site in arch.mtp_sites],
    }
    if placement:
        document["adapted"] = {
            "method": placement.method,
            "modules": len(placement.sites),
            "matrices": sum(p.site.count for p in placement.sites),
            "lora_params": placement.trainable_params,
            "share": placement.trainable_params / arch.params_total,
        }
    return document


def _other_dims(arch: Architecture) -> list[dict[str, Any]]:
    """Dimensions of attention modules that differ from the model's `dims`, each with the count of such modules."""
    others = Counter(a.dims for a in arch.attention if a.dims != arch.dims)
    return [{**asdict(dims), "modules": count} for dims, count in others.items()]


def _layer(site: Site, rank: int, ranks: dict[str, int] | None) -> dict[str, Any]:
    """One entry of `layers`; `lora_params` is 0 where no adapter can be."""
    facts = FACTS[site.role]
    used = (ranks or {}).get(site.path, rank)
    return {
        "path": site.path,
        "role": site.role.value,
        "layer": site.layer,
        "shape": list(site.shape),
        "count": site.count,
        "mtp": site.mtp,
        "params": site.params,
        "lora_params": site.lora_params(used) if site.attachable else 0,
        "attachable": site.attachable,
        "reason": site.reason,
        "selected": None if ranks is None else site.path in ranks,
        "rank": used if site.attachable else None,
        "risk": facts.risk,
        "note": facts.note,
        "cache": facts.cache,
        "absorption": facts.absorption,
        "nemo": facts.nemo,
    }


def _notes(arch: Architecture) -> list[str]:
    """Sentences on what the numbers leave out."""
    notes = list(arch.warnings)
    if arch.mtp_layers:
        plural = "s" if arch.mtp_layers > 1 else ""
        notes.append(
            f"{arch.mtp_layers} MTP layer{plural} in the checkpoint, says config.json: "
            "kept by merge-absorb, not adapted, not counted."
        )
    if linear := arch.num_layers - len({a.layer for a in arch.attention}):
        notes.append(
            f"{linear} of {arch.num_layers} layers are linear attention (KDA): a state of constant size, no KV cache."
        )
    if windows := sum(a.has_window for a in arch.attention):
        notes.append(f"{windows} attention modules see a window of tokens: their cache stops growing there.")
    if borrowed := sum(not a.owns_cache for a in arch.attention):
        notes.append(f"{borrowed} attention modules read the cache of an earlier layer and keep none.")
    if not arch.tower_counted:
        notes.append("Vision or audio towers are not counted: their layout is not known here.")
    moe = arch.family.moe
    if moe and moe.identity_experts_key:
        notes.append("Active parameters are the most a token can use: identity experts have no weights.")
    if arch.quantization:
        notes.append(f"Quantized on disk ({arch.quantization}): parameters are counted without the scales.")
    if any(site.is_experts for site in arch.sites):
        notes.append("Routed experts are one fused stack a layer, adapted only when a recipe asks for experts.")
    return notes
