"""What `mla-tune inspect` knows about a model: one dictionary, ready for JSON.  From config.json alone: no weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mla_tune.arch.dims import DTYPE_BYTES
from mla_tune.arch.roles import FACTS
from mla_tune.arch.site import Architecture, Site
from mla_tune.errors import InputError

if TYPE_CHECKING:  # at run time it would load pydantic, a fifth of the command's time, for a recipe that isn't there
    from mla_tune.adapter.placement import Placement

#: LoRA rank r that parameter counts are given for when nobody says otherwise.
DEFAULT_RANK = 16


def survey(
    arch: Architecture, rank: int = DEFAULT_RANK, dtype: str = "bfloat16", placement: Placement | None = None
) -> dict[str, Any]:
    """The facts of `arch` as a JSON document; `layers` has one entry for each matrix or fused stack of experts.

    `rank` is the LoRA rank that `lora_params` is counted for, `dtype` that of the KV cache.  With a `placement` its
    own ranks are used, `selected` says which entries it adapts (else None), and `adapted` sums them up.
    Bytes are per token over all attention modules; parameters exclude MTP layers.  Raises `InputError` for a dtype
    that a cache can't have.
    """
    if dtype not in DTYPE_BYTES:
        raise InputError(f"unknown KV cache dtype '{dtype}'. Allowed: {', '.join(DTYPE_BYTES)}")
    d, (latent, expanded) = arch.dims, arch.kv_bytes(dtype)
    ranks = {p.site.path: p.rank for p in placement.sites} if placement else None
    document: dict[str, Any] = {
        "model_type": arch.model_type,
        "family": arch.family.model_type,
        "title": arch.family.title,
        "num_layers": arch.num_layers,
        "attention_modules": len(arch.attention_paths),
        "dims": {"H": d.H, "P": d.P, "R": d.R, "V": d.V, "C": d.C, "L": d.L, "D": d.D},
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
        },
        "rank": placement.rank if placement else rank,
        "notes": _notes(arch),
        "layers": [_layer(site, rank, ranks) for site in arch.sites],
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


def _layer(site: Site, rank: int, ranks: dict[str, int] | None) -> dict[str, Any]:
    """One entry of `layers`; `lora_params` is 0 where no adapter can sit."""
    facts = FACTS[site.role]
    used = (ranks or {}).get(site.path, rank)
    return {
        "path": site.path,
        "role": site.role.value,
        "layer": site.layer,
        "shape": list(site.shape),
        "count": site.count,
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
    """What the numbers leave out."""
    notes = []
    if arch.mtp_layers:
        plural = "s" if arch.mtp_layers > 1 else ""
        notes.append(
            f"{arch.mtp_layers} MTP layer{plural} in the checkpoint, says config.json: "
            "kept by merge-absorb, not adapted, not counted."
        )
    moe = arch.family.moe
    if moe and moe.identity_experts_key:
        notes.append("Active parameters are the most a token can use: identity experts have no weights.")
    if arch.quantization:
        notes.append(f"Quantized on disk ({arch.quantization}): parameters are counted without the scales.")
    if any(site.is_experts for site in arch.sites):
        notes.append("Routed experts are one fused stack a layer, adapted only when a recipe asks for experts.")
    return notes
