"""Merges made by hand in torch, with a place for every mistake, and the check of them: for tests of the proof."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mla_tune.verification.verify import VerifyResult, verify
from tests.helpers.merging import edit_tensors

ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
INDEX = "model.safetensors.index.json"
KV_B = "model.layers.1.self_attn.kv_b_proj.weight"
DOWN = "model.layers.2.mlp.experts.3.down_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


def verified(out: Path, base: Path, *adapters: Path) -> VerifyResult:
    return verify(out, base, [(a, 1.0) for a in adapters], logits=False)


def holds(out: Path, base: Path, *adapters: Path) -> VerifyResult:
    found = verified(out, base, *adapters)
    assert not found.proof.failures
    assert found.holds
    return found


def wrong(out: Path, base: Path, *adapters: Path) -> dict[str, str]:
    found = verified(out, base, *adapters)
    assert not found.holds
    assert found.proof.failed == len(found.proof.failures)
    result: dict[str, str] = {}
    for failure in found.proof.failures:
        result[failure.key] = " and ".join(filter(None, (result.get(failure.key), failure.what)))
    return result


@dataclass(frozen=True)
class Change:
    """Δ of one tensor: s·B·A in float32, and the magnitude of a DoRA."""

    A: torch.Tensor
    B: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None

    @property
    def delta(self) -> torch.Tensor:
        return self.scale * (self.B @ self.A)


def changes(
    base: Path, adapter: Path, *, expert_major: bool = False, rslora_ignored: bool = False
) -> dict[str, Change]:
    """Key of the base → Δ, from PEFT's files."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    f = load_file(adapter / "adapter_model.safetensors")
    r = settings["r"]
    s = settings["lora_alpha"] / (math.sqrt(r) if settings["use_rslora"] and not rslora_ignored else r)
    result = {}
    for key in tensors_of(base):
        stem = f"base_model.model.{key.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in f:
            m = f.get(f"{stem}.lora_magnitude_vector")
            result[key] = Change(f[f"{stem}.lora_A.weight"], f[f"{stem}.lora_B.weight"], s, m)
        elif match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", key):
            wrapper = f"base_model.model.{match[1]}" + ("" if match[3] == "down" else ".base_layer")
            if f"{wrapper}.lora_A.weight" not in f:
                continue
            A, B, e = f[f"{wrapper}.lora_A.weight"], f[f"{wrapper}.lora_B.weight"], int(match[2])
            E = len(A) // r
            B = B[:, e * r : (e + 1) * r] if expert_major else B[:, [i * E + e for i in range(r)]]
            half = len(B) // 2
            rows = {"gate": slice(0, half), "up": slice(half, None), "down": slice(None)}[match[3]]
            result[key] = Change(A[e * r : (e + 1) * r], B[rows], s)
    return result


def once(W: torch.Tensor, c: Change) -> torch.Tensor:
    """Compute in float32 and round once."""
    S = W.float() + c.delta
    return S if c.magnitude is None else S * (c.magnitude / S.norm(dim=1))[:, None]


def delta_first(W: torch.Tensor, c: Change) -> torch.Tensor:
    """Round the delta to the dtype of the weight before adding it, as PEFT does for parameters."""
    return W.float() + c.delta.to(W.dtype).float()


def all_bfloat16(W: torch.Tensor, c: Change) -> torch.Tensor:
    """Round factors, product and scaled product to bfloat16, as on a GPU."""
    product = (c.B.bfloat16().float() @ c.A.bfloat16().float()).bfloat16()
    S = W + (product * c.scale).bfloat16()
    if c.magnitude is None:
        return S
    return (c.magnitude.bfloat16() / S.float().norm(dim=1).bfloat16())[:, None] * S


def by_hand(
    base: Path,
    out: Path,
    deltas: dict[str, Change],
    rule: Callable[[torch.Tensor, Change], torch.Tensor] = once,
    skip: tuple[str, ...] = (),
) -> Path:
    """Copy the base with every tensor of `deltas` changed by `rule` and rounded to its dtype."""
    shutil.copytree(base, out)
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        for key in tensors.keys() & deltas.keys() - set(skip):
            tensors[key] = rule(tensors[key], deltas[key]).to(tensors[key].dtype).contiguous()
        save_file(tensors, file, metadata={"format": "pt"})
    return out


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    files = [p for p in folder.glob("*.safetensors") if not p.name.startswith("absorbed")]
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def scaled(adapter: Path, out: Path, factor: float, seed: int = 0) -> Path:
    """Copy the adapter with other random numbers, and a change `factor` times as large."""
    generator = torch.Generator().manual_seed(seed)
    shutil.copytree(adapter, out)

    def draw(tensors: dict[str, torch.Tensor]) -> None:
        for key, tensor in tensors.items():
            if "magnitude" not in key:
                size = 0.1 * factor if ".lora_B." in key else 0.1
                tensors[key] = torch.randn(tensor.shape, generator=generator) * size

    edit_tensors(out / "adapter_model.safetensors", draw)
    return out


def edit(folder: Path, key: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Change one tensor of a checkpoint, or drop it where `change` gives None; no other byte moves."""
    index = folder / INDEX
    weight_map = json.loads(index.read_text())["weight_map"]
    files = [folder / weight_map[key]] if key in weight_map else list(folder.glob("absorbed*.safetensors"))

    def apply(tensors: dict[str, torch.Tensor]) -> None:
        new = change(tensors.pop(key))
        if new is not None:
            tensors[key] = new.contiguous()

    os.link(files[0], files[0].with_suffix(".kept"))  # a hard link to the base's file: the base must not change
    copy = files[0].with_suffix(".copy")
    shutil.copy(files[0], copy)
    files[0].unlink()
    copy.rename(files[0])
    files[0].with_suffix(".kept").unlink()
    edit_tensors(files[0], apply)


def dequantized_merge(fp8: Path, out: Path, adapter: Path, values: dict[str, torch.Tensor]) -> Path:
    """Write all FP8 weights as bfloat16 `values` plus the changes, as a tool does that dequantizes first."""
    shutil.copytree(fp8, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    deltas = changes(fp8, adapter)
    tensors = {}
    for key, W in values.items():
        tensors[key] = (once(W, deltas[key]) if key in deltas else W.float()).to(torch.bfloat16).contiguous()
        if key.endswith("e_score_correction_bias"):
            tensors[key] = tensors_of(fp8)[key]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    edit_config(out, lambda config: config.pop("quantization_config"))
    return out


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
