"""LoRA by factors against PEFT's own forward: outputs, losses, gradients, and every state that an adapter can be in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model

from mla_tune.adapter.peft_config import peft_config
from mla_tune.adapter.placement import place
from mla_tune.arch.build import architecture
from mla_tune.recipe.schema import AdapterSection
from mla_tune.training.kernels.lora_linear import use_lora_factors
from tests.helpers.tiny_families import tiny, vocabulary

FAMILIES = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "longcat_flash")


def pair(family: str, dtype: torch.dtype = torch.float32, **keys: Any) -> tuple[Any, Any, int]:
    """The same adapter, away from zero, with the forward by factors and with PEFT's; and how many were replaced."""
    torch.manual_seed(0)
    models = []
    for _ in range(2):
        base = tiny(family).to(dtype)
        arch = architecture(base.config.to_dict())
        section = AdapterSection(**{"targets": "all-linear", "rank": 3, "alpha": 5, **keys})
        torch.manual_seed(1)
        net: Any = get_peft_model(base, peft_config(arch, place(arch, section)))
        models.append(net)
    ours, theirs = models
    theirs.load_state_dict(ours.state_dict())
    generator = torch.Generator().manual_seed(2)
    values = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
                values[name].copy_(p)
    return ours.train(), theirs.train(), use_lora_factors(ours)


def ids(family: str) -> torch.Tensor:
    return torch.randint(3, vocabulary(family), (2, 12), generator=torch.Generator().manual_seed(3))


def step(model: Any, x: torch.Tensor, autocast: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(4)  # dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=x, labels=x, use_cache=False).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: Any, theirs: Any, within: float) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=within)
    assert ours[1].keys() == theirs[1].keys()
    for name, wanted in theirs[1].items():
        assert torch.linalg.norm(ours[1][name] - wanted) <= within * torch.linalg.norm(wanted) + 1e-12, name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_losses_and_gradients(family: str, method: str) -> None:
    ours, theirs, count = pair(family, method=method)
    assert count > 0
    assert_same(step(ours, ids(family)), step(theirs, ids(family)), 2e-5)


def test_routed_experts_with_a_rank_of_their_own() -> None:
    ours, theirs, _ = pair("deepseek_v3", experts=True, roles={"experts": {"rank": 1, "alpha": 7}})
    ranks = {n: p.shape for n, p in ours.named_parameters() if "experts" in n and "shared" not in n and ".lora_A" in n}
    assert ranks
    experts = ours.get_base_model().config.n_routed_experts
    assert all(shape[0] == experts for shape in ranks.values())
    assert_same(step(ours, ids("deepseek_v3")), step(theirs, ids("deepseek_v3")), 2e-5)


@pytest.mark.parametrize("keys", [{"method": "dora"}, {"dropout": 0.3}, {"method": "dora", "dropout": 0.3}], ids=str)
def test_dora_and_dropout_keep_pefts_forward(keys: dict[str, Any]) -> None:
    """Bit for bit, dropout's random numbers included."""
    ours, theirs, count = pair("deepseek_v3", targets="attention-only", **keys)
    assert count == 0
    found, wanted = step(ours, ids("deepseek_v3")), step(theirs, ids("deepseek_v3"))
    assert found[0] == wanted[0]
    assert all(torch.equal(found[1][n], g) for n, g in wanted[1].items())


def test_bfloat16_under_autocast_is_as_near_to_float32() -> None:
    family = "deepseek_v3"
    ours, theirs, _ = pair(family, torch.bfloat16)
    _, exact, _ = pair(family)
    truth = step(exact, ids(family))[1]

    def error(model: Any) -> float:
        found = step(model, ids(family), autocast=True)[1]
        assert {g.dtype for g in found.values()} == {torch.float32}
        far = sum(float((found[n].double() - g.double()).square().sum()) for n, g in truth.items())
        return (far / sum(float(g.double().square().sum()) for g in truth.values())) ** 0.5

    assert error(ours) <= 1.1 * error(theirs)


def test_states_of_an_adapter() -> None:
    """Disabled, merged, unmerged, in evaluation: as PEFT's."""
    family = "deepseek_v3"
    ours, theirs, _ = pair(family, targets="attention-only")
    x = ids(family)

    def same(message: str) -> None:
        with torch.no_grad():
            a, b = ours(input_ids=x).logits, theirs(input_ids=x).logits
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=message)

    same("training")
    with ours.disable_adapter(), theirs.disable_adapter():
        same("disabled")
    ours.eval()
    theirs.eval()
    same("evaluation")
    ours.merge_adapter()
    theirs.merge_adapter()
    same("merged")
    ours.unmerge_adapter()
    theirs.unmerge_adapter()
    same("unmerged")
    for model in (ours, theirs):
        model.add_adapter("second", model.peft_config["default"])
        model.set_adapter("second")
    second = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if ".second." in name:
                p.normal_()
                second[name].copy_(p)
    same("another adapter is active")


def test_a_planted_error_is_seen() -> None:
    """The comparison above is not blind to a wrong scale."""
    ours, theirs, _ = pair("deepseek_v3")
    for module in ours.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 1.01
    with pytest.raises(AssertionError):
        assert_same(step(ours, ids("deepseek_v3")), step(theirs, ids("deepseek_v3")), 2e-5)
