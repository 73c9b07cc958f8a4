"""Absorbed decoding (attention over the latent cache) with merged or unmerged adapters, several in one batch.

generate             `generate`: answer one prompt or many in one call, with merged or unmerged adapters
session              `Session`: a model with any number of unmerged adapters, loaded once, which answers requests in
                     batches
requests             What a session is asked and what it returns: requests, settings and results; and the reader of
                     `--prompts` files
resolve_model        Resolve MODEL as a user types it to the base to load, and the unmerged adapter to put on it, if any
absorb               `absorb` and `expand`: switch a transformers model with Multi-head Latent Attention to absorbed
                     decoding and back
attention_interface  The attention function and the mask function that an absorbed model uses in transformers
latent_attention     `LatentAttention`: attention of one MLA module in the latent space, without expanding cached tokens
latent_sdpa          Scaled dot-product attention in which all heads share the cached latent as their key and value
latent_cache         `LatentCache`: a KV cache with memory allocated ahead, which keeps a token's latent and rope key in
                     one row
absorbed_weights     W_UK and W_UV from the absorbed.safetensors beside a model, for modules whose `kv_b_proj` has no
                     plain weight
lora_tensors         The LoRA factors of one PEFT layer as tensors: of the active adapters, or of one adapter for each
                     row of a batch
batched_lora         A faster forward of PEFT's LoRA layers, in which each row of a batch can have another adapter
batched_expert_lora  LoRA of routed experts by its factors, with an adapter for each row of a batch where asked for
load_adapters        Load several adapters into one PEFT model, each on exactly the matrices that its file names
"""
