"""The shipped configurations: their totals and KV caches are the published ones, and presets have their stated size.

`WEIGHTS` are from listings of every tensor of the published checkpoints (each config's `_source`), not from this code.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from mla_tune.arch.build import architecture
from mla_tune.arch.site import Architecture
from mla_tune.resources import CONFIGS, model_names, preset_names
from tests.helpers.marks import fast_cases

#: Parameters as published, in billions, and the relative difference that rounding allows.
PUBLISHED = {
    "deepseek-v2-lite": (15.7, 0.003),
    "deepseek-v2": (235.7, 0.001),
    "deepseek-v3": (671.0, 0.001),
    "kimi-k2": (1030.0, 0.005),
    "minicpm3-4b": (4.07, 0.002),
    "glm-4.7-flash": (29.9, 0.002),
    "longcat-flash": (560.0, 0.002),
    # The figure in the name or the model card.
    "a.x-k1": (519.0, 0.001),
    "deepseek-v3.2": (671.0, 0.002),  # V3 and the indexers
    "glm-5": (744.0, 0.001),
    "glm-5.2": (744.0, 0.002),
    "kimi-k2.5": (1030.0, 0.005),
    "kimi-linear-48b-a3b": (48.0, 0.03),
    "mistral-large-4": (1000.0, 0.06),
    "mistral-small-4": (119.0, 0.001),
    "moonlight-16b-a3b": (16.0, 0.005),
    "youtu-llm-2b": (2.0, 0.02),
}
#: Models whose size is not published: their totals are compared with those of transformers' models only.
UNPUBLISHED = {"a.x-k2-light", "dots3-note-preview", "glm-5.3-flash", "hy4-preview", "ling-3.0-flash"}

#: Parameters in the checkpoint, without those that transformers does not instantiate.
WEIGHTS = {
    "deepseek-v2-lite": 15_706_484_224,
    # All 48 layers, minus MTP layer 47 (attention, experts, shared expert, router, projection, embedding and head, five
    # norms), minus the correction bias (64) of each of 47 routers.
    "glm-4.7-flash": 31_221_488_576
    - (768 * 2048 + 5120 * 768 + 576 * 2048 + 8960 * 512 + 2048 * 5120 + 768 + 512)
    - (64 + 1) * 3 * 1536 * 2048
    - 64 * 2048
    - 2048 * 4096
    - 2 * 154880 * 2048
    - 5 * 2048
    - 47 * 64,
}


def kv(layers: int, H: int, P: int, R: int, V: int, C: int) -> tuple[int, int]:
    """Return the latent and expanded bytes per token, from published sizes."""
    return layers * (C + R) * 2, layers * H * (P + R + V) * 2


#: KV cache in bfloat16, bytes per token: (latent, expanded).
KV_BYTES = {
    "deepseek-v2-lite": (31_104, 276_480),
    "deepseek-v2": (69_120, 4_915_200),
    "deepseek-v3": (70_272, 4_997_120),
    "kimi-k2": (70_272, 2_498_560),
    "minicpm3-4b": (35_712, 793_600),
    "glm-4.7-flash": (54_144, 962_560),
    "longcat-flash": (64_512, 2_293_760),
    "a.x-k1": kv(61, 64, 128, 64, 128, 512),
    "a.x-k2-light": kv(48, 32, 64, 32, 64, 128),
    "deepseek-v3.2": kv(61, 128, 128, 64, 128, 512),
    # 13 layers with full attention and 33 with a window, which have other sizes.
    "dots3-note-preview": tuple(
        a + b for a, b in zip(kv(13, 128, 128, 64, 128, 512), kv(33, 64, 192, 64, 128, 1024), strict=True)
    ),
    "glm-5": kv(78, 64, 192, 64, 256, 512),
    "glm-5.2": kv(78, 64, 192, 64, 256, 512),
    "glm-5.3-flash": kv(11, 64, 256, 0, 256, 512),  # of 45 layers
    "hy4-preview": kv(34, 32, 192, 64, 256, 512),
    "kimi-k2.5": kv(61, 64, 128, 64, 128, 512),
    "kimi-linear-48b-a3b": kv(7, 32, 128, 64, 128, 512),  # of 27 layers
    "ling-3.0-flash": kv(7, 32, 128, 64, 128, 512),  # of 42 layers
    # Every fourth of 72 layers has no rope: it caches the latent (512) only, and its keys are as wide as the others'.
    "mistral-large-4": (
        kv(54, 64, 64, 64, 128, 512)[0] + 18 * 512 * 2,
        kv(72, 64, 64, 64, 128, 512)[1],
    ),
    "mistral-small-4": kv(36, 32, 64, 64, 128, 256),
    "moonlight-16b-a3b": kv(27, 16, 128, 64, 128, 512),
    "youtu-llm-2b": kv(32, 16, 128, 64, 128, 512),
}

#: Parameters that each preset should have, in millions, and the relative tolerance.
PRESETS = {"tiny": (1.0, 0.1), "small": (30.0, 0.1), "base": (150.0, 0.1)}


def config(folder: str, name: str) -> dict:
    return json.loads((CONFIGS / folder / f"{name}.json").read_text(encoding="utf-8"))


def arch(name: str, folder: str = "models") -> Architecture:
    return architecture(config(folder, name), name)


def instantiated(config: dict) -> int:
    """Count the parameters of the model that transformers builds, without allocating them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    built = AutoConfig.for_model(**config)
    wrapped = "text_config" in config or config["model_type"] == "mistral4"
    auto = AutoModelForImageTextToText if wrapped else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(built)
    return sum(p.numel() for p in model.parameters())


