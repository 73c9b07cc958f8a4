#!/usr/bin/env python
"""Absorbed or expanded?  Measures both for one attention module, and what `mode="auto"` would have taken.

    python scripts/bench_choice.py --heads 16 --dtype bfloat16 --out choice.json

For each batch B, queries T and keys S the two ways take turns on random latents.  `lost` is the time of the way that
auto takes over that of the faster one.  Dimensions: P 128, R 64, V 128, C 512 (DeepSeek-V3), or those of `bench decode`
with `--small`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from mla_tune.bench.meter import synchronize
from mla_tune.inference import attention_interface as attention
from mla_tune.inference.absorb import absorb


def module_of(args: Any, device: torch.device, dtype: torch.dtype) -> Any:
    P, R, V, C = (64, 32, 64, 256) if args.small else (128, 64, 128, 512)
    config: Any = AutoConfig.for_model(
        "deepseek_v3", hidden_size=64, num_attention_heads=args.heads, num_key_value_heads=args.heads, q_lora_rank=16,
        kv_lora_rank=C, qk_nope_head_dim=P, qk_rope_head_dim=R, v_head_dim=V,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return DeepseekV3Attention(config, 0).to(device, dtype).eval()


def times(calls: dict[str, Any], device: torch.device, rounds: int, seconds: float) -> dict[str, float]:
    """Median milliseconds of each, in turns."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            spent = 0.0
            while spent < seconds:
                synchronize(device)
                began = time.perf_counter()
                call()
                synchronize(device)
                found[name].append((time.perf_counter() - began) * 1e3)
                spent += found[name][-1] / 1e3
    return {name: statistics.median(ms) for name, ms in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--queries", default="1,2,4,8,16,32,64,128,256,512")
    parser.add_argument("--keys", default="64,512,2048,8192")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.05)
    parser.add_argument("--limit", type=int, default=2 << 30, help="most numbers of expanded keys")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype)
    module = module_of(args, device, dtype)
    absorb(module)
    state = getattr(module, attention.STATE)
    call = ALL_ATTENTION_FUNCTIONS["mla_tune_sdpa"]
    rows = []
    H, C, R, width = args.heads, module.kv_lora_rank, module.qk_rope_head_dim, module.qk_head_dim
    print("   B     T      S   absorbed   expanded   auto        lost")
    for B in map(int, args.batches.split(",")):
        for T in map(int, args.queries.split(",")):
            for S in map(int, args.keys.split(",")):
                if S < T or B * S * H * width > args.limit:
                    continue
                query = torch.randn(B, H, T, width, device=device, dtype=dtype)
                latent = torch.randn(B, 1, S, C, device=device, dtype=dtype)
                k_rope = torch.randn(B, 1, S, R, device=device, dtype=dtype)
                mask = None
                if 1 < T < S:
                    mask = torch.ones(B, 1, T, S, dtype=torch.bool, device=device).tril(S - T)

                def way(mode: str, q: Any = query, c: Any = latent, k: Any = k_rope, m: Any = mask) -> None:
                    state.mode = mode
                    call(module, q, c, k, m, scaling=module.scaling, dropout=0.0)

                with torch.no_grad():
                    calls = {mode: (lambda mode=mode, way=way: way(mode)) for mode in ("absorbed", "expanded")}
                    ms = times(calls, device, args.rounds, args.seconds)
                way_of = (state, B, T, S, device.type, dtype.itemsize)
                taken = "absorbed" if attention.prefers_absorbed(*way_of) else "expanded"
                lost = ms[taken] / min(ms.values()) - 1
                rows.append({"B": B, "T": T, "S": S, **ms, "auto": taken, "lost": lost})
                print(
                    f"{B:4} {T:5} {S:6} {ms['absorbed']:10.3f} {ms['expanded']:10.3f}   {taken}  {lost:7.1%}",
                    flush=True,
                )
    print(f"lost: mean {statistics.mean(r['lost'] for r in rows):.1%}, most {max(r['lost'] for r in rows):.1%}")
    if args.out:
        args.out.write_text(json.dumps({"args": {k: str(v) for k, v in vars(args).items()}, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
