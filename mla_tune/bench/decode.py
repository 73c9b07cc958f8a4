"""`bench decode`: time decoding with stock transformers, absorbed attention, and unmerged adapters.

The cases alternate, round after round, on caches of the same random latents.  (No prefill fills them: the values in a
cache do not change the time of a step.)  Every step decodes one token a row, the last of exactly S tokens of context.
Where a case runs out of memory, its name is noted and the other cases are still measured.

    ms a token   time of a step, which gives each of the B rows one token
    tokens/s     B / ms a token
    ratio        stock's time / the case's time, in the same round
    memory       peak bytes during a step above those before it
    MBU          (weights that a step must read + cache) / time / copy bandwidth: model bandwidth utilization
    floor        bytes of the cache / copy bandwidth: no step that reads each cached token once is faster
    graph        time of a step as a CUDA graph: the GPU's own time, without that of Python launching kernels
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache

from mla_tune.arch.dims import DTYPE_BYTES
from mla_tune.bench.decode_cases import bench_cases, load
from mla_tune.bench.decode_result import DecodeBench
from mla_tune.bench.decode_rounds import DecodeRun, Progress, measure_context, measure_prefill
from mla_tune.bench.meter import copy_bandwidth, is_out_of_memory
from mla_tune.errors import InputError, WorkError
from mla_tune.inference.latent_cache import LatentCache
from mla_tune.model.load import DTYPES, Loaded, silence_libraries

#: Cache classes by their name in `--cache`.
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
    progress: Progress = lambda line: None,
) -> DecodeBench:
    """Load `model`, measure decoding with it at each of the `contexts`, and return the figures.

    `model` is a name in `decode_cases.REFERENCES` (with `layers` layers), a preset, or a model or run folder as
    `mla-tune generate` takes it.  `adapters` is a number of random rank-16 LoRAs on all attention matrices; row i of
    the batch has LoRA i mod `adapters`, and the batch has at least that many rows.  `dtype` is that of weights and
    cache; auto means bfloat16 on a GPU and float32 on a CPU.  `cache` names the cache of all cases but stock, which has
    a `DynamicCache`.  `progress` is called with lines of progress.

    Raises `InputError` for arguments that do not fit together (before weights are read), and `WorkError` where even a
    single case runs out of memory.
    """
    _check_arguments(contexts, batch, adapters, dtype, runs, layers, cache)
    silence_libraries()
    try:
        loaded = load(model, contexts, dtype, layers)
        return measure(
            loaded, model, contexts=contexts, batch=batch, adapters=adapters, runs=runs, cache=cache, progress=progress
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
    progress: Progress,
    cache: str = "latent",
) -> DecodeBench:
    """Do what `decode` does with a model in memory, called `name`.

    Leaves the model in evaluation mode and otherwise as it was.
    """
    model, arch, device = loaded.model.eval(), loaded.arch, loaded.device
    batch = max(batch, adapters)
    cases = bench_cases(model, arch, batch, adapters, DTYPE_BYTES[loaded.dtype], CACHES[cache])
    progress("copy bandwidth")
    bandwidth = copy_bandwidth(device)
    token_bytes = arch.kv_bytes(loaded.dtype)[0]
    run = DecodeRun(model, cases, batch, device, bandwidth, token_bytes, runs, progress)
    with torch.inference_mode():
        prefill = measure_prefill(run, contexts[0])
        results = [measure_context(run, S) for S in contexts]
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
        formula_cache_bytes_per_token=token_bytes,
        contexts=results,
        prefill=prefill,
    )


def _check_arguments(
    contexts: Sequence[int], batch: int, adapters: int, dtype: str, runs: int, layers: int | None, cache: str
) -> None:
    """Raise `InputError` for an argument out of its range, by the name of its option."""
    if not contexts or min(contexts) < 2:
        raise InputError("--contexts: expected one or more numbers of tokens, each 2 or more, as in 512,2048,8192")
    counts = (("--batch", batch, 1), ("--adapters", adapters, 0), ("--runs", runs, 1), ("--layers", layers, 1))
    for option, value, least in counts:
        if value is not None and value < least:
            raise InputError(f"{option} {value}: must be {least} or more")
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: allowed are auto, {', '.join(DTYPES)}")
    if cache not in CACHES:
        raise InputError(f"--cache {cache}: allowed are {', '.join(CACHES)}")
