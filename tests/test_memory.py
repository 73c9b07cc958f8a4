"""The memory estimate against what autograd really keeps, tensor by tensor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from mla_tune.adapter.placement import place
from mla_tune.arch.registry import architecture
from mla_tune.model.attach import attach
from mla_tune.recipe.load import load_recipe
from mla_tune.survey.memory import Run, estimate

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 320,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
    "kv_lora_rank": 48,
    "q_lora_rank": 80,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 32,
    "max_position_embeddings": 512,
    "num_nextn_predict_layers": 0,
}


def kept_by_autograd(config: dict, recipe: Any, batch: int, length: int, packed: bool, **build: Any) -> int:
    """Bytes of distinct storages saved for the backward pass, parameters and buffers aside."""
    arch = architecture(config)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config), experts_implementation="grouped_mm", **build
    )
    net = attach(model, arch, place(arch, recipe.adapter), 0)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    net.train()
    own = {t.untyped_storage().data_ptr() for t in [*net.parameters(), *net.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    ids = torch.randint(3, config["vocab_size"], (batch, length))
    extra = {"position_ids": torch.arange(length).repeat(batch, 1) % (length // 3)} if packed else {}
    low = build.get("dtype") == torch.bfloat16
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=low),
    ):
        net(input_ids=ids, labels=ids, fused_lm_head=True, use_cache=False, **extra)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize("recipe", ["safe", "all-linear", "W_UKV-priority", "attention-only", "bottleneck"])
@pytest.mark.parametrize(
    "changes, packed, build",
    [
        ({}, True, {"attn_implementation": "sdpa"}),
        ({}, False, {"attn_implementation": "sdpa"}),
        ({"v_head_dim": 40}, True, {"attn_implementation": "sdpa"}),
        ({}, True, {"attn_implementation": "eager"}),
        ({"q_lora_rank": None}, True, {"attn_implementation": "sdpa"}),
        ({}, True, {"attn_implementation": "sdpa", "dtype": torch.bfloat16}),
    ],
    ids=["packed", "plain", "unequal heads", "eager", "no W_DQ", "bfloat16"],
)
def test_activations_are_those_that_autograd_keeps(recipe: str, changes: dict, packed: bool, build: dict) -> None:
    config = CONFIG | changes
    batch, length = 2, 480  # long rows, so that the terms in the length weigh more than the tolerance
    loaded = load_recipe(recipe)
    real = kept_by_autograd(config, loaded, batch, length, packed, **build)
    arch = architecture(config)
    dtype = "bfloat16" if build.get("dtype") == torch.bfloat16 else "float32"
    run = Run(batch, length, dtype, packing=packed, attention=build["attn_implementation"])
    guess = estimate(arch, place(arch, loaded.adapter), run)
    assert guess.activations == pytest.approx(real, rel=0.10)


@pytest.mark.parametrize("recipe", ["safe", "all-linear"])
def test_the_total_is_within_a_quarter_of_a_measured_run(recipe: str, tmp_path: Path) -> None:
    """Resident memory, so in a process of its own; the small preset, so that tensors and not libraries decide."""
    sets = ["model.base=null", "model.preset=small", "train.batch_size=4", "train.max_steps=2", "data.eval_fraction=0"]
    overrides = [x for s in sets for x in ("--set", s)]

    def run(verb: str, *args: str) -> dict[str, Any]:
        command = [sys.executable, "-c", "from mla_tune.cli.app import main; main()", verb, "--recipe", recipe]
        done = subprocess.run([*command, *overrides, *args, "--json"], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    planned = run("plan")["memory"]["total"]
    measured = run("train", "--output", str(tmp_path / "run"), "--set", "model.device=cpu")["memory"]["process_peak"]
    assert planned == pytest.approx(measured, rel=0.25)
