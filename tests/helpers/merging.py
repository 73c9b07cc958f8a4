"""Tiny real checkpoints and PEFT adapters for the merge tests, and PEFT's own merge as the oracle.

All dimensions of a matrix differ, so that a transposition can't hide; widths of the experts are multiples of 8, which
torch's grouped matmul needs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

MLA = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 28,
    "q_lora_rank": 36,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 15,
    "max_position_embeddings": 64,
    # Weights large enough that a wrong merge shows in the logits.
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
MOE = {
    "intermediate_size": 56,
    "moe_intermediate_size": 40,
    "n_shared_experts": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": MLA | MOE,
    "deepseek_v2": MLA | MOE | {"q_lora_rank": None, "topk_method": "greedy"},
    "minicpm3": MLA | {"intermediate_size": 56, "num_hidden_layers": 2, "tie_word_embeddings": True},
    "longcat_flash": MLA
    | {
        "ffn_hidden_size": 56,
        "expert_ffn_hidden_size": 40,
        "num_layers": 2,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "head_dim": 6,
    },
}
TOKENS = torch.randint(0, 97, (2, 11), generator=torch.Generator().manual_seed(3))


def make_base(folder: Path, family: str = "deepseek_v3", dtype: str = "float32", shard: str = "5GB") -> Path:
    """A checkpoint with random weights, saved by transformers."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.1, 0.1)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def load(folder: Path, dtype: str = "auto") -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def make_adapter(folder: Path, base: Path, **settings: Any) -> Path:
    """An adapter on `base` with random A and B (and magnitudes), saved by PEFT."""
    torch.manual_seed(1)
    settings = {"r": 3, "lora_alpha": 7, "task_type": "CAUSAL_LM", "target_modules": []} | settings
    model = get_peft_model(load(base), LoraConfig(**settings))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_magnitude" in name:
                p.mul_(1 + 0.2 * torch.rand_like(p))
            elif "lora_" in name:
                p.normal_(0, 0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def delta_of(adapter: Path, key: str) -> torch.Tensor:
    """s·B·A of one matrix, in float64."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    stem = f"base_model.model.{key.removesuffix('.weight')}"
    A, B = (tensors[f"{stem}.lora_{f}.weight"].double() for f in "AB")
    return B @ A * (settings["lora_alpha"] / settings["r"])


def peft_merge(base: Path, adapter: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(logits with the adapter unmerged, state dict after `merge_and_unload`)."""
    model = PeftModel.from_pretrained(load(base), adapter).eval()
    with torch.no_grad():
        logits = model(TOKENS).logits
    return logits, model.merge_and_unload().state_dict()


def logits_of(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load(folder)(TOKENS).logits


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(file: Path, change: Any) -> None:
    """Load a safetensors file, let `change(tensors)` edit the dictionary, and save it."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def save_trained(folder: Path, base: Path, **settings: Any) -> Path:
    """An adapter whose every trainable number has moved, saved by PEFT."""
    torch.manual_seed(2)
    config = LoraConfig(r=3, lora_alpha=7, task_type="CAUSAL_LM", **settings)
    model: Any = get_peft_model(load(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder
