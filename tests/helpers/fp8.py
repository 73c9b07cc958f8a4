"""FP8 checkpoints made from plain ones, and read back, in torch: no code shared with `checkpoint.quantized.fp8`."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

#: What published FP8 checkpoints quantize: not norms, routers, embeddings and the head.
MATRIX = re.compile(
    r".*\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj|gate_proj|up_proj|down_proj)\.weight"
    r"|.*\.experts\.(gate_up_proj|down_proj)"
)
INDEX = "model.safetensors.index.json"
_TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E8M0": torch.float8_e8m0fnu}


def make_fp8(
    base: Path,
    out: Path,
    block: tuple[int, int] | None = (4, 4),
    style: str = "deepseek",
    scales_in_other_shard: bool = False,
    ue8m0: bool = False,
    skip: Sequence[str] = (),
    *,
    channel: bool = False,
    scale_dtype: str = "F32",
    input_scales: bool = False,
) -> Path:
    """The checkpoint `base` with its matrices in FP8, in the folder `out`, with the same shards.

    `block` None means one scale a tensor, or a row with `channel` (compressed-tensors only).  `style` is deepseek or
    compressed-tensors.  `ue8m0`: scales are powers of two; they are stored so with `scale_dtype="F8_E8M0"`, else as
    numbers.  `skip`: parts of keys that stay as they are, and are named in the config.  `scales_in_other_shard`: each
    scale lies in the next shard (a second one where there is one only).  `input_scales` adds scales of static
    activations.
    """
    shards = _shards(base)
    names = list(shards)
    if scales_in_other_shard and len(names) == 1:
        shards = {"model-00001-of-00002.safetensors": shards[names[0]], "model-00002-of-00002.safetensors": {}}
        names = list(shards)
    written: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names}
    skipped: list[str] = []
    ending = "_scale_inv" if style == "deepseek" else "_scale"
    for i, name in enumerate(names):
        beside = names[(i + 1) % len(names)] if scales_in_other_shard else name
        for key, tensor in shards[name].items():
            if not MATRIX.fullmatch(key) or any(part in key for part in skip):
                if MATRIX.fullmatch(key):
                    skipped.append(_module(key) if style == "deepseek" else key.removesuffix(".weight"))
                written[name][key] = tensor
                continue
            codes, scale = quantize(tensor, (1, tensor.shape[-1]) if channel else block, ue8m0, scale_dtype)
            written[name][key] = codes
            written[beside][key + ending] = scale
            if input_scales:
                written[beside][key.removesuffix("weight") + "input_scale"] = torch.tensor([0.5])
    out.mkdir(parents=True)
    for file in base.iterdir():
        if file.suffix != ".safetensors" and file.name != INDEX:
            shutil.copy(file, out)
    for name, tensors in written.items():
        save_file(tensors, out / name, metadata={"format": "pt"})
    if len(names) > 1:
        weight_map = {key: name for name, tensors in written.items() for key in tensors}
        total = sum(t.nbytes for tensors in written.values() for t in tensors.values())
        document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (out / INDEX).write_text(json.dumps(document, indent=2))
    config = json.loads((base / "config.json").read_text())
    make = _deepseek if style == "deepseek" else _compressed_tensors
    config["quantization_config"] = make(block, channel, ue8m0, sorted(set(skipped)), input_scales)
    (out / "config.json").write_text(json.dumps(config, indent=2))
    return out


def quantize(
    weight: torch.Tensor, block: tuple[int, int] | None, ue8m0: bool = False, scale_dtype: str = "F32"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes float8_e4m3fn, scales): absmax / 448 of each block of the last two dimensions, or of the whole tensor."""
    x = weight.to(torch.float32)
    if block is None:
        largest = x.abs().amax(dim=(-2, -1), keepdim=True) if x.ndim == 3 else x.abs().amax()
    else:
        largest = _blocks(x.abs(), block).amax(dim=(-3, -1))
    scale = torch.where(largest > 0, largest / 448, 1.0)
    if ue8m0:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    scale = scale.to(_TORCH[scale_dtype])
    codes = (x / spread(scale.float(), x.shape, block)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scale


def spread(scale: torch.Tensor, shape: Sequence[int], block: tuple[int, int] | None) -> torch.Tensor:
    """A scale for each number of a weight of this shape."""
    if block is None:
        return scale.expand(shape)
    rows, columns = torch.arange(shape[-2]) // block[0], torch.arange(shape[-1]) // block[1]
    return scale[..., rows[:, None], columns]


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint made by `make_fp8`, FP8 weights as float32 numbers and without their scales."""
    config = json.loads((folder / "config.json").read_text()).get("quantization_config") or {}
    tensors = {key: t for shard in _shards(folder).values() for key, t in shard.items()}
    result = {}
    for key, tensor in tensors.items():
        if key.endswith(("_scale", "_scale_inv")):
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            name = next(key + e for e in ("_scale_inv", "_scale") if key + e in tensors)
            block = _declared(config, tensor)
            tensor = tensor.float() * spread(tensors[name].float(), tensor.shape, block)
        result[key] = tensor
    return result


def _declared(config: dict[str, Any], tensor: torch.Tensor) -> tuple[int, int] | None:
    if config["quant_method"] == "fp8":
        return config["weight_block_size"]
    weights = config["config_groups"]["group_0"]["weights"]
    if weights["strategy"] == "channel":
        return 1, tensor.shape[-1]
    return weights["block_structure"]


def _blocks(x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """(…, out, in) → (…, blocks down, rows, blocks across, columns), filled up with zeros."""
    down, across = -(-x.shape[-2] // block[0]), -(-x.shape[-1] // block[1])
    full = x.new_zeros(*x.shape[:-2], down * block[0], across * block[1])
    full[..., : x.shape[-2], : x.shape[-1]] = x
    return full.reshape(*x.shape[:-2], down, block[0], across, block[1])


def _shards(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    shards = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            shards[file.name] = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (not a dictionary)
    return shards


def _module(key: str) -> str:
    return re.sub(r"(\.experts)\..*", r"\1", key).removesuffix(".weight")


def _deepseek(
    block: tuple[int, int] | None, channel: bool, ue8m0: bool, skipped: list[str], static: bool
) -> dict[str, Any]:
    assert not channel
    config: dict[str, Any] = {
        "activation_scheme": "static" if static else "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": block and list(block),
    }
    if ue8m0:
        config["scale_fmt"] = "ue8m0"
    if skipped:
        config["modules_to_not_convert"] = [*skipped, "lm_head"]
    return config


def _compressed_tensors(
    block: tuple[int, int] | None, channel: bool, ue8m0: bool, skipped: list[str], static: bool
) -> dict[str, Any]:
    weights = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "group_size": None,
        "strategy": "channel" if channel else "block" if block else "tensor",
        "block_structure": None if channel else block and list(block),
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    activations = weights | {
        "strategy": "tensor" if static else "token",
        "block_structure": None,
        "dynamic": not static,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "config_groups": {"group_0": group | {"format": None}},
        "format": "float-quantized",
        "global_compression_ratio": None,
        "ignore": ["lm_head", *skipped],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.15.0",
    }


#: name → arguments of make_fp8.  Blocks of 4 rows divide few of the tiny matrices: 34 rows of kv_a, 75 of kv_b.
FORMATS: dict[str, dict[str, Any]] = {
    "deepseek": {"block": (4, 4)},
    "scales in another shard": {"block": (8, 16), "scales_in_other_shard": True},
    "ue8m0 as numbers": {"block": (4, 8), "ue8m0": True},
    "ue8m0 as codes": {"block": (4, 8), "ue8m0": True, "scale_dtype": "F8_E8M0"},
    "one block": {"block": (128, 128)},
    "tensor": {"block": None, "style": "compressed-tensors"},
    "tensor, scale bf16": {"block": None, "style": "compressed-tensors", "scale_dtype": "BF16"},
    "channel": {"block": None, "style": "compressed-tensors", "channel": True},
    "static activations": {"block": None, "style": "compressed-tensors", "input_scales": True},
}
