"""What `bench decode` compares: the model, three ways to decode with it, and a cache that no prefill has filled."""

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
from mla_tune.arch.lookup import ALIASES, architecture_of
from mla_tune.arch.roles import GROUPS
from mla_tune.arch.site import Architecture
from mla_tune.errors import InputError
from mla_tune.inference.absorb import absorb, mla_modules, unsupported_reasons
from mla_tune.inference.latent_cache import LatentCache, PreallocatedLayer
from mla_tune.inference.resolve_model import resolve_model
from mla_tune.model.load import DTYPES, Loaded, load_model, pick_device, pick_dtype
from mla_tune.recipe.schema import ModelSection
from mla_tune.resources import model_names, preset_names

#: Random models that are made in memory, by the name that MODEL has for them: DeepSeek-V3's module without experts.
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
REFERENCES: dict[str, dict[str, Any]] = {
    "bench": _REFERENCE,
    # DeepSeek-V3's own attention; its experts would hide it.
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
RANK = 16
STOCK, ABSORBED = "stock", "absorbed"


def load(model: str, contexts: Sequence[int], dtype: str, layers: int | None = None) -> Loaded:
    """The model that `bench` is given; what `InputError` refuses is refused before weights are read."""
    if layers is not None and model not in REFERENCES:
        raise InputError(f"--layers goes with {' or '.join(REFERENCES)} only: {model} has its own")
    if model in REFERENCES:
        known = REFERENCES[model]
        count = known["num_hidden_layers"] if layers is None else layers
        heads = known["num_attention_heads"]
        known = known | {"num_hidden_layers": count, "first_k_dense_replace": count, "num_key_value_heads": heads}
        arch = architecture(known, model)
        _fits(arch, contexts)
        device = pick_device("auto")
        dtype = pick_dtype(dtype, device)
        torch.manual_seed(0)
        config = AutoConfig.for_model(**known)
        net = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], attn_implementation="sdpa")
        return Loaded(net.to(device), arch, None, device, dtype)
    base, adapter = resolve_model(model)
    if adapter is not None:
        raise InputError(f"{model}: an adapter that is not merged; measure its base, {base}, with --adapters 1")
    if base in (*model_names(), *ALIASES):
        raise InputError(
            f"{model}: a configuration without weights; give a folder with the model, or {' or '.join(REFERENCES)}"
        )
    kind = "preset" if base in preset_names() and base != "embedded" else "base"
    section = ModelSection.model_validate({kind: base, "dtype": dtype})
    _fits(architecture_of(section), contexts)
    return load_model(section)


def _fits(arch: Architecture, contexts: Sequence[int]) -> None:
    window = arch.max_position_embeddings
    if window and max(contexts) > window:
        raise InputError(
            f"--contexts {max(contexts)}: more than the {window} positions of this model (max_position_embeddings)"
        )


def random_cache(
    model: Any, batch: int, context: int, device: torch.device, kind: type[DynamicCache] = DynamicCache
) -> DynamicCache:
    """A cache of `context` random tokens: latents (B, 1, S, C) and rope keys (B, 1, S, R) in every layer.

    Raises `InputError` for a model in which something else than latents is cached.
    """
    cache = kind(config=model.config)
    modules = {m.layer_idx: m for m in mla_modules(model)}
    for i, layer in enumerate(cache.layers):
        if i not in modules or type(layer) not in (DynamicLayer, PreallocatedLayer):
            what = "another kind of attention" if i not in modules else f"a cache of its own, {type(layer).__name__}"
            raise InputError(f"layer {i} of this {model.config.model_type} has {what}: only latents can be made up")
    numbers = torch.Generator(device).manual_seed(0)
    for i, m in modules.items():
        latent, k_rope = (
            torch.randn(batch, 1, context, n, generator=numbers, device=device, dtype=model.dtype)
            for n in (m.kv_lora_rank, m.qk_rope_head_dim)
        )
        cache.update(latent, k_rope, i)
    return cache


