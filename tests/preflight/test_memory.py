"""The memory estimate against what autograd really keeps, tensor by tensor."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from mla_tune.adapter.placement import place
from mla_tune.arch.build import architecture
from mla_tune.data.padding_free import PaddingFreeCollator
from mla_tune.model.attach import attach
from mla_tune.preflight.memory import RunShape, estimate
from mla_tune.recipe.load import load_recipe
from mla_tune.recipe.schema import Recipe
from mla_tune.training.kernels import packed_attention as packed
from mla_tune.training.kernels.chunked_loss import use_chunked_loss
from mla_tune.training.kernels.lora_linear import use_lora_factors
from mla_tune.training.kernels.mla_checkpointing import enable_mla_checkpointing
from mla_tune.training.kernels.rms_norm import use_lean_norms
from tests.helpers.marks import fast_cases

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


BATCH, LENGTH, SAMPLES = 2, 480, 3  # long rows, so that the terms in the length weigh more than the tolerance


def batch_of(vocabulary: int, attention: str, packing: bool) -> dict[str, Any]:
    ids = torch.randint(3, vocabulary, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    if attention != "packed":
        positions = {"position_ids": torch.arange(LENGTH).repeat(BATCH, 1) % (LENGTH // SAMPLES)} if packing else {}
        return {"input_ids": ids, "labels": ids, "use_cache": False, **positions}
    n = LENGTH // SAMPLES if packing else LENGTH
    rows = [{"input_ids": x, "labels": x, "position_ids": [i % n for i in range(LENGTH)]} for x in ids.tolist()]
    return PaddingFreeCollator()(rows)


def kept_by_autograd(config: dict[str, Any], recipe: Recipe, run: RunShape) -> int:
    """Bytes that a forward pass leaves allocated for the backward pass, as torch's profiler counts them."""
    arch = architecture(config)
    packed.register()
    dtype = torch.bfloat16 if run.dtype == "bfloat16" else torch.float32
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config), experts_implementation="grouped_mm", dtype=dtype
    )
    net: Any = attach(model, arch, place(arch, recipe.adapter), 0).train()
    model.set_attn_implementation(packed.NAME if run.attention == "packed" else run.attention)
    use_chunked_loss(model)
    use_lora_factors(net)
    if run.activation_checkpointing == "mla":
        enable_mla_checkpointing(net)
    else:
        use_lean_norms(net, None)
    if run.activation_checkpointing == "full":
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    batch = batch_of(config["vocab_size"], run.attention, run.packing)
    with torch.autocast("cpu", torch.bfloat16, enabled=run.dtype == "bfloat16"):
        net(**batch, token_loss=True)  # what is made once and stays
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            loss = net(**batch, token_loss=True)
    assert loss.requires_grad
    return sum(event.self_cpu_memory_usage for event in profiler.events())


@fast_cases("--safe", "-mla-all-linear")
@pytest.mark.parametrize("recipe", ["safe", "all-linear", "W_UKV-priority", "attention-only", "bottleneck"])
@pytest.mark.parametrize(
    "changes, keys",
    [
        ({}, {}),
        ({"v_head_dim": 24}, {}),
        ({}, {"attention": "sdpa"}),
        ({}, {"attention": "sdpa", "packing": False}),
        ({"v_head_dim": 40}, {"attention": "sdpa"}),
        ({}, {"attention": "eager"}),
        ({"q_lora_rank": None}, {}),
        ({}, {"dtype": "bfloat16"}),
        ({}, {"activation_checkpointing": "mla"}),
        ({"v_head_dim": 24}, {"activation_checkpointing": "mla"}),
        ({}, {"activation_checkpointing": "mla", "attention": "sdpa"}),
        ({}, {"activation_checkpointing": "mla", "dtype": "bfloat16"}),
        ({}, {"activation_checkpointing": "full"}),
    ],
    ids=lambda v: " ".join(map(str, v.values())) if isinstance(v, dict) else None,
)
def test_activations_are_those_that_autograd_keeps(recipe: str, changes: dict, keys: dict[str, Any]) -> None:
    config, loaded = CONFIG | changes, load_recipe(recipe)
    run = RunShape(BATCH, LENGTH, **{"dtype": "float32", "attention": "packed", **keys})
    arch = architecture(config)
    guess = estimate(arch, place(arch, loaded.adapter), run)
    assert guess.activations == pytest.approx(kept_by_autograd(config, loaded, run), rel=0.06)


@pytest.mark.slow
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
