"""Decoding measured: stock transformers, absorbed, and absorbed with an adapter of its own for each row of the batch.

The ways take turns, round after round, on one cache of random latents (no prefill: what the numbers are does not change
how long they take).  Every step decodes one token a row, the last of exactly S tokens of context.

    ms a token     time of a step: each of the B rows gets one token       tokens a second     B / that time
    ratio          stock's time / this way's, one a round                  transient           peak above rest in a step
    bandwidth      (weights that a step must read, once + cache) / time / bandwidth of a copy: how much of the machine
                   is used, were nothing read twice (model bandwidth utilisation)
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer

from mla_tune.arch.dims import DTYPE_BYTES
from mla_tune.arch.registry import architecture
from mla_tune.arch.roles import GROUPS
from mla_tune.arch.site import Architecture
from mla_tune.errors import InputError, WorkError
from mla_tune.model.load import DTYPES, Loaded, load_model, pick_device, pick_dtype, quiet
from mla_tune.recipe.schema import ModelSection
from mla_tune.resources import model_names, preset_names
from mla_tune.runtime.absorb import absorb, mla_modules, obstacles
from mla_tune.runtime.meter import copy_bandwidth, synchronize, transient_bytes
from mla_tune.runtime.session import resolve_model
from mla_tune.survey.source import ALIASES, architecture_of

#: MODEL for the reference shape: a random DeepSeek-V3 without experts, made in memory.
REFERENCE = "bench"
REFERENCE_CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "first_k_dense_replace": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
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
RANK = 16
STOCK, ABSORBED = "stock", "absorbed"
#: Of one way in one round: the fewest and the most steps, and the seconds between them that are enough.
_LEAST, _MOST, _SECONDS = 3, 20, 0.5

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Timed:
    """One way at one context; lists have one number a round."""

    way: str
    ms: list[float]
    ms_median: float
    tokens_per_second: float
    #: Stock's time / this way's.
    ratios: list[float]
    ratio_median: float
    #: Of the tensors in the cache, a token of one row, over all layers.
    cache_bytes_per_token: float
    transient_bytes: int
    #: That a step must read at least: weights and cache of all rows.
    step_bytes: int
    bandwidth_share: float


@dataclass(frozen=True, slots=True)
class Prefill:
    """One prompt of `context` tokens, absorbed (mode auto) against stock; lists have one number a round."""

    context: int
    stock_ms: list[float]
    absorbed_ms: list[float]
    #: Stock's time / absorbed time.
    ratios: list[float]
    ratio_median: float


@dataclass(frozen=True, slots=True)
class AtContext:
    """All ways at one context; `adapters_cost`, one a round, is the time of unmerged adapters / that of the same batch
    on one merged model (empty without adapters)."""

    context: int
    ways: list[Timed]
    adapters_cost: list[float]


@dataclass(frozen=True, slots=True)
class DecodeBench:
    """What `decode` measured."""

    model: str
    model_type: str
    device: str
    dtype: str
    threads: int
    batch: int
    adapters: int
    runs: int
    params_total: int
    bandwidth_bytes_per_second: float
    #: (C + R) · attention modules · bytes of a number.
    formula_cache_bytes_per_token: int
    contexts: list[AtContext]
    prefill: Prefill

    @property
    def cache_agrees(self) -> bool:
        """Whether every cache had the formula's size, to the byte."""
        formula = self.formula_cache_bytes_per_token
        return all(t.cache_bytes_per_token == formula for at in self.contexts for t in at.ways)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"cache_agrees": self.cache_agrees}


def decode(
    model: str,
    *,
    contexts: Sequence[int] = (512, 2048, 8192),
    batch: int = 1,
    adapters: int = 0,
    dtype: str = "auto",
    runs: int = 3,
    say: Say = lambda line: None,
) -> DecodeBench:
    """Measure `model`: 'bench', or what `generate` takes, and the presets.

    `adapters`: that many unmerged LoRAs of rank 16 on all attention matrices, random, a row of the batch each in turn;
    the batch is at least as large.  `dtype` of weights and cache; auto: bfloat16 on a GPU, float32 on a CPU.
    Raises `InputError` before weights are read for what does not fit together, `WorkError` when memory runs out.
    """
    _check(contexts, batch, adapters, dtype, runs)
    quiet()
    loaded = _load(model, contexts, dtype)
    try:
        return measure(loaded, model, contexts=contexts, batch=batch, adapters=adapters, runs=runs, say=say)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise WorkError("out of memory; lower --contexts, --batch or --adapters") from error
        raise


