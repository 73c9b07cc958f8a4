"""Which bases can stay quantized in memory: `QUANTIZED_BASES` has an entry under the name of the format on disk."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mla_tune.checkpoint.quantized.config import format_in_memory
from mla_tune.errors import InputError
from mla_tune.sockets import QUANT_FORMATS, QUANTIZED_BASES

WHERE = Path("config.json")
#: A format with just the attributes that are read before any weight is.
TOY: Any = SimpleNamespace(
    name="toy-int8",
    title="INT8",
    kind="int8",
    understood="toys",
    claims=lambda quant: quant["quant_method"] == "toy",
    check_config=lambda config, where: None,
)


def test_the_format_on_disk_counts_before_the_recipe() -> None:
    fp8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    assert format_in_memory(fp8, "nf4", WHERE) == "fp8-block"
    assert format_in_memory({}, "nf4", WHERE) == "nf4"


def test_a_format_that_models_cannot_keep_is_refused_by_name_until_an_entry_is_registered() -> None:
    toy = {"quantization_config": {"quant_method": "toy"}}
    with QUANT_FORMATS.registered("toy-int8", TOY):
        with pytest.raises(InputError, match="INT8 can be merged into, but a model can't keep them in memory"):
            format_in_memory(toy, "none", WHERE)
        with QUANTIZED_BASES.registered("toy-int8", QUANTIZED_BASES.get("nf4")):
            assert format_in_memory(toy, "none", WHERE) == "toy-int8"
    with pytest.raises(InputError, match="quant_method is 'toy'"):
        format_in_memory(toy, "none", WHERE)


def test_formats_of_several_kinds_do_not_stay_in_memory_side_by_side() -> None:
    both = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    claims_all = SimpleNamespace(**vars(TOY) | {"claims": lambda quant: True})
    loader = QUANTIZED_BASES.get("fp8-block")
    with QUANT_FORMATS.registered("toy-int8", claims_all):  # type: ignore[arg-type]
        with pytest.raises(InputError, match="weights in INT8 can be merged into, but a model can't keep them"):
            format_in_memory(both, "none", WHERE)
        with (
            QUANTIZED_BASES.registered("toy-int8", loader),
            pytest.raises(InputError, match="weights are in FP8 and INT8, which a model can't keep in memory side by"),
        ):
            format_in_memory(both, "none", WHERE)
        claims_all.kind = "fp8"
        with QUANTIZED_BASES.registered("toy-int8", loader):
            assert format_in_memory(both, "none", WHERE) == "fp8-block"


def test_every_fp8_format_on_disk_and_nf4_have_an_entry() -> None:
    assert {name for name in QUANT_FORMATS if name.startswith("fp8")} | {"nf4"} == set(QUANTIZED_BASES)
