"""The cases that `bench decode` compares, the model that they share, and caches of random latents."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer

from mla_tune.arch.build import architecture
from mla_tune.arch.roles import GROUPS
from mla_tune.arch.site import Architecture
from mla_tune.errors import InputError
from mla_tune.inference.absorb import absorb, mla_modules, unsupported_reasons
from mla_tune.inference.latent_cache import LatentCache, PreallocatedLayer
from mla_tune.inference.resolve_model import resolve_model
from mla_tune.model.load import DTYPES, Loaded, load_model, pick_device, pick_dtype
from mla_tune.recipe.model_source import ALIASES, architecture_of
from mla_tune.recipe.schema import ModelSection
from mla_tune.resources import model_names, preset_names

#: Configuration of the model `bench`: DeepSeek-V3's attention in a small dense model.
_REFERENCE: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 4096,
    "num_hidden_layers": 8,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
#: Configurations of the models that are made in memory with random weights, by the name that MODEL has for them.
REFERENCES: dict[str, dict[str, Any]] = {
    "bench": _REFERENCE,
    # DeepSeek-V3's attention sizes.  No routed experts: their time would hide that of attention.
    "bench-v3": _REFERENCE
    | {
        "num_hidden_layers": 2,
        "hidden_size": 7168,
        "intermediate_size": 2048,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "max_position_embeddings": 163840,
    },
}
#: Rank of the random LoRAs.
RANK = 16
#: Names of the two cases that are always measured.
STOCK, ABSORBED = "stock", "absorbed"


def load(model: str, contexts: Sequence[int], dtype: str, layers: int | None = None) -> Loaded:
    """Load the model that `bench decode` was given, or make it where `model` is a name in `REFERENCES`.

    Raises `InputError`, before weights are read, where `layers` is given for another model, where the model is an
    unmerged adapter or has no weights, or where one of the `contexts` is longer than the model allows.
    """
    if model in REFERENCES:
        return _make_reference(model, contexts, dtype, layers)
    references = " and ".join(REFERENCES)
    if layers is not None:
        raise InputError(f"--layers: only for the models {references}; the layers of {model} are given by its weights")
    base, adapter = resolve_model(model)
    if adapter is not None:
        raise InputError(f"{model}: an adapter that is not merged; measure its base, {base}, with --adapters 1")
    if base in (*model_names(), *ALIASES):
        raise InputError(
            f"{model}: a configuration without weights; give a model folder, a preset, or one of {references}"
        )
    kind = "preset" if base in preset_names() and base != "embedded" else "base"
    section = ModelSection.model_validate({kind: base, "dtype": dtype})
    _check_contexts(architecture_of(section), contexts)
    return load_model(section)


def _make_reference(model: str, contexts: Sequence[int], dtype: str, layers: int | None) -> Loaded:
    """Make a random model of `REFERENCES`, with `layers` dense layers in place of its own number if given."""
    config = REFERENCES[model]
    layers = config["num_hidden_layers"] if layers is None else layers
    heads = config["num_attention_heads"]
    config = config | {"num_hidden_layers": layers, "first_k_dense_replace": layers, "num_key_value_heads": heads}
    arch = architecture(config, model)
    _check_contexts(arch, contexts)
    device = pick_device("auto")
    dtype = pick_dtype(dtype, device)
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config), dtype=DTYPES[dtype], attn_implementation="sdpa"
    )
    return Loaded(made.to(device), arch, None, device, dtype)


def _check_contexts(arch: Architecture, contexts: Sequence[int]) -> None:
    """Raise `InputError` where a context is longer than the model allows."""
    window = arch.max_position_embeddings
    if window and max(contexts) > window:
        raise InputError(
            f"--contexts {max(contexts)}: more than the {window} positions of this model (max_position_embeddings)"
        )


def random_cache(
    model: Any, batch: int, context: int, device: torch.device, kind: type[DynamicCache] = DynamicCache
) -> DynamicCache:
    """Return a cache of `context` random tokens: latents (B, 1, S, C) and rope keys (B, 1, S, R) in every layer.

    Raises `InputError` for a model with a layer that caches something else than a latent and a rope key.
    """
    cache = kind(config=model.config)
    modules = {m.layer_idx: m for m in mla_modules(model)}
    for i, layer in enumerate(cache.layers):
        if i not in modules or type(layer) not in (DynamicLayer, PreallocatedLayer):
            what = "another kind of attention" if i not in modules else f"a cache of class {type(layer).__name__}"
            raise InputError(
                f"layer {i} of this {model.config.model_type} has {what}: bench decode can only fill caches of latents"
            )
    generator = torch.Generator(device).manual_seed(0)
    for i, module in modules.items():
        latent, k_rope = (
            torch.randn(batch, 1, context, n, generator=generator, device=device, dtype=model.dtype)
            for n in (module.kv_lora_rank, module.qk_rope_head_dim)
        )
        cache.update(latent, k_rope, i)
    return cache


def shared_copy(cache: DynamicCache) -> DynamicCache:
    """Return another cache of the same tensors.  Tokens cropped from it or appended to it leave `cache` as it is."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def cache_bytes(cache: DynamicCache) -> int:
    """Return the bytes of memory behind all keys and values; for a `LatentCache`, without what is allocated ahead."""
    layers: list[Any] = cache.layers
    tensors = [(layer, t) for layer in layers for t in (layer.keys, layer.values)]
    return sum(
        t.nbytes if isinstance(layer, PreallocatedLayer) else t.untyped_storage().nbytes() for layer, t in tensors
    )


