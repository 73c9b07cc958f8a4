"""`train.activation_checkpointing`: what it keeps, and that gradients stay those of the stock model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile

from mla_tune.adapter.placement import place
from mla_tune.data.padding_free import PaddingFreeCollator
from mla_tune.model.attach import attach
from mla_tune.model.load import load_model
from mla_tune.recipe.load import load_recipe
from mla_tune.recipe.schema import ModelSection
from mla_tune.training.kernels import packed_attention as packed
from mla_tune.training.kernels.chunked_loss import use_chunked_loss
from mla_tune.training.kernels.mla_checkpointing import enable_mla_checkpointing
from mla_tune.training.kernels.rms_norm import use_lean_norms
from tests.helpers.marks import fast_cases
from tests.helpers.packing import PAIRS, batch_for, rows_of
from tests.helpers.tiny_families import FAMILIES, MLA, mla_modules, tiny

LORA = ["q_a_proj", "q_b_proj", "q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]


def adapted(name: str, attention: str, dropout: float = 0.0) -> Any:
    packed.register()
    model = tiny(name)
    names = {n.rpartition(".")[2] for n, _ in model.named_modules()}
    config = LoraConfig(
        r=3, target_modules=[t for t in LORA if t in names], init_lora_weights=False, lora_dropout=dropout
    )
    torch.manual_seed(5)
    net = get_peft_model(model, config).train()
    model.set_attn_implementation(attention)
    return net


def gradients(net: Any, batch: dict[str, Any], seed: int = 0) -> tuple[float, dict[str, torch.Tensor]]:
    net.zero_grad()
    torch.manual_seed(seed)
    loss = net(**batch, token_loss=True)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def kept_bytes(net: Any, batch: dict[str, Any]) -> int:
    """Bytes allocated in a forward pass and not freed at its end, as torch's own profiler counts them.  (Hooks on saved
    tensors hide each other: of several only the innermost is asked.)"""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = net(**batch, token_loss=True)
    assert loss.requires_grad
    return sum(event.self_cpu_memory_usage for event in profiler.events())


@fast_cases("deepseek_v3", "longcat_flash")
@pytest.mark.parametrize(("name", "attention"), PAIRS)
def test_gradients_of_recomputed_mla_are_the_stock_ones(name: str, attention: str) -> None:
    batch = batch_for(attention, rows_of(name))
    stock = adapted(name, attention)
    use_chunked_loss(stock.get_base_model())
    wanted_loss, wanted = gradients(stock, batch)
    net = adapted(name, attention)
    use_chunked_loss(net.get_base_model())
    enable_mla_checkpointing(net)
    loss, found = gradients(net, batch)
    assert loss == wanted_loss
    assert set(found) == set(wanted)
    for n, g in wanted.items():
        scale = g.abs().max().clamp(min=1e-3)
        assert (found[n] - g).abs().max() <= 1e-5 * scale, n


@pytest.mark.parametrize("attention", [packed.NAME, "sdpa"])
def test_dropout_is_the_same_in_the_recomputed_pass(attention: str) -> None:
    net = adapted("deepseek_v3", attention, dropout=0.3)
    use_chunked_loss(net.get_base_model())
    enable_mla_checkpointing(net)
    seen: dict[str, list[torch.Tensor]] = {}
    for n, module in net.named_modules():
        if isinstance(module, torch.nn.Dropout) and "b_proj" in n:
            module.register_forward_hook(lambda m, i, out, n=n: seen.setdefault(n, []).append(out.detach() != 0))
    net(**batch_for(attention, rows_of("deepseek_v3")), token_loss=True).backward()
    assert len(seen) == 2 * 3  # W_UQ and W_UKV of three layers
    for n, (first, again) in seen.items():
        assert torch.equal(first, again), n
        assert 0.6 < first.float().mean() < 0.8


@pytest.mark.parametrize("attention", [packed.NAME, "sdpa"])
def test_attention_itself_runs_once(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the dear part: its output is kept, and the backward pass only makes queries, keys and values again."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "attention" in str(func) and "backward" not in str(func):
                Counting.calls += 1
            return func(*args, **(kwargs or {}))

    # Values as wide as keys: a CPU has a fused kernel for no other, and else there is no one call to keep.
    monkeypatch.setitem(FAMILIES["deepseek_v3"], "v_head_dim", MLA["qk_nope_head_dim"] + MLA["qk_rope_head_dim"])
    net = adapted("deepseek_v3", attention)
    use_chunked_loss(net.get_base_model())
    enable_mla_checkpointing(net)
    rows = rows_of("deepseek_v3")
    # A mask of its own would do without the fused kernel, so sdpa gets one row of one sample.
    batch = (
        PaddingFreeCollator()(rows)
        if attention == packed.NAME
        else {
            "input_ids": torch.tensor([rows[0]["input_ids"]]),
            "labels": torch.tensor([rows[0]["labels"]]),
        }
    )
    with Counting():
        net(**batch, token_loss=True).backward()
    layers = len(mla_modules(net))
    samples = 5 if attention == packed.NAME else 1
    assert Counting.calls == layers * samples


@pytest.mark.slow
def test_mla_keeps_less_than_none_and_full_least() -> None:
    """Bytes kept for the backward pass on the preset `small`."""
    packed.register()
    kept = {}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 4000, (600,), generator=generator).tolist()
    row = {"input_ids": ids, "labels": ids, "position_ids": [*range(400), *range(200)]}
    batch = PaddingFreeCollator()([row])
    for way in ("none", "mla", "full"):
        section = ModelSection(preset="small", attention="packed", device="cpu")
        loaded = load_model(section)
        placement = place(loaded.arch, load_recipe("safe").adapter)
        net: Any = attach(loaded.model, loaded.arch, placement, 0).train()
        loaded.model.set_attn_implementation(packed.NAME)
        use_chunked_loss(loaded.model)
        if way == "mla":
            enable_mla_checkpointing(net)
        else:
            use_lean_norms(net, None)
        if way == "full":
            loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
            loaded.model.enable_input_require_grads()
        net(**batch, token_loss=True)  # what is made once and stays: rotary tables, masks
        kept[way] = kept_bytes(net, batch)
    assert kept["mla"] <= 0.75 * kept["none"]
    assert kept["full"] < kept["mla"]