def measure(
    loaded: Loaded, name: str, *, contexts: Sequence[int], batch: int, adapters: int, runs: int, say: Say
) -> DecodeBench:
    """`decode` of a model in memory, which is in evaluation mode afterwards and else as it was."""
    model, arch, device = loaded.model.eval(), loaded.arch, loaded.device
    batch = max(batch, adapters)
    ways = _ways(model, arch, batch, adapters, DTYPE_BYTES[loaded.dtype])
    say("bandwidth of a copy")
    bandwidth = copy_bandwidth(device)
    with torch.no_grad():
        prefill = _prefill(model, contexts[0], ways, device, runs, say)
        found = [_at_context(model, S, batch, ways, device, bandwidth, runs, say) for S in contexts]
    return DecodeBench(
        model=name,
        model_type=arch.model_type,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        dtype=loaded.dtype,
        threads=torch.get_num_threads(),
        batch=batch,
        adapters=adapters,
        runs=runs,
        params_total=arch.params_total,
        bandwidth_bytes_per_second=bandwidth,
        formula_cache_bytes_per_token=arch.kv_bytes(loaded.dtype)[0],
        contexts=found,
        prefill=prefill,
    )


def random_cache(model: Any, batch: int, context: int, device: torch.device) -> DynamicCache:
    """A cache of `context` random tokens: latents (B, 1, S, C) and rope keys (B, 1, S, R) in every layer.

    Raises `InputError` for a model in which something else than latents is cached.
    """
    cache = DynamicCache(config=model.config)
    modules = {m.layer_idx: m for m in mla_modules(model)}
    for i, layer in enumerate(cache.layers):
        if i not in modules or type(layer) is not DynamicLayer:
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


def cache_bytes(cache: DynamicCache) -> int:
    """Of the memory behind all keys and values."""
    layers: list[Any] = cache.layers
    return sum(t.untyped_storage().nbytes() for layer in layers for t in (layer.keys, layer.values))


@dataclass(frozen=True, slots=True)
class _Way:
    """`ready` lasts as long as a measurement and gives what is called; `weight_bytes` is what a step must read."""

    name: str
    ready: Callable[[], AbstractContextManager[Any]]
    weight_bytes: int


def _ways(model: Any, arch: Architecture, batch: int, adapters: int, itemsize: int) -> list[_Way]:
    weights = weights_read(arch, batch) * itemsize
    ways = [
        _Way(STOCK, lambda: nullcontext(model), weights),
        # A merged model has the shapes of its base: this is how long the batch takes on one merged model, too.
        _Way(ABSORBED, lambda: _absorbed(model), weights),
    ]
    if adapters:
        names = [f"adapter{i}" for i in range(adapters)]
        twin = _with_adapters(model, arch, names)
        lora = sum(p.nbytes for key, p in twin.named_parameters() if "lora_" in key)
        rows = [names[row % adapters] for row in range(batch)]
        ways.append(_Way(_adapters(adapters), lambda: _by_rows(twin, rows), weights + lora))
    return ways


def _adapters(count: int) -> str:
    return f"{count} adapter{'s' * (count > 1)}"


@contextmanager
def _absorbed(model: Any) -> Iterator[Any]:
    with absorb(model):
        for path, why in obstacles(model).items():
            raise InputError(f"{path} can't be absorbed: {why}")
        yield model


@contextmanager
def _by_rows(twin: Any, rows: list[str]) -> Iterator[Any]:
    """As in PEFT's own `generate`, its hooks are entered once: to enter them it walks over all modules."""
    with _absorbed(twin), twin.base_model._enable_peft_forward_hooks(adapter_names=rows):
        yield twin.base_model.model


def _with_adapters(model: Any, arch: Architecture, names: list[str]) -> Any:
    """A `PeftModel` on a twin of `model` that has modules of its own and the same tensors."""
    shared = [*model.parameters(), *model.buffers()]
    trainable = [t for t in shared if t.requires_grad]
    twin = copy.deepcopy(model, {id(t): t for t in shared})
    leaves = {site.path.rpartition(".")[2] for site in arch.sites if site.role in GROUPS["attention"]}
    torch.manual_seed(0)

    def config() -> LoraConfig:
        return LoraConfig(r=RANK, target_modules=sorted(leaves), init_lora_weights=False)

    wrapped: Any = get_peft_model(twin, config(), adapter_name=names[0])
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