def shared_copy(cache: DynamicCache) -> DynamicCache:
    """Another cache of the same tensors: what it forgets or appends, `cache` still holds."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def cache_bytes(cache: DynamicCache) -> int:
    """Of the memory behind all keys and values; of a `LatentCache` without the room for tokens to come."""
    layers: list[Any] = cache.layers
    held = [(layer, t) for layer in layers for t in (layer.keys, layer.values)]
    return sum(t.nbytes if isinstance(layer, PreallocatedLayer) else t.untyped_storage().nbytes() for layer, t in held)


def room_bytes(cache: DynamicCache) -> int:
    """Of the room for tokens to come; none in a cache of another kind."""
    layers: list[Any] = cache.layers
    held: list[Any] = [layer.memory for layer in layers if isinstance(layer, PreallocatedLayer)]
    memory = sum(t.untyped_storage().nbytes() for t in held)
    return memory - cache_bytes(cache) if held else 0


@dataclass(frozen=True, slots=True)
class BenchCase:
    """`ready` lasts as long as a measurement and gives what is called; `weight_bytes` is what a step must read, `cache`
    the kind that it decodes with."""

    name: str
    ready: Callable[[], AbstractContextManager[Any]]
    weight_bytes: int
    cache: type[DynamicCache]


def bench_cases(
    model: Any, arch: Architecture, batch: int, adapters: int, itemsize: int, cache: type[DynamicCache] = LatentCache
) -> list[BenchCase]:
    """Stock, absorbed and, with adapters, absorbed with an adapter of its own for each row; `cache`: of the latter two,
    stock has what transformers' `generate` makes."""
    weights = weights_read(arch, batch) * itemsize
    ways = [
        BenchCase(STOCK, lambda: nullcontext(model), weights, DynamicCache),
        # A merged model has the shapes of its base: this is how long the batch takes on one merged model, too.
        BenchCase(ABSORBED, lambda: _absorbed(model), weights, cache),
    ]
    if adapters:
        names = [f"adapter{i}" for i in range(adapters)]
        adapted = _with_adapters(model, arch, names)
        lora = sum(p.nbytes for key, p in adapted.named_parameters() if "lora_" in key)
        rows = [names[row % adapters] for row in range(batch)]
        ways.append(BenchCase(_adapters(adapters), lambda: _by_rows(adapted, rows), weights + lora, cache))
    return ways


def _adapters(count: int) -> str:
    return f"{count} adapter{'s' * (count > 1)}"


@contextmanager
def _absorbed(model: Any) -> Iterator[Any]:
    with absorb(model):
        for path, why in unsupported_reasons(model).items():
            raise InputError(f"{path} can't be absorbed: {why}")
        yield model


@contextmanager
def _by_rows(shared_copy: Any, rows: list[str]) -> Iterator[Any]:
    """As in PEFT's own `generate`, its hooks are entered once: to enter them it walks over all modules."""
    with _absorbed(shared_copy), shared_copy.base_model._enable_peft_forward_hooks(adapter_names=rows):
        yield shared_copy.base_model.model


def _with_adapters(model: Any, arch: Architecture, names: list[str]) -> Any:
    """A `PeftModel` on a twin of `model` that has modules of its own and the same tensors."""
    shared = [*model.parameters(), *model.buffers()]
    trainable = [t for t in shared if t.requires_grad]
    shared_copy = copy.deepcopy(model, {id(t): t for t in shared})
    leaves = {site.path.rpartition(".")[2] for site in arch.sites if site.role in GROUPS["attention"]}
    torch.manual_seed(0)

    def config() -> LoraConfig:
        return LoraConfig(r=RANK, target_modules=sorted(leaves), init_lora_weights=False)

    wrapped: Any = get_peft_model(shared_copy, config(), adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config())
    for t in trainable:  # PEFT froze them, the model's too
        t.requires_grad_(True)
    return wrapped.eval()


def weights_read(arch: Architecture, batch: int) -> int:
    """Parameters that a step of `batch` rows reads: all but the experts that no row is routed to (were each row
    routed to others) and an embedding that is only looked up."""
    routed = sum(s.params for s in arch.sites if s.is_experts)
    experts = max((s.count for s in arch.sites if s.is_experts), default=1)
    idle = routed * max(0, experts - batch * arch.experts_per_token) // experts
    return arch.params_total - idle - (0 if arch.tied else arch.vocab_size * arch.dims.D)
