"""Load the model of a recipe, or build a preset, and check it against its architecture."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from mla_tune.arch.build import architecture
from mla_tune.arch.dims import DTYPE_BYTES
from mla_tune.arch.site import Architecture
from mla_tune.checkpoint.index import Checkpoint
from mla_tune.checkpoint.quantized.config import FIELDS, format_in_memory, format_kind, quantization_field
from mla_tune.errors import CheckError, InputError
from mla_tune.model.auto import auto_class, set_experts
from mla_tune.model.quantized_base import attach_empty_weights
from mla_tune.model.quantized_linear import EXPERTS, QuantizedWeight, register_experts
from mla_tune.recipe.model_source import load_config
from mla_tune.recipe.schema import ModelSection
from mla_tune.resources import EMBEDDED_MODEL
from mla_tune.sockets import QUANTIZED_BASES
from mla_tune.user_files import read_json_object

#: `model.dtype` of a recipe → torch's dtype.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A loaded model, ready to be adapted."""

    model: PreTrainedModel
    """The model."""
    arch: Architecture
    """Its architecture, from config.json."""
    base: str | None
    """The base that an adapter records: a folder or a hub id; None for an untrained preset, which has no files yet."""
    device: torch.device
    """The device that it computes on."""
    dtype: str
    """The dtype of its unquantized weights, or of autocast where all weights are trained."""
    quantized: dict[str, Any] | None = None
    """For a base that stays quantized: `kind`, and counts of its `matrices`, `weights` and `bytes`; else None."""

    @property
    def lines(self) -> list[str]:
        """Lines for the log: how much of the base stays quantized."""
        if not self.quantized:
            return []
        q = self.quantized
        return [
            f"base kept in {q['kind']}: {q['matrices']:,} matrices, {q['bytes'] / 1e9:.3g} GB "
            f"({q['bytes'] / q['weights']:.3f} bytes a weight); everything else in {self.dtype}"
        ]


