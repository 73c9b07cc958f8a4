"""Wrappers: models around an MLA text model (vision, audio), where the text model is, and what else they hold.

Where a tower's layout is known it is listed matrix by matrix, so that totals are those of the whole model.  Where it is
not, totals are those of the text model, and `inspect` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from mla_tune.arch.key_mapping import Renames
from mla_tune.arch.parts import Part
from mla_tune.arch.roles import Role

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Tower:
    """The weights of a vision tower and its projector."""

    parts: tuple[Part, ...]
    """The weights, by their paths in the whole model; a path with `{i}` stands for one weight of each block."""
    blocks_key: str
    """The key of `vision_config` with the number of blocks."""
    letters: Mapping[str, str]
    """Letter of a size → its key in `vision_config`, or with a dot in front its key at the top level."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """transformers' values for keys that a config.json may leave out."""


@dataclass(frozen=True, slots=True)
class Wrapper:
    """One model type around a text model."""

    model_type: str
    """`model_type` at the top level of config.json."""
    title: str
    """The name that people use."""
    tower: Tower | None
    """The vision tower; None if its layout is not known."""
    text_model_type: str | None = None
    """The text model's type where config.json does not give it; None: it always does."""
    is_flat: bool = False
    """Whether published files have the text model's keys at the top level, not in `text_config`."""
    tied: bool = False
    """transformers' default for `tie_word_embeddings`, which it reads from the top level."""
    key_variants: tuple[Renames, ...] = ((),)
    """How checkpoints name the whole model's parameters; applied after the family's renames (`KeyMapping.variants`)."""
    prefix: str = "model.language_model"
    """Path of the decoder in what transformers loads: a causal LM if it has one, else the model with its towers."""


def _matrix(path: str, *shape: str, bias: bool = False, is_parameter: bool = False) -> Part:
    return Part(path, shape, Role.TOWER, bias, is_parameter)


_PROJECTOR = (
    Part("model.multi_modal_projector.norm", ("W",)),
    _matrix("model.multi_modal_projector.patch_merger.merging_layer", "W", "W*m*m"),
    _matrix("model.multi_modal_projector.linear_1", "D", "W*n"),
    _matrix("model.multi_modal_projector.linear_2", "D", "D"),
)
_PIXTRAL = Tower(
    (
        _matrix("model.vision_tower.patch_conv", "W", "3*p*p"),
        Part("model.vision_tower.ln_pre", ("W",)),
        *(
            _matrix(f"model.vision_tower.transformer.layers.{{i}}.attention.{name}", "W", "W")
            for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        ),
        _matrix("model.vision_tower.transformer.layers.{i}.feed_forward.gate_proj", "J", "W"),
        _matrix("model.vision_tower.transformer.layers.{i}.feed_forward.up_proj", "J", "W"),
        _matrix("model.vision_tower.transformer.layers.{i}.feed_forward.down_proj", "W", "J"),
        Part("model.vision_tower.transformer.layers.{i}.attention_norm", ("W",)),
        Part("model.vision_tower.transformer.layers.{i}.ffn_norm", ("W",)),
        *_PROJECTOR,
    ),
    "num_hidden_layers",
    {"W": "hidden_size", "J": "intermediate_size", "p": "patch_size", "m": ".spatial_merge_size", "n": ".n_features"},
    {"patch_size": 16, ".spatial_merge_size": 2, ".n_features": 1},
)
_KIMI = Tower(
    (
        _matrix("model.vision_tower.patch_embed.proj", "W", "3*p*p", bias=True),
        _matrix("model.vision_tower.patch_embed.pos_emb.position_embeddings", "h*w", "W", is_parameter=True),
        *(
            _matrix(f"model.vision_tower.layers.{{i}}.attn.{name}", "W", "W", bias=True)
            for name in ("q_proj", "k_proj", "v_proj", "proj")
        ),
        _matrix("model.vision_tower.layers.{i}.mlp.fc1", "J", "W", bias=True),
        _matrix("model.vision_tower.layers.{i}.mlp.fc2", "W", "J", bias=True),
        Part("model.vision_tower.layers.{i}.norm1", ("2*W",)),
        Part("model.vision_tower.layers.{i}.norm2", ("2*W",)),
        Part("model.vision_tower.final_layernorm", ("2*W",)),
        Part("model.mm_projector.pre_norm", ("2*x",)),
        _matrix("model.mm_projector.in_proj", "W*m", "W*m", bias=True),
        _matrix("model.mm_projector.out_proj", "D", "W*m", bias=True),
    ),
    "num_hidden_layers",
    {
        "W": "hidden_size", "J": "intermediate_size", "p": "patch_size", "h": "pos_emb_height", "w": "pos_emb_width",
        "m": "merge_kernel_size", "x": ".projection_hidden_size",
    },
    {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "patch_size": 14,
        "pos_emb_height": 64, "pos_emb_width": 64, "merge_kernel_size": [2, 2], ".projection_hidden_size": 1152,
    },
)  # fmt: skip
_GLM5 = Tower(
    (
        _matrix("model.visual.patch_embed.proj", "W", "3*t*p*p", bias=True),
        _matrix("model.visual.blocks.{i}.attn.qkv", "3*W", "W", bias=True),
        _matrix("model.visual.blocks.{i}.attn.proj", "W", "W", bias=True),
        Part("model.visual.blocks.{i}.attn.q_norm", ("q",)),
        Part("model.visual.blocks.{i}.attn.k_norm", ("q",)),
        _matrix("model.visual.blocks.{i}.mlp.gate_proj", "J", "W", bias=True),
        _matrix("model.visual.blocks.{i}.mlp.up_proj", "J", "W", bias=True),
        _matrix("model.visual.blocks.{i}.mlp.down_proj", "W", "J", bias=True),
        Part("model.visual.blocks.{i}.norm1", ("W",)),
        Part("model.visual.blocks.{i}.norm2", ("W",)),
        _matrix("model.visual.merger.proj", "O", "O"),
        Part("model.visual.merger.post_projection_norm", ("2*O",)),
        _matrix("model.visual.merger.gate_proj", "x", "O"),
        _matrix("model.visual.merger.up_proj", "x", "O"),
        _matrix("model.visual.merger.down_proj", "O", "x"),
        _matrix("model.visual.downsample", "O", "W*m*m", bias=True),
        Part("model.visual.post_layernorm", ("W",)),
    ),
    "depth",
    {
        "W": "hidden_size", "J": "intermediate_size", "p": "patch_size", "t": "temporal_patch_size",
        "O": "out_hidden_size", "x": "projection_intermediate_size", "m": "spatial_merge_size", "q": "head_size",
    },
    {
        "depth": 24, "hidden_size": 1024, "num_heads": 16, "intermediate_size": 4096, "patch_size": 14,
        "temporal_patch_size": 2, "out_hidden_size": 1536, "projection_intermediate_size": 10240,
        "spatial_merge_size": 2,
    },
)  # fmt: skip