def _at_context(
    model: Any, S: int, batch: int, ways: list[_Way], device: torch.device, bandwidth: float, runs: int, say: Say
) -> AtContext:
    ids = torch.ones(batch, 1, dtype=torch.long, device=device)

    def filled() -> DynamicCache:
        return random_cache(model, batch, S, device)

    def step(net: Any, cache: DynamicCache) -> None:
        cache.crop(-1)
        net(input_ids=ids, past_key_values=cache, use_cache=True)

    say(f"context {S:,}: memory")
    transients = {}
    for way in ways:
        with way.ready() as net:
            transients[way.name] = transient_bytes(lambda cache, net=net: step(net, cache), filled, device)
    cache = filled()
    ms: dict[str, list[float]] = {way.name: [] for way in ways}
    sizes = {}
    for i in range(runs):
        for way in ways:
            with way.ready() as net:
                ms[way.name].append(_median_ms(lambda net=net: step(net, cache), device))
            sizes[way.name] = cache_bytes(cache)
            say(f"context {S:,}, round {i + 1} of {runs}: {way.name} {ms[way.name][-1]:.4g} ms a token")
    timed = []
    for way in ways:
        ratios = _ratios(ms[STOCK], ms[way.name])
        median, size = statistics.median(ms[way.name]), way.weight_bytes + sizes[way.name]
        timed.append(
            Timed(
                way=way.name,
                ms=ms[way.name],
                ms_median=median,
                tokens_per_second=batch / median * 1e3,
                ratios=ratios,
                ratio_median=statistics.median(ratios),
                cache_bytes_per_token=sizes[way.name] / (batch * S),
                transient_bytes=transients[way.name],
                step_bytes=size,
                bandwidth_share=size / (median / 1e3) / bandwidth,
            )
        )
    cost = _ratios(ms[ways[2].name], ms[ABSORBED]) if len(ways) > 2 else []
    return AtContext(S, timed, cost)


def _prefill(model: Any, S: int, ways: list[_Way], device: torch.device, runs: int, say: Say) -> Prefill:
    random_cache(model, 1, 1, device)  # refuses what can't be measured, before anything is
    numbers = torch.Generator(device).manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, S), generator=numbers, device=device)

    def prompt(net: Any) -> None:
        net(input_ids=ids, past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1)

    ms: dict[str, list[float]] = {STOCK: [], ABSORBED: []}
    for i in range(runs):
        for way in ways[:2]:
            with way.ready() as net:
                ms[way.name].append(_median_ms(lambda net=net: prompt(net), device))
            say(f"prefill {S:,}, round {i + 1} of {runs}: {way.name} {ms[way.name][-1]:.4g} ms")
    ratios = _ratios(ms[STOCK], ms[ABSORBED])
    return Prefill(S, ms[STOCK], ms[ABSORBED], ratios, statistics.median(ratios))


def _median_ms(call: Callable[[], None], device: torch.device) -> float:
    """Of a few calls: at least three, so that one that was interrupted does not count."""

    def timed() -> float:
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        return time.perf_counter() - began

    if timed() < _SECONDS:  # the first warms up; a second one where it is cheap
        call()
    times: list[float] = []
    while len(times) < _LEAST or (len(times) < _MOST and sum(times) < _SECONDS):
        times.append(timed())
    return statistics.median(times) * 1e3


def _ratios(above: list[float], below: list[float]) -> list[float]:
    """One a round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def _check(contexts: Sequence[int], batch: int, adapters: int, dtype: str, runs: int) -> None:
    if not contexts or min(contexts) < 2:
        raise InputError("--contexts: expected one or more counts of tokens, each 2 or more, as in 512,2048,8192")
    for option, value, least in (("--batch", batch, 1), ("--adapters", adapters, 0), ("--runs", runs, 1)):
        if value < least:
            raise InputError(f"{option} {value}: must be {least} or more")
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: allowed are {', '.join(DTYPES)}")


def _load(model: str, contexts: Sequence[int], dtype: str) -> Loaded:
    if model == REFERENCE:
        arch = architecture(REFERENCE_CONFIG, model)
        _fits(arch, contexts)
        device = pick_device("auto")
        dtype = pick_dtype(dtype, device)
        torch.manual_seed(0)
        config = AutoConfig.for_model(**REFERENCE_CONFIG)
        net = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], attn_implementation="sdpa")
        return Loaded(net.to(device), arch, None, device, dtype)
    base, adapter = resolve_model(model)
    if adapter is not None:
        raise InputError(f"{model}: an adapter that is not merged; measure its base, {base}, with --adapters 1")
    if base in (*model_names(), *ALIASES):
        raise InputError(f"{model}: a configuration without weights; give a folder with the model, or '{REFERENCE}'")
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
