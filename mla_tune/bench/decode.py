"""Decoding measured: stock transformers, absorbed, and absorbed with an adapter of its own for each row of the batch.

The ways take turns, round after round, on caches of the same random latents (no prefill: what the numbers are does not
change how long they take).  Every step decodes one token a row, the last of exactly S tokens of context.

    ms a token     time of a step: each of the B rows gets one token       tokens a second     B / that time
    ratio          stock's time / this way's, one a round                  transient           peak above rest in a step
    bandwidth      (weights that a step must read, once + cache) / time / bandwidth of a copy: how much of the machine
                   is used, were nothing read twice (model bandwidth utilization)
    floor          bytes of the cache / bandwidth of a copy: no step that reads each cached token once is faster
    graph          on a GPU, a step as a CUDA graph: the GPU's own time, where Python would take longer to ask for it

A way that runs out of memory is told, and the others go on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache

from mla_tune.arch.dims import DTYPE_BYTES
from mla_tune.bench.decode_cases import (
    bench_cases,
    load,
)
from mla_tune.bench.decode_result import DecodeBench
from mla_tune.bench.decode_rounds import Say, measure_context, measure_prefill
from mla_tune.bench.meter import copy_bandwidth, is_out_of_memory
from mla_tune.errors import InputError, WorkError
from mla_tune.inference.latent_cache import LatentCache
from mla_tune.model.load import DTYPES, Loaded, quiet

CACHES: dict[str, type[DynamicCache]] = {"latent": LatentCache, "dynamic": DynamicCache}


def decode(
    model: str,
    *,
    contexts: Sequence[int] = (512, 2048, 8192),
    batch: int = 1,
    adapters: int = 0,
    dtype: str = "auto",
    runs: int = 3,
    layers: int | None = None,
    cache: str = "latent",
    say: Say = lambda line: None,
) -> DecodeBench:
    """Measure `model`: a name in `contenders.REFERENCES` (of `layers` layers), or what `generate` takes, and presets.

    `adapters`: that many unmerged LoRAs of rank 16 on all attention matrices, random, a row of the batch each in turn;
    the batch is at least as large.  `dtype` of weights and cache; auto: bfloat16 on a GPU, float32 on a CPU.  `cache`
    of all ways but stock: latent (`LatentCache`) or dynamic (transformers' `DynamicCache`, as stock's).
    Raises `InputError` before weights are read for what does not fit together, `WorkError` when memory runs out.
    """
    _check(contexts, batch, adapters, dtype, runs, layers, cache)
    quiet()
    try:
        loaded = load(model, contexts, dtype, layers)
        return measure(
            loaded, model, contexts=contexts, batch=batch, adapters=adapters, runs=runs, cache=cache, say=say
        )
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise WorkError("out of memory; lower --contexts, --batch, --adapters or --layers") from error
        raise


def measure(
    loaded: Loaded,
    name: str,
    *,
    contexts: Sequence[int],
    batch: int,
    adapters: int,
    runs: int,
    say: Say,
    cache: str = "latent",
) -> DecodeBench:
    """`decode` of a model in memory, which is in evaluation mode afterwards and else as it was."""
    model, arch, device = loaded.model.eval(), loaded.arch, loaded.device
    batch = max(batch, adapters)
    ways = bench_cases(model, arch, batch, adapters, DTYPE_BYTES[loaded.dtype], CACHES[cache])
    say("bandwidth of a copy")
    bandwidth = copy_bandwidth(device)
    with torch.inference_mode():
        prefill = measure_prefill(model, contexts[0], ways, device, runs, say)
        token = arch.kv_bytes(loaded.dtype)[0]
        found = [
            measure_context(
                model,
                S,
                batch,
                ways,
                device=device,
                bandwidth=bandwidth,
                floor=token * batch * S / bandwidth * 1e3,
                runs=runs,
                say=say,
            )
            for S in contexts
        ]
    return DecodeBench(
        model=name,
        model_type=arch.model_type,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        dtype=loaded.dtype,
        threads=torch.get_num_threads(),
        batch=batch,
        adapters=adapters,
        cache=CACHES[cache].__name__,
        runs=runs,
        params_total=arch.params_total,
        bandwidth_bytes_per_second=bandwidth,
        formula_cache_bytes_per_token=arch.kv_bytes(loaded.dtype)[0],
        contexts=found,
        prefill=prefill,
    )


def _check(
    contexts: Sequence[int], batch: int, adapters: int, dtype: str, runs: int, layers: int | None, cache: str
) -> None:
    if not contexts or min(contexts) < 2:
        raise InputError("--contexts: expected one or more counts of tokens, each 2 or more, as in 512,2048,8192")
    counts = (("--batch", batch, 1), ("--adapters", adapters, 0), ("--runs", runs, 1), ("--layers", layers, 1))
    for option, value, least in counts:
        if value is not None and value < least:
            raise InputError(f"{option} {value}: must be {least} or more")
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: allowed are {', '.join(DTYPES)}")
    if cache not in CACHES:
        raise InputError(f"--cache {cache}: allowed are {', '.join(CACHES)}")
