"""Adapters to merge: settings for PEFT's LoraConfig, by the name of the case."""

from __future__ import annotations

from typing import Any

ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
DENSE_AND_SHARED = [
    f"{mlp}.{name}.weight"
    for mlp in ("layers.0.mlp", "mlp.shared_experts")
    for name in ("gate_proj", "up_proj", "down_proj")
]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
#: Patterns as PEFT matches them: on the module's path, and with `.weight` where a parameter was targeted.
PATTERNS = {
    "rank_pattern": {
        "o_proj": 5,
        r"layers\.1\..*kv_b_proj": 2,
        "mlp.experts.gate_up_proj": 4,
        "shared_experts.up_proj.weight": 6,
    },
    "alpha_pattern": {
        "kv_b_proj": 11,
        "mlp.experts.down_proj": 3,
        "layers.0.mlp.gate_proj.weight": 9,
        "o_proj.weight": 99,
    },
}
V3: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ATTENTION},
    "rslora": {"target_modules": ATTENTION, "target_parameters": EXPERTS, "use_rslora": True},
    "dora": {"target_modules": ATTENTION, "use_dora": True},
    "dora with rslora's scale": {"target_modules": ["kv_b_proj"], "use_dora": True, "use_rslora": True},
    "dense and shared": {"target_modules": ["o_proj"], "target_parameters": DENSE_AND_SHARED},
    "experts": {"target_parameters": EXPERTS},
    "gate_up alone": {"target_parameters": EXPERTS[:1]},
    "down alone": {"target_parameters": EXPERTS[1:]},
    "gate_up in one layer alone": {"target_parameters": ["layers.1.mlp.experts.gate_up_proj", EXPERTS[1]]},
    "patterns": {"target_modules": ATTENTION, "target_parameters": DENSE_AND_SHARED + EXPERTS, **PATTERNS},
    "patterns with rslora": {
        "target_modules": ATTENTION,
        "target_parameters": DENSE_AND_SHARED + EXPERTS,
        "use_rslora": True,
        **PATTERNS,
    },
    "all-linear, router too": {"target_modules": "all-linear"},
    "lm_head": {"target_modules": ["lm_head", "kv_b_proj"]},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: ("deepseek_v3", settings) for name, settings in V3.items()},
    "v2": ("deepseek_v2", {"target_modules": ["q_proj", "kv_b_proj", "o_proj"], "target_parameters": EXPERTS}),
    "v2 dora": ("deepseek_v2", {"target_modules": ["q_proj", "kv_a_proj_with_mqa"], "use_dora": True}),
    "minicpm3": ("minicpm3", {"target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]}),
    "minicpm3 dora": ("minicpm3", {"target_modules": ["kv_b_proj", "down_proj"], "use_dora": True}),
    "longcat": (
        "longcat_flash",
        {
            "target_modules": ATTENTION,
            "target_parameters": [*EXPERTS, "mlps.0.gate_proj.weight", "mlps.1.down_proj.weight"],
        },
    ),
}
