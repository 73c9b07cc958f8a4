"""A recipe's model section → a transformers model with its architecture."""

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
from mla_tune.model.quantized_base import put_empty
from mla_tune.model.quantized_linear import EXPERTS, QuantizedWeight, register_experts
from mla_tune.recipe.model_source import load_config
from mla_tune.recipe.schema import ModelSection
from mla_tune.resources import EMBEDDED_MODEL
from mla_tune.sockets import QUANTIZED_BASES
from mla_tune.user_files import read_json_object

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to be adapted.  `base` is what an adapter records as its base: a folder or a hub id, or None for
    an untrained preset, whose weights exist nowhere else yet."""

    model: PreTrainedModel
    arch: Architecture
    base: str | None
    device: torch.device
    dtype: str
    quantized: dict[str, Any] | None = None

    @property
    def lines(self) -> list[str]:
        """What a user should know, for the log."""
        if not self.quantized:
            return []
        q = self.quantized
        return [
            f"base kept in {q['kind']}: {q['matrices']:,} matrices, {q['bytes'] / 1e9:.3g} GB "
            f"({q['bytes'] / q['weights']:.3f} bytes a weight); everything else in {self.dtype}"
        ]


def quiet() -> None:
    """Keep transformers' own chatter off standard error: mla-tune says itself what it does."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for module in ("transformers", "accelerate", "torch.distributed"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    if not torch.cuda.is_available():
        # Where DeepSpeed is installed transformers imports it, and it says on standard output that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def pick_device(name: str) -> torch.device:
    """`auto` is a GPU where torch sees one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("model.device: cuda was asked for, but torch sees no GPU here; use auto or cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def pick_dtype(name: str, device: torch.device) -> str:
    """`auto` is bfloat16 on a GPU that has it, else float32."""
    if name != "auto":
        return name
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"


def pick_experts(name: str, arch: Architecture, itemsize: int) -> str | None:
    """`auto` is eager where grouped_mm's kernel can't take these sizes (it wants rows of a multiple of 16 bytes), else
    None: transformers takes grouped_mm in the families that have it."""
    if name != "auto":
        return name
    odd = any(size * itemsize % 16 for site in arch.sites if site.is_experts for size in site.shape)
    return "eager" if odd else None


def load_model(
    section: ModelSection,
    *,
    seed: int = 0,
    full_precision: bool = False,
    quantized: bool = False,
    place: bool = True,
    empty: bool = False,
) -> Loaded:
    """Load weights, or build a preset with weights drawn from `seed`.

    `full_precision` keeps the weights in float32 whatever the dtype (all weights are trained then, and the dtype is
    that of autocast).  `quantized`: the caller can do with weights that stay quantized (`model.frozen`): those of an
    FP8 checkpoint, or NF4 where the section asks for it.  `place`: move the model to its device; one that is to be
    sharded stays where it was read.  `empty`: another process reads a quantized base, and here are its shapes.
    Raises `FileError`, `InputError` or `NotMLAError` before any weight is read.
    """
    config, where, folder = load_config(f"{section.preset}" if section.preset else section.base or "embedded")
    arch = architecture(config, where)
    quantized_format = None if section.preset else format_in_memory(config, section.quantize, where)
    kind = format_kind(quantized_format)
    if kind and not quantized:
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
            Checkpoint.open(folder)  # a damaged or missing file is named here, before transformers meets it
            if (folder / "generation_config.json").exists():
                read_json_object(folder / "generation_config.json", "the settings for sampling")
        hub = {"revision": section.revision} if section.revision and folder is None else {}
        kwargs |= {"trust_remote_code": section.trust_remote_code, **hub}
        if quantized_format:
            if folder is None and quantization_field(config):
                raise InputError(f"{base}: the weights are quantized ({kind}); download it and give its folder")
            model = _quantized(base, folder, arch, quantized_format, kwargs, device=device, place=place, empty=empty)
        else:
            model = _from_pretrained(base, **kwargs)
    check_sites(model, arch)
    net: Any = model
    net = net.to(device) if place else net
    return Loaded(net, arch, base, device, dtype, _summary(net, kind) if kind else None)


def _attention(section: ModelSection, arch: Architecture) -> str:
    if section.attention in ("auto", "packed"):
        return "eager" if arch.family.eager_only else "sdpa"
    return section.attention


def _from_pretrained(base: str, **kwargs: Any) -> PreTrainedModel:
    options = {k: kwargs[k] for k in ("trust_remote_code", "revision") if k in kwargs}
    config = kwargs.get("config") or AutoConfig.from_pretrained(base, **options)
    loaded: Any = auto_class(config).from_pretrained(base, output_loading_info=True, **kwargs)
    model, info = loaded
    missing = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise CheckError(f"{base}: weights missing or of another shape, which would be random: {shown}")
    return model


def _summary(model: torch.nn.Module, kind: str) -> dict[str, Any]:
    matrices = [m for m in model.modules() if isinstance(m, QuantizedWeight)]
    return {
        "kind": kind,
        "matrices": sum(math.prod(m.shape[:-2]) for m in matrices),
        "weights": sum(math.prod(m.shape) for m in matrices),
        "bytes": sum(m.nbytes for m in matrices),
    }


def _quantized(
    base: str,
    folder: Path | None,
    arch: Architecture,
    name: str,
    kwargs: dict[str, Any],
    *,
    device: torch.device,
    place: bool,
    empty: bool,
) -> PreTrainedModel:
    """A model whose matrices stay quantized, read straight onto `device`, or (not `place`) into host memory.

    `name` is the format's in `QUANTIZED_BASES`.
    """
    options = {k: kwargs[k] for k in ("trust_remote_code", "revision") if k in kwargs}
    config: Any = AutoConfig.from_pretrained(base, **options)
    # Host memory is filled by way of the GPU, which quantizes much faster.
    scheme = QUANTIZED_BASES.get(name)(arch, folder, None if place else device)
    # Or transformers would quantize the model in its own way.
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for field in FIELDS:
            if hasattr(part, field):
                delattr(part, field)
    model: Any
    if empty:
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            model = auto_class(config).from_config(config, **{k: v for k, v in kwargs.items() if k != "revision"})
        put_empty(model, scheme, kwargs["dtype"])
    else:
        where = device if place else torch.device("cpu")
        model = _from_pretrained(base, config=config, quantization_config=scheme, device_map={"": where}, **kwargs)
        # To all others this is a plain model: what is special about it, its layers know.
        model.hf_quantizer.remove_quantization_config(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._is_quantized = False
    if any(site.is_experts and site.parameter in scheme.parameters for site in arch):
        register_experts()
        set_experts(model, EXPERTS)
    return model


def check_sites(model: torch.nn.Module, arch: Architecture) -> None:
    """Every site of the architecture is in the model, with the shape expected.

    Raises `CheckError`: the family table and this version of transformers disagree.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    wrong = []
    for site in arch.sites:
        if site.path == "lm_head" and arch.tied:
            continue
        have = shapes.get(site.parameter)
        # What no adapter sits on may have more dimensions: convolutions, positions of an image.
        same = have is not None and (
            have[-2:] == site.shape or (not site.attachable and math.prod(have) == math.prod(site.shape))
        )
        if not same:
            wrong.append(f"{site.parameter}: expected {site.shape}, found {have or 'nothing'}")
    if wrong:
        shown = "\n  ".join(wrong[:5])
        raise CheckError(f"the model differs from its config.json as mla-tune reads it:\n  {shown}")


def base_hash(base: str) -> dict[str, str]:
    """sha256 of a checkpoint folder: of whole files up to 4 GB in all, above that of sizes and safetensors headers
    (`kind` says which).  A hub id has no folder: its name is all there is."""
    folder = Path(base)
    if not folder.is_dir():
        return {"kind": "name", "sha256": hashlib.sha256(base.encode()).hexdigest()}
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])
    whole = sum(f.stat().st_size for f in files) <= 4e9
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as f:
            if not whole and file.suffix == ".safetensors":
                digest.update(f.read(int.from_bytes(f.read(8), "little")))
                continue
            while block := f.read(1 << 24):
                digest.update(block)
    return {"kind": "files" if whole else "headers", "sha256": digest.hexdigest()}