#: LLaVA's names on disk: `language_model.model.…`.
_LLAVA: Renames = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\b", "language_model.lm_head"),
    (r"^model\.(vision_tower|multi_modal_projector)\b", r"\1"),
)
_KIMI_TOWER: Renames = (
    (r"^model\.vision_tower\.layers\.(\d+)\.", r"vision_tower.encoder.blocks.\1."),
    (r"^model\.vision_tower\b", "vision_tower"),
)

WRAPPERS: dict[str, Wrapper] = {
    w.model_type: w
    for w in (
        # transformers loads this one as a causal LM, without its towers.
        Wrapper("dots3_note", "dots3 Note", None, "dots3_note_text", is_flat=True, prefix="model"),
        Wrapper("glm5_next", "GLM-5.3-Flash", _GLM5, "glm5_next_text", is_flat=True),
        Wrapper("kimi_k25", "Kimi K2.5", _KIMI, "deepseek_v3", tied=True,
                key_variants=(
                    _LLAVA,
                    # what transformers writes
                    (*_LLAVA, (r"^language_model\.model\.layers\.", "language_model.model.blocks.")),
                )),
        Wrapper("llava", "LLaVA", None, key_variants=(_LLAVA,)),
        Wrapper("mistral3", "Mistral 3", _PIXTRAL, tied=True, key_variants=(_LLAVA,)),
        Wrapper("mistral_large4", "Mistral Large 4", _PIXTRAL, "mistral_large4_text"),
    )
}  # fmt: skip


def unwrap(config: Config) -> tuple[Config, str | None, Wrapper | None]:
    """Return (the text model's part of a config.json, its model type, the wrapper around it).

    The type is None if config.json has none; the wrapper is None for a plain text model.  A text model inside a model
    type that is not in `WRAPPERS` is not unwrapped.
    """
    kind = config.get("model_type")
    wrapper = WRAPPERS.get(str(kind))
    text = config.get("text_config")
    if wrapper is None:
        return config, str(kind) if kind else None, None
    if isinstance(text, Mapping):
        return text, str(text.get("model_type") or wrapper.text_model_type), wrapper
    if not wrapper.is_flat:
        return config, str(kind), None
    # A flat file, with or without towers; the config.json of the text model alone would have the text model's type.
    return config, wrapper.text_model_type, wrapper


def tower_parts(wrapper: Wrapper, config: Config, D: int) -> tuple[list[tuple[Part, str]], dict[str, int]]:
    """Return (each weight of the tower with its path, sizes by letter); nothing if its layout is not known.

    `config` is the whole config.json, `D` the text model's hidden size.
    """
    tower = wrapper.tower
    if tower is None:
        return [], {}
    vision = config.get("vision_config") or {}

    def value(key: str) -> int:
        found = config.get(key[1:]) if key.startswith(".") else vision.get(key)
        if found is None:  # names of Kimi K2.5 as it was published
            found = next((vision[n] for n in (f"vt_{key}", f"init_{key}") if n in vision), None)
        found = tower.defaults.get(key) if found is None else found
        if key == ".n_features":
            layers = config.get("vision_feature_layer", -1)
            return len(layers) if isinstance(layers, list) else 1
        if key == "head_size":
            return value("hidden_size") // value("num_heads")
        return prod(found) if isinstance(found, list | tuple) else int(found or 0)

    letters = {letter: value(key) for letter, key in tower.letters.items()} | {"D": D}
    parts = []
    for part in tower.parts:
        repeats = range(value(tower.blocks_key)) if "{i}" in part.path else (0,)
        parts += [(part, part.path.replace("{i}", str(i))) for i in repeats]
    return parts, letters
