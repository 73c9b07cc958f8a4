"""What can be added without touching the rest: the tables of adapter methods, quantization formats and objectives.

A built-in entry is `"module:attribute"`: listing the names imports nothing, so a recipe's error can offer them at once.
`docs/extending.md` says what each entry must be, and the exact list of files that a new one touches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mla_tune.registry import Registry

if TYPE_CHECKING:
    from mla_tune.adapter.methods import AdapterMethod
    from mla_tune.checkpoint.quantized.base import QuantFormat
    from mla_tune.model.quantized_base import MakeConfig
    from mla_tune.training.objective import Objective

#: `adapter.method` of a recipe, and what adapter files are made of.
ADAPTER_METHODS: Registry[AdapterMethod] = Registry(
    "adapter method",
    {
        "lora": "mla_tune.adapter.methods:LORA",
        "rslora": "mla_tune.adapter.methods:RSLORA",
        "dora": "mla_tune.adapter.methods:DORA",
    },
)
#: How weights are stored in fewer bits in a checkpoint.
QUANT_FORMATS: Registry[QuantFormat] = Registry(
    "quantization format",
    {
        "fp8-block": "mla_tune.checkpoint.quantized.fp8:FP8_BLOCK",
        "fp8-tensor": "mla_tune.checkpoint.quantized.fp8:FP8_TENSOR",
    },
)
#: Formats of bases that stay quantized in memory while adapters are trained on them: those of `QUANT_FORMATS` that
#: models can compute with, under the same names, and `nf4`, whose codes are made when a plain checkpoint is read.
QUANTIZED_BASES: Registry[MakeConfig] = Registry(
    "format for a base that stays quantized in memory",
    {
        "fp8-block": "mla_tune.model.fp8:make_config",
        "fp8-tensor": "mla_tune.model.fp8:make_config",
        "nf4": "mla_tune.model.nf4:make_config",
    },
)
#: `train.objective` of a recipe: what a step minimizes.
OBJECTIVES: Registry[type[Objective]] = Registry(
    "objective",
    {
        "sft": "mla_tune.training.objectives.sft:SupervisedFineTuning",
    },
)
