"""DeepSeek-V3 checkpoints and PEFT adapters made from nothing but a config.json: names, shapes, files, cheap weights.

Letters: D hidden, H heads, P nope, R rope, V value head size, C KV latent, L query latent, I MLP width, E experts,
r LoRA rank.  Names and dtypes are those of the published checkpoint (README_WEIGHTS.md of DeepSeek-V3): block FP8 for
every linear layer but the router, `eh_proj` and the heads; with one float32 scale for each block of 128 × 128.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

WIDTH = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
GROUPS = ("attention", "mlp", "experts")
ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
#: Numbers in the block of random weights that all tensors are cut from: making 5 GB of them afresh takes minutes.
_BLOCK = 1 << 22


class Tensor(NamedTuple):
    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * WIDTH[self.dtype]


def attention_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(out, in) of the five attention projections."""
    c = config
    D, H, P, R, V = (
        c[k] for k in ("hidden_size", "num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    L, C = c["q_lora_rank"], c["kv_lora_rank"]
    return dict(zip(ATTENTION, ((L, D), (H * (P + R), L), (C + R, D), (H * (P + V), C), (D, H * V)), strict=True))


def mlp_shapes(D: int, width: int) -> dict[str, tuple[int, int]]:
    return {"gate_proj": (width, D), "up_proj": (width, D), "down_proj": (D, width)}


def layer_tensors(config: Mapping[str, Any], layer: int) -> Iterator[Tensor]:
    """The tensors of one decoder layer; `num_hidden_layers` and up are MTP layers."""
    c, base = config, f"model.layers.{layer}"
    D, E, width = c["hidden_size"], c["n_routed_experts"], c["moe_intermediate_size"]
    block = c.get("quantization_config", {}).get("weight_block_size")

    def linear(name: str, shape: tuple[int, int]) -> Iterator[Tensor]:
        yield Tensor(f"{base}.{name}.weight", "F8_E4M3" if block else "BF16", shape)
        if block:
            scales = tuple(ceil(n / b) for n, b in zip(shape, block, strict=True))
            yield Tensor(f"{base}.{name}.weight_scale_inv", "F32", scales)

    def plain(name: str, *shape: int) -> Tensor:
        return Tensor(f"{base}.{name}", "BF16", shape)

    mtp = layer >= c["num_hidden_layers"]
    if mtp:
        yield plain("embed_tokens.weight", c["vocab_size"], D)
        yield plain("enorm.weight", D)
        yield plain("hnorm.weight", D)
        yield plain("eh_proj.weight", D, 2 * D)
    for name, shape in attention_shapes(c).items():
        yield from linear(f"self_attn.{name}", shape)
        if name == "q_a_proj":
            yield plain("self_attn.q_a_layernorm.weight", c["q_lora_rank"])
        if name == "kv_a_proj_with_mqa":
            yield plain("self_attn.kv_a_layernorm.weight", c["kv_lora_rank"])
    if layer < c["first_k_dense_replace"]:
        for name, shape in mlp_shapes(D, c["intermediate_size"]).items():
            yield from linear(f"mlp.{name}", shape)
    else:
        yield plain("mlp.gate.weight", E, D)
        yield Tensor(f"{base}.mlp.gate.e_score_correction_bias", "F32", (E,))
        for name, shape in mlp_shapes(D, width * c["n_shared_experts"]).items():
            yield from linear(f"mlp.shared_experts.{name}", shape)
        for expert in range(E):
            for name, shape in mlp_shapes(D, width).items():
                yield from linear(f"mlp.experts.{expert}.{name}", shape)
    yield plain("input_layernorm.weight", D)
    yield plain("post_attention_layernorm.weight", D)
    if mtp:
        yield plain("shared_head.norm.weight", D)
        yield plain("shared_head.head.weight", c["vocab_size"], D)


def outer_tensors(config: Mapping[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """The embedding, and what follows the layers of the main model: the last norm and the output head."""
    D, vocab = config["hidden_size"], config["vocab_size"]
    embedding = Tensor("model.embed_tokens.weight", "BF16", (vocab, D))
    return embedding, [Tensor("model.norm.weight", "BF16", (D,)), Tensor("lm_head.weight", "BF16", (vocab, D))]


def model_tensors(config: Mapping[str, Any]) -> list[Tensor]:
    """The whole checkpoint in the order of the model."""
    first, last = outer_tensors(config)
    main = config["num_hidden_layers"]
    layers = [list(layer_tensors(config, i)) for i in range(main + config.get("num_nextn_predict_layers", 0))]
    return [first, *(t for ts in layers[:main] for t in ts), *last, *(t for ts in layers[main:] for t in ts)]


def cut(tensors: Iterable[Tensor], limit: int, most: int | None = None) -> list[list[Tensor]]:
    """Shards in order: a new one begins when the tensor would not fit into `limit` bytes; the shard number `most`
    takes all that is left."""
    shards: list[list[Tensor]] = []
    held = 0
    for t in tensors:
        if not shards or (held + t.nbytes > limit and len(shards) != most):
            shards.append([])
            held = 0
        shards[-1].append(t)
        held += t.nbytes
    return shards


def adapter_tensors(config: Mapping[str, Any], groups: Iterable[str], rank: int) -> list[Tensor]:
    """A and B of every matrix of the groups, under PEFT's keys.

    A linear layer has A (r, in), B (out, r).  Fused experts have A (E·r, in), B (out, r·E); gate_up is the inner of the
    two wrappers around `mlp.experts`, so its keys say `base_layer`.  PEFT trains in float32 and saves so.  MTP layers
    are not loaded by transformers and never adapted.
    """
    D, E, routed = config["hidden_size"], config["n_routed_experts"], config["moe_intermediate_size"]
    found: list[Tensor] = []

    def lora(path: str, shape: tuple[int, int], experts: int = 1) -> None:
        stem, (out, inner) = f"base_model.model.{path}", shape
        found.append(Tensor(f"{stem}.lora_A.weight", "F32", (experts * rank, inner)))
        found.append(Tensor(f"{stem}.lora_B.weight", "F32", (out, rank * experts)))

    for layer in range(config["num_hidden_layers"]):
        base, dense = f"model.layers.{layer}", layer < config["first_k_dense_replace"]
        if "attention" in groups:
            for name, shape in attention_shapes(config).items():
                lora(f"{base}.self_attn.{name}", shape)
        if "mlp" in groups:
            parent = "mlp" if dense else "mlp.shared_experts"
            width = config["intermediate_size"] if dense else routed * config["n_shared_experts"]
            for name, shape in mlp_shapes(D, width).items():
                lora(f"{base}.{parent}.{name}", shape)
        if "experts" in groups and not dense:
            lora(f"{base}.mlp.experts.base_layer", (2 * routed, D), E)
            lora(f"{base}.mlp.experts", (D, routed), E)
    return found


def adapter_settings(groups: Iterable[str], rank: int, base: Path) -> dict[str, Any]:
    """adapter_config.json.  MLPs are named as parameters: PEFT rewrites their module names to the routed experts."""
    parameters: list[str] = []
    if "mlp" in groups:
        parents = ("mlp", "mlp.shared_experts")
        parameters += [f"{parent}.{name}.weight" for parent in parents for name in mlp_shapes(1, 1)]
    if "experts" in groups:
        parameters += ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "target_modules": list(ATTENTION) if "attention" in groups else [],
        "target_parameters": parameters or None,
    }


class Filler:
    """Weights for one tensor after the other: slices of one random block, each from another place."""

    def __init__(self, std: float = 0.02) -> None:
        numbers = np.random.default_rng(0).standard_normal(_BLOCK, dtype=np.float32) * np.float32(std)
        # The upper half of a float32 is a bfloat16; cutting the rest off is rounding enough for noise.
        self._blocks = {"F32": numbers, "BF16": (numbers.view(np.uint32) >> 16).astype(np.uint16)}
        self._ones = {"F32": np.float32(1), "BF16": np.uint16(0x3F80)}
        self._at = 0

    def chunks(self, tensor: Tensor) -> Iterator[np.ndarray]:
        block, left = self._blocks[tensor.dtype], prod(tensor.shape)
        if tensor.key.endswith("norm.weight"):
            yield np.full(left, self._ones[tensor.dtype])
            return
        while left:
            piece = block[self._at : self._at + left]
            yield piece
            left -= len(piece)
            self._at = (self._at + len(piece)) % _BLOCK


def write_file(file: Path, tensors: Iterable[Tensor], filler: Filler | None) -> None:
    """A safetensors file; without a filler it is sparse, reads as zeros and takes no room on the disk."""
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for t in tensors:
        begin, end = end, end + t.nbytes
        header[t.key] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        if filler is None:
            os.ftruncate(stream.fileno(), 8 + len(raw) + end)
            return
        for t in tensors:
            for chunk in filler.chunks(t):
                stream.write(chunk.data)


def write_model(folder: Path, config: Mapping[str, Any], shards: list[list[Tensor]], filler: Filler | None) -> None:
    """config.json, the shards and their index."""
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):06}.safetensors"
        write_file(folder / name, shard, filler)
        weight_map |= {t.key: name for t in shard}
    size = sum(t.nbytes for shard in shards for t in shard)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_adapter(
    folder: Path, config: Mapping[str, Any], base: Path, groups: Iterable[str], rank: int, filler: Filler | None
) -> None:
    """adapter_config.json and adapter_model.safetensors, as `PeftModel.save_pretrained` lays them out."""
    groups = list(groups)
    folder.mkdir(parents=True)
    write_file(folder / "adapter_model.safetensors", adapter_tensors(config, groups, rank), filler)
    (folder / "adapter_config.json").write_text(json.dumps(adapter_settings(groups, rank, base), indent=2) + "\n")
