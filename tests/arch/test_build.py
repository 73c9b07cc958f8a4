"""Architectures from config.json, compared with every weight of the tiny model that transformers builds from it."""

from __future__ import annotations

import pytest

from mla_tune.arch.build import architecture
from mla_tune.arch.roles import FACTS, GROUPS, Role
from mla_tune.arch.site import Architecture
from mla_tune.errors import InputError, NotMLAError
from tests.helpers.arch_configs import LONGCAT, TINY, Config
from tests.helpers.tiny_families import FAMILIES


def parameters(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter, by name, of the model that transformers builds from `config`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def size(shape: tuple[int, ...]) -> int:
    n = 1
    for d in shape:
        n *= d
    return n


def idle_experts(arch: Architecture, config: Config) -> int:
    """Return the number of parameters that transformers allocates for LongCat's identity experts, which use none.

    Its gate_up_proj has n_routed_experts + zero_expert_num entries, its down_proj n_routed_experts (transformers 5.23).
    Checkpoints hold nothing for identity experts, so `architecture` counts nothing for them.
    """
    gate_up = arch.by_role(Role.EXPERTS_GATE_UP)
    return sum(config.get("zero_expert_num", 0) * s.shape[0] * s.shape[1] for s in gate_up)


@pytest.mark.parametrize("name", TINY)
def test_sites_are_the_models_weights(name: str) -> None:
    config = TINY[name]
    arch, real = architecture(config), parameters(config)
    if arch.tied:
        real["lm_head.weight"] = real["model.embed_tokens.weight"]  # named_parameters lists a shared weight once
    for site in arch:
        expected = (site.count, *site.shape) if site.is_experts else site.shape
        if site.role == Role.EXPERTS_GATE_UP and config["model_type"] == "longcat_flash":
            expected = (site.count + config["zero_expert_num"], *site.shape)
        assert real.pop(site.parameter) == expected, site.path
        assert (real.pop(f"{site.path}.bias", None) is not None) == site.bias, site.path
    without_site = {n for n in real if "norm" not in n}
    assert without_site == {"model.embed_tokens.weight"}


@pytest.mark.parametrize("name", TINY)
def test_total_is_the_models(name: str) -> None:
    config = TINY[name]
    arch = architecture(config)
    assert arch.params_total + idle_experts(arch, config) == sum(map(size, parameters(config).values()))


@pytest.mark.parametrize("name", TINY)
def test_attention_modules_are_those_with_a_latent_cache(name: str) -> None:
    paths = {n.removesuffix(".kv_b_proj.weight") for n in parameters(TINY[name]) if n.endswith(".kv_b_proj.weight")}
    assert set(architecture(TINY[name]).attention_paths) == paths


def test_kv_bytes() -> None:
    latent, expanded = architecture(TINY["deepseek_v3"]).kv_bytes("float32")
    assert latent == 3 * (14 + 8) * 4  # layers × (C + R) × bytes
    assert expanded == 3 * 3 * (10 + 8 + 12) * 4  # layers × H × (P + R + V) × bytes
    longcat = architecture(LONGCAT)
    assert longcat.kv_bytes("bfloat16")[0] == 2 * 2 * (14 + 8) * 2  # two attentions a layer


def test_active_parameters_are_without_those_of_experts_that_a_token_does_not_go_to() -> None:
    arch = architecture(TINY["deepseek_v3"])
    expert = 3 * 22 * 36
    assert arch.active_params == arch.params_total - 2 * (6 - 2) * expert  # 2 MoE layers, 2 of 6 experts a token


def test_lora_parameters_of_a_fused_stack_count_every_expert() -> None:
    [gate_up, *_] = architecture(TINY["deepseek_v3"]).by_role(Role.EXPERTS_GATE_UP)
    assert gate_up.lora_params(4) == 6 * 4 * (2 * 22 + 36)


def test_each_expert_has_disk_keys_of_its_own() -> None:
    arch = architecture(TINY["deepseek_v3"])
    [gate_up, *_], [down, *_] = arch.by_role(Role.EXPERTS_GATE_UP), arch.by_role(Role.EXPERTS_DOWN)
    assert gate_up.disk_keys()[:2] == [
        "model.layers.1.mlp.experts.0.gate_proj.weight",
        "model.layers.1.mlp.experts.0.up_proj.weight",
    ]
    assert len(gate_up.disk_keys()) == 12
    assert down.disk_keys()[-1] == "model.layers.1.mlp.experts.5.down_proj.weight"


def test_matrices_that_can_not_be_adapted_have_a_reason() -> None:
    for config in TINY.values():
        not_attachable = [s for s in architecture(config) if not s.attachable]
        assert {s.role for s in not_attachable} <= {Role.ROUTER, Role.LM_HEAD}
        assert all(s.reason for s in not_attachable)
    assert "tied" in architecture(TINY["minicpm3"]).by_role(Role.LM_HEAD)[0].reason


def test_every_role_has_facts_and_every_group_has_roles() -> None:
    assert set(FACTS) == set(Role)
    assert all(GROUPS.values())


def test_longcats_published_file_is_recognized_without_a_model_type() -> None:
    config = {k: v for k, v in LONGCAT.items() if k != "model_type"} | {"architectures": ["LongcatFlashForCausalLM"]}
    assert architecture(config).model_type == "longcat_flash"


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8}, "grouped-query attention"),
        ({"model_type": "gpt2", "num_attention_heads": 12}, "multi-head attention with 12 heads"),
        ({"model_type": "deepseek_v4", "num_attention_heads": 64, "num_key_value_heads": 1}, "multi-query attention"),
    ],
)
def test_a_model_without_mla_is_named_for_what_it_is(config: Config, what: str) -> None:
    with pytest.raises(NotMLAError, match=what):
        architecture(config, "there")


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({}, "no 'model_type'"),
        ({"model_type": "axk9", "kv_lora_rank": 8}, "layout is not known and it has no 'hidden_size'"),
        ({"model_type": "kimi_vl9", "text_config": {"model_type": "kimi_k2", "kv_lora_rank": 8}}, "wrapper"),
        ({"model_type": "kimi_k25", "text_config": {"model_type": "kimi_k2", "kv_lora_rank": 8}}, "is missing"),
        ({**TINY["deepseek_v3"], "vocab_size": None}, "'vocab_size' is missing"),
        ({**TINY["deepseek_v3"], "q_lora_rank": 1.5}, "'q_lora_rank' is 1.5"),
        ({**TINY["deepseek_v3"], "hidden_size": True}, "'hidden_size' is True"),
    ],
)
def test_a_config_that_cant_be_used_says_what_is_wrong(config: Config, what: str) -> None:
    with pytest.raises(InputError, match=what) as error:
        architecture(config, "there")
    assert str(error.value).startswith("there: ")


@pytest.mark.parametrize("key", ["no_rope_layers", "kv_source_layers"])
def test_a_list_with_too_few_entries_for_the_layers_is_refused(key: str) -> None:
    config = FAMILIES["mistral_large4"]
    text = {**config["text_config"], key: [0]}
    with pytest.raises(
        InputError, match=r"there: a list that has an entry for each layer has 1 entries, and there are"
    ):
        architecture({**config, "text_config": text}, "there")


def test_too_short_a_moe_layer_freq_is_refused() -> None:
    config = next(c for c in FAMILIES.values() if c["model_type"] == "glm_moe_dsa")
    flags = {k: v for k, v in config.items() if k != "mlp_layer_types"} | {"moe_layer_freq": [1]}
    with pytest.raises(InputError, match="has 1 entries"):
        architecture(flags, "there")