def room_bytes(cache: DynamicCache) -> int:
    """Return the bytes that a `LatentCache` has allocated ahead; 0 for another cache."""
    layers: list[Any] = cache.layers
    memories: list[Any] = [layer.memory for layer in layers if isinstance(layer, PreallocatedLayer)]
    allocated = sum(t.untyped_storage().nbytes() for t in memories)
    return allocated - cache_bytes(cache) if memories else 0


@dataclass(frozen=True, slots=True)
class BenchCase:
    """One of the things that `bench decode` compares."""

    name: str
    """Name in the table and in `--json`."""
    prepared: Callable[[], AbstractContextManager[Any]]
    """Returns a context manager that yields the model to call, ready for this case."""
    weight_bytes: int
    """Bytes of the weights that a step must read."""
    cache: type[DynamicCache]
    """Class of its cache."""


def bench_cases(
    model: Any, arch: Architecture, batch: int, adapters: int, itemsize: int, cache: type[DynamicCache] = LatentCache
) -> list[BenchCase]:
    """Return the cases: stock, absorbed and, with `adapters` > 0, absorbed with an unmerged LoRA for each row.

    Stock has the `DynamicCache` that transformers' `generate` makes, the other two have a `cache`.  `itemsize` is the
    number of bytes of a weight.
    """
    weights = weights_read(arch, batch) * itemsize
    cases = [
        BenchCase(STOCK, lambda: nullcontext(model), weights, DynamicCache),
        # A merged model has the shapes of its base: this is also the time of the batch on one merged model.
        BenchCase(ABSORBED, lambda: _absorbed(model), weights, cache),
    ]
    if adapters:
        names = [f"adapter{i}" for i in range(adapters)]
        adapted = _with_adapters(model, arch, names)
        lora = sum(p.nbytes for key, p in adapted.named_parameters() if "lora_" in key)
        rows = [names[row % adapters] for row in range(batch)]
        name = f"{adapters} adapter{'s' * (adapters > 1)}"
        cases.append(BenchCase(name, lambda: _with_adapter_names(adapted, rows), weights + lora, cache))
    return cases


@contextmanager
def _absorbed(model: Any) -> Iterator[Any]:
    """Yield `model` absorbed.  Raises `InputError` where one of its modules can't be."""
    with absorb(model):
        for path, reason in unsupported_reasons(model).items():
            raise InputError(f"{path} can't be absorbed: {reason}")
        yield model


@contextmanager
def _with_adapter_names(adapted: Any, rows: list[str]) -> Iterator[Any]:
    """Yield the model absorbed, with the adapter of each row set.

    PEFT's hooks are entered once, as its `generate` does: entering them walks over all modules, which is slow.
    """
    with _absorbed(adapted), adapted.base_model._enable_peft_forward_hooks(adapter_names=rows):
        yield adapted.base_model.model


def _with_adapters(model: Any, arch: Architecture, names: list[str]) -> Any:
    """Return a `PeftModel` with a random LoRA for each of the `names` on all attention matrices.

    It wraps a copy of `model` that has its own modules but shares the tensors, so that `model` stays without adapters.
    """
    shared = [*model.parameters(), *model.buffers()]
    trainable = [t for t in shared if t.requires_grad]
    copied = copy.deepcopy(model, {id(t): t for t in shared})
    targets = sorted({site.path.rpartition(".")[2] for site in arch.sites if site.role in GROUPS["attention"]})
    torch.manual_seed(0)

    def config() -> LoraConfig:
        return LoraConfig(r=RANK, target_modules=targets, init_lora_weights=False)

    adapted: Any = get_peft_model(copied, config(), adapter_name=names[0])
    for name in names[1:]:
        adapted.add_adapter(name, config())
    for t in trainable:  # PEFT has frozen the shared parameters, and with them those of `model`
        t.requires_grad_(True)
    return adapted.eval()


def weights_read(arch: Architecture, batch: int) -> int:
    """Return the number of parameters that a step of `batch` rows reads.

    That is all of them but an untied embedding, of which a step reads one line a row, and the experts to which no row
    is routed, if every row is routed to different ones.
    """
    routed = sum(s.params for s in arch.sites if s.is_experts)
    experts = max((s.count for s in arch.sites if s.is_experts), default=1)
    idle = routed * max(0, experts - batch * arch.experts_per_token) // experts
    return arch.params_total - idle - (0 if arch.tied else arch.vocab_size * arch.dims.D)
