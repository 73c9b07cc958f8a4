"""The model card of the embedded model, from what its training measured."""

from __future__ import annotations

import textwrap
from typing import Any

DOMAINS = {"prose": "prose", "code": "Python source", "chat": "docstring asks, source answers"}


def wrapped(text: str) -> str:
    return textwrap.fill(text, 110) + "\n" if text else ""


def model_card(facts: dict[str, Any], config: Any) -> str:
    """README.md of the model folder, from what was measured."""
    rows = "\n".join(
        f"| {DOMAINS.get(d, d)} | {h['tokens']:,} "
        f"| {h['loss']:.3f} | {h['unigram_loss']:.3f} | {h['bits_per_byte']:.3f} |"
        for d, h in facts["held_out"].items()
    )
    c = config
    shape = (
        f"{facts['parameters'] / 1e6:.2f} M parameters, bf16: {c.num_hidden_layers} layers ({c.first_k_dense_replace} "
        f"dense, the others with {c.n_routed_experts} routed experts, {c.num_experts_per_tok} of them active, and "
        f"{c.n_shared_experts} shared), hidden size {c.hidden_size}, {c.num_attention_heads} heads, q_lora_rank "
        f"{c.q_lora_rank}, kv_lora_rank {c.kv_lora_rank}, head sizes {c.qk_nope_head_dim} + {c.qk_rope_head_dim} "
        f"(keys) and {c.v_head_dim} (values), vocabulary {c.vocab_size:,} (byte-level BPE, digits apart), window "
        f"{c.max_position_embeddings} tokens, with a chat template."
    )
    training = (
        f"{facts['train_tokens'] / 1e6:.1f} M tokens ({facts['train_tokens'] / facts['corpus_tokens']:.1f} passes over "
        f"{facts['corpus_tokens'] / 1e6:.1f} M) in {facts['hours']:.1f} hours on {facts['threads']} CPU cores, torch "
        f"{facts['torch']}, bf16 autocast, AdamW, by `scripts/pretrain_tiny.py`. Routed experts were balanced "
        f"without an auxiliary loss (DeepSeek-V3, arXiv:2412.19437, 2.1.2)."
    )
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# The embedded model of mla-tune

A small DeepSeek-V3-style language model with Multi-head Latent Attention, pretrained from scratch, so that every
command can be tried and tested on real weights without a download. It knows the style of English prose and of Python;
it is no assistant.

{wrapped(shape)}
## Training

{wrapped(training)}
Data: English prose (US State of the Union addresses, CC0; Jane Austen's novels, Moby Dick and the Jargon File, public
domain) and the source of Python's standard library (PSF license); the latter also as chat turns, in which a function's
docstring asks and its source answers.

## Held-out loss

Documents chosen by a hash of their content, 2 % of each kind. Nats a token, of the bf16 weights as
shipped; the unigram model knows the token frequencies of the training data and nothing else.

| domain | tokens | loss | unigram | bits a byte |
|---|---:|---:|---:|---:|
{rows}

{wrapped(facts["note"])}"""
