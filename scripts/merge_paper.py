"""What a merge into the real DeepSeek-V3 (FP8) has to read and write, computed from its headers (`fake_v3`)."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import NamedTuple

import fake_v3
from synthetic_v3 import Tensor, adapter_tensors, attention_shapes, mlp_shapes

GB = 1e9


class Bill(NamedTuple):
    """Bytes, tensors and multiplications of one merge."""

    touched: int  # shards rewritten
    merged: int  # tensors merged
    read: int  # bytes: touched shards and adapter
    written: int  # bytes: rewritten shards and absorbed tensors
    output: int  # bytes of the whole output folder, linked shards included
    proof: int  # bytes that the proof reads: rewritten shards, old and new, absorbed tensors, adapter
    flop: float  # multiply-adds × 2 of all B·A
    largest: int  # bytes of the largest merged tensor in float32


def adapted_keys(groups: Iterable[str]) -> set[str]:
    """Checkpoint keys that an adapter on these groups changes."""
    c, groups = fake_v3.config(), set(groups)
    keys: set[str] = set()
    for layer in range(c["num_hidden_layers"]):
        dense = layer < c["first_k_dense_replace"]
        parents: dict[str, list[str]] = {"attention": ["self_attn"], "mlp": ["mlp" if dense else "mlp.shared_experts"]}
        parents["experts"] = [] if dense else [f"mlp.experts.{e}" for e in range(c["n_routed_experts"])]
        for group in groups:
            names = attention_shapes(c) if group == "attention" else mlp_shapes(1, 1)
            keys |= {f"model.layers.{layer}.{p}.{name}.weight" for p in parents[group] for name in names}
    return keys


def bill(groups: Iterable[str], quantized: str) -> Bill:
    """`quantized` is 'dequantize' (adapted weights become bfloat16, their scales go) or 'keep' (codes and scales anew).

    q_a + kv_a and gate + up are fused by engines and must have one precision; these groups always hold both.
    """
    groups = list(groups)
    c, adapted = fake_v3.config(), adapted_keys(groups)
    adapter = sum(t.nbytes for t in adapter_tensors(c, groups, fake_v3.RANK))
    kv_b = c["num_attention_heads"] * (c["qk_nope_head_dim"] + c["v_head_dim"]) * c["kv_lora_rank"]
    absorbed = c["num_hidden_layers"] * kv_b * 2
    touched = merged = old = new = linked = largest = 0
    flop = 0.0
    for shard in fake_v3.shards():
        hits = [t for t in shard if t.key in adapted]
        size = sum(t.nbytes for t in shard)
        if not hits:
            linked += size
            continue
        touched, merged, old = touched + 1, merged + len(hits), old + size
        new += sum(_after(t, adapted) for t in shard) if quantized == "dequantize" else size
        largest = max(largest, *(prod(t.shape) * 4 for t in hits))
        flop += sum(2.0 * fake_v3.RANK * prod(t.shape) for t in hits)
    assert merged == len(adapted)
    return Bill(
        touched=touched,
        merged=merged,
        read=old + adapter,
        written=new + absorbed,
        output=linked + new + absorbed,
        proof=old + new + absorbed + adapter,
        flop=flop,
        largest=largest,
    )


def _after(tensor: Tensor, adapted: set[str]) -> int:
    """Bytes of a base tensor in the output of `--quantized dequantize`."""
    if tensor.key in adapted:
        return prod(tensor.shape) * 2
    if tensor.key.removesuffix("_scale_inv") in adapted:
        return 0
    return tensor.nbytes


def table() -> str:
    """The figures as a Markdown table."""
    ways = ("dequantize", "keep")
    bills = [(name, way, bill(groups, way)) for name, groups in fake_v3.ADAPTERS.items() for way in ways]
    heads = [f"{name}, `--quantized {way}`" for name, way, _ in bills]
    rows = [
        ("shards rewritten, of 163", lambda b: f"{b.touched}"),
        ("tensors merged", lambda b: f"{b.merged:,}"),
        ("read, GB", lambda b: _gb(b.read)),
        ("written, GB", lambda b: _gb(b.written)),
        ("output folder with linked shards, GB", lambda b: _gb(b.output)),
        ("also read by the proof, GB", lambda b: _gb(b.proof)),
        ("products B·A, TFLOP", lambda b: f"{b.flop / 1e12:.2f}"),
        ("largest merged tensor in float32, MB", lambda b: f"{b.largest / 1e6:.0f}"),
    ]
    for speed in (1, 5):
        rows.append((f"time at {speed} GB/s, `--no-verify`", lambda b, s=speed: _time(b.read + b.written, s)))
        rows.append((f"time at {speed} GB/s, with proof", lambda b, s=speed: _time(b.read + b.written + b.proof, s)))
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    lines += ["| " + " | ".join([name, *(show(b) for _, _, b in bills)]) + " |" for name, show in rows]
    return "\n".join(lines)


def _gb(count: int) -> str:
    return f"{count / GB:,.1f}"


def _time(count: int, speed: float) -> str:
    seconds = count / (speed * GB)
    return f"{seconds / 60:.0f} min" if seconds >= 600 else f"{seconds:.0f} s"