def silence_libraries() -> None:
    """Turn off log lines, progress bars and warnings of transformers, accelerate and torch.distributed."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for module in ("transformers", "accelerate", "torch.distributed"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    if not torch.cuda.is_available():
        # transformers imports DeepSpeed if it is installed, which prints on standard output that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def pick_device(name: str) -> torch.device:
    """The device for `model.device`: `auto` is a GPU where torch sees one.  Raises `InputError` for a missing GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("model.device: is cuda, but torch sees no GPU here; use auto or cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def pick_dtype(name: str, device: torch.device) -> str:
    """The dtype for `model.dtype`: `auto` is bfloat16 on a GPU that supports it, else float32."""
    if name != "auto":
        return name
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"


def pick_experts(name: str, arch: Architecture, itemsize: int) -> str | None:
    """transformers' implementation of the routed experts for `model.experts`.

    `auto` is eager where grouped_mm's kernel can't take the matrices, whose rows must be multiples of 16 bytes
    (`itemsize`: bytes of a number), else None: then transformers takes grouped_mm in the families that have it.
    """
    if name != "auto":
        return name
    unaligned = any(size * itemsize % 16 for site in arch.sites if site.is_experts for size in site.shape)
    return "eager" if unaligned else None


def load_model(
    section: ModelSection,
    *,
    seed: int = 0,
    full_precision: bool = False,
    allow_quantized: bool = False,
    move_to_device: bool = True,
    shapes_only: bool = False,
) -> Loaded:
    """Load the weights of `section`, or build its preset with weights drawn from `seed`.

    `full_precision`: keep the weights in float32 whatever the dtype is, which is then that of autocast (for training
    all weights).  `allow_quantized`: the caller supports weights that stay quantized (`quantized_linear`), those of an
    FP8 checkpoint, or NF4 where the section asks for it.  `move_to_device`: move the model to its device; a model that
    will be sharded stays in host memory.  `shapes_only`: build a quantized base without numbers, which another process
    reads.

    Raises `FileError`, `InputError` or `NotMLAError` before any weight is read, and `CheckError` where the model
    is not what its config.json describes.
    """
    config, where, folder = load_config(f"{section.preset}" if section.preset else section.base or "embedded")
    arch = architecture(config, where)
    quantized_format = None if section.preset else format_in_memory(config, section.quantize, where)
    kind = format_kind(quantized_format)
    if kind and not allow_quantized:
        raise InputError(f"{where}: the weights are quantized ({kind}), which only train works with; give a bf16 model")
    device = pick_device(section.device)
    dtype = pick_dtype(section.dtype, device)
    kwargs: dict[str, Any] = {
        "dtype": torch.float32 if full_precision else DTYPES[dtype],
        "attn_implementation": _attention(section, arch),
        "experts_implementation": pick_experts(section.experts, arch, 4 if full_precision else DTYPE_BYTES[dtype]),
    }
    if section.preset:
        cfg = AutoConfig.for_model(**config)
        torch.manual_seed(seed)
        model = auto_class(cfg).from_config(cfg, **kwargs)
        base = None
    else:
        base = str(EMBEDDED_MODEL) if section.base in (None, "embedded") else str(folder or section.base)
        if folder:
            Checkpoint.open(folder)  # names a damaged or missing file, before transformers stumbles over it
            if (folder / "generation_config.json").exists():
                read_json_object(folder / "generation_config.json", "the settings for sampling")  # raises if damaged
        hub = {"revision": section.revision} if section.revision and folder is None else {}
        kwargs |= {"trust_remote_code": section.trust_remote_code, **hub}
        if quantized_format:
            if folder is None and quantization_field(config):
                raise InputError(f"{base}: the weights are quantized ({kind}); download it and give its folder")
            model = _load_quantized(
                base,
                folder,
                arch,
                quantized_format,
                kwargs,
                device=device,
                move_to_device=move_to_device,
                shapes_only=shapes_only,
            )
        else:
            model = _from_pretrained(base, **kwargs)
    check_sites(model, arch)
    net: Any = model
    net = net.to(device) if move_to_device else net
    return Loaded(net, arch, base, device, dtype, _quantized_summary(net, kind) if kind else None)


def _attention(section: ModelSection, arch: Architecture) -> str:
    """The attention to load with; `auto` and `packed` are replaced after loading (`training.prepare_model`)."""
    if section.attention in ("auto", "packed"):
        return "eager" if arch.family.eager_only else "sdpa"
    return section.attention


def _from_pretrained(base: str, **kwargs: Any) -> PreTrainedModel:
    """Load with transformers.  Raises `CheckError` for missing weights, which transformers would draw at random."""
    options = {k: kwargs[k] for k in ("trust_remote_code", "revision") if k in kwargs}
    config = kwargs.get("config") or AutoConfig.from_pretrained(base, **options)
    loaded: Any = auto_class(config).from_pretrained(base, output_loading_info=True, **kwargs)
    model, info = loaded
    missing = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise CheckError(f"{base}: weights missing or of another shape, which would be random: {shown}")
    return model


def _quantized_summary(model: torch.nn.Module, kind: str) -> dict[str, Any]:
    """Count what stays quantized, for `Loaded.quantized`."""
    matrices = [m for m in model.modules() if isinstance(m, QuantizedWeight)]
    return {
        "kind": kind,
        "matrices": sum(math.prod(m.shape[:-2]) for m in matrices),
        "weights": sum(math.prod(m.shape) for m in matrices),
        "bytes": sum(m.nbytes for m in matrices),
    }


def _load_quantized(
    base: str,
    folder: Path | None,
    arch: Architecture,
    name: str,
    kwargs: dict[str, Any],
    *,
    device: torch.device,
    move_to_device: bool,
    shapes_only: bool,
) -> PreTrainedModel:
    """Load a model whose matrices stay quantized, onto `device` or (without `move_to_device`) into host memory.

    `name` is that of the format in `QUANTIZED_BASES`.
    """
    options = {k: kwargs[k] for k in ("trust_remote_code", "revision") if k in kwargs}
    config: Any = AutoConfig.from_pretrained(base, **options)
    # A base in host memory is quantized on the GPU all the same, which is much faster.
    scheme = QUANTIZED_BASES.get(name)(arch, folder, None if move_to_device else device)
    # With the checkpoint's own description, transformers would use its own quantized layers.
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for field in FIELDS:
            if hasattr(part, field):
                delattr(part, field)
    model: Any
    if shapes_only:
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            model = auto_class(config).from_config(config, **{k: v for k, v in kwargs.items() if k != "revision"})
        attach_empty_weights(model, scheme, kwargs["dtype"])
    else:
        where = device if move_to_device else torch.device("cpu")
        model = _from_pretrained(base, config=config, quantization_config=scheme, device_map={"": where}, **kwargs)
        # Other code should take it for a plain model: only its layers know that weights are quantized.
        model.hf_quantizer.remove_quantization_config(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._is_quantized = False
    if any(site.is_experts and site.parameter in scheme.parameters for site in arch):
        register_experts()
        set_experts(model, EXPERTS)
    return model


def check_sites(model: torch.nn.Module, arch: Architecture) -> None:
    """Check that every site of the architecture is in the model, with the expected shape.

    Raises `CheckError` where the family table and this version of transformers disagree.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    wrong = []
    for site in arch.sites:
        if site.path == "lm_head" and arch.tied:
            continue
        have = shapes.get(site.parameter)
        # A weight that no adapter can be on may have more dimensions: convolutions, positions of an image.
        same = have is not None and (
            have[-2:] == site.shape or (not site.attachable and math.prod(have) == math.prod(site.shape))
        )
        if not same:
            wrong.append(f"{site.parameter}: expected {site.shape}, found {have or 'nothing'}")
    if wrong:
        shown = "\n  ".join(wrong[:5])
        raise CheckError(f"the model differs from its config.json as mla-tune reads it:\n  {shown}")


def base_hash(base: str) -> dict[str, str]:
    """Identify a base by `kind` and `sha256`, as run.json records it.

    The digest is of the contents of all weight files and config.json (`files`); where these are more than 4 GB, of file
    sizes, safetensors headers and config.json (`headers`); and of the name for a hub id, which has no folder (`name`).
    """
    folder = Path(base)
    if not folder.is_dir():
        return {"kind": "name", "sha256": hashlib.sha256(base.encode()).hexdigest()}
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])
    hash_contents = sum(f.stat().st_size for f in files) <= 4e9
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as f:
            if not hash_contents and file.suffix == ".safetensors":
                digest.update(f.read(int.from_bytes(f.read(8), "little")))
                continue
            while block := f.read(1 << 24):
                digest.update(block)
    return {"kind": "files" if hash_contents else "headers", "sha256": digest.hexdigest()}