def test_every_listed_model_ships() -> None:
    assert set(model_names()) == set(PUBLISHED) | UNPUBLISHED == set(KV_BYTES)


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_total_is_the_published_one(name: str, published: tuple[float, float]) -> None:
    billions, tolerance = published
    assert arch(name).params_total / 1e9 == pytest.approx(billions, rel=tolerance)


@pytest.mark.parametrize(("name", "weights"), WEIGHTS.items())
def test_total_is_that_of_the_checkpoint(name: str, weights: int) -> None:
    assert arch(name).params_total == weights


#: transformers allocates weights for LongCat's identity experts, does not know kimi_k2, and builds the tower of dots3,
#: whose layout mla-tune does not know.
COUNTED_DIFFERENTLY = ("longcat-flash", "kimi-k2", "dots3-note-preview")


@fast_cases("deepseek-v3", "kimi-k2.5", "minicpm3*")
@pytest.mark.parametrize("name", sorted({*PUBLISHED, *UNPUBLISHED} - set(COUNTED_DIFFERENTLY)))
def test_total_is_what_transformers_builds(name: str) -> None:
    assert arch(name).params_total == instantiated({k: v for k, v in config("models", name).items() if k != "_source"})


@pytest.mark.parametrize(("name", "expected"), KV_BYTES.items())
def test_kv_cache(name: str, expected: tuple[int, int]) -> None:
    assert arch(name).kv_bytes("bfloat16") == expected


@pytest.mark.parametrize("name", KV_BYTES)
def test_every_published_config_says_where_it_is_from(name: str) -> None:
    assert "accessed 2026-11" in config("models", name)["_source"]


def test_facts_that_engines_need() -> None:
    v3 = config("models", "deepseek-v3")
    assert (v3["topk_method"], v3["scoring_func"]) == ("noaux_tc", "sigmoid")
    assert v3["quantization_config"]["weight_block_size"] == [128, 128]
    assert arch("deepseek-v3").mtp_layers == arch("glm-4.7-flash").mtp_layers == 1
    assert arch("minicpm3-4b").tied


@pytest.mark.parametrize(("name", "size"), PRESETS.items())
def test_preset_has_its_size(name: str, size: tuple[float, float]) -> None:
    millions, tolerance = size
    total = arch(name, "presets").params_total
    assert total / 1e6 == pytest.approx(millions, rel=tolerance)
    assert total == instantiated(config("presets", name))


@pytest.mark.parametrize("name", PRESETS)
def test_preset_fits_the_embedded_tokenizer_and_the_engines(name: str) -> None:
    c, d = config("presets", name), arch(name, "presets").dims
    assert (c["vocab_size"], c["max_position_embeddings"], c["tie_word_embeddings"]) == (4096, 2048, False)
    assert (c["bos_token_id"], c["eos_token_id"], c["pad_token_id"]) == (0, 1, 2)
    assert (c["topk_method"], c["scoring_func"], c["n_group"]) == ("noaux_tc", "sigmoid", 1)
    assert c["num_nextn_predict_layers"] == 0
    assert d.P + d.R in (64, 96, 128)


@pytest.mark.parametrize("name", PRESETS)
def test_no_two_sizes_of_a_preset_are_equal(name: str) -> None:
    d = arch(name, "presets").dims
    sizes = (d.H, d.P, d.R, d.V, d.C, d.L, d.D)
    assert len(set(sizes)) == len(sizes), "equal sizes would hide a transposed matrix"


def test_the_page_of_families_is_current() -> None:
    script = Path(__file__).parents[2] / "scripts" / "make_families_doc.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_preset_of_the_recipe_schema_ships() -> None:
    from mla_tune.recipe.schema import ModelSection

    allowed = {
        name for part in get_args(ModelSection.model_fields["preset"].annotation) for name in get_args(part) if name
    }
    assert allowed == set(PRESETS) <= set(preset_names())
