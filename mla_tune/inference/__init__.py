"""Decoding in the latent space, with merged or unmerged adapters, several in one batch.

generate             `generate`: answers to one prompt or many, from a model with merged or unmerged adapters, in one
                     call
session              A model with any number of unmerged adapters, ready to answer: loaded once, asked in batches
requests             `--prompts FILE.jsonl`: one request a line
resolve_model        MODEL as a user types it → the base to load, and the adapter to put on it
absorb               `absorb` and `expand`: switch a transformers model with Multi-head Latent Attention to absorbed
                     decoding and back
attention_interface  The attention function and the mask function that transformers finds for an absorbed model
latent_attention     Attention of one module in the latent space: scores and values without expanding a cached token
latent_sdpa          Scaled dot-product attention in which all heads share the cached latent as their key and value
latent_cache         A cache for decoding that has room for tokens to come, and a token's latent and rope key side by
                     side
absorbed_weights     W_UK and W_UV out of the absorbed.safetensors that stands beside a model, for modules whose
                     `kv_b_proj` has no plain weight in memory: quantized (bitsandbytes, FP8), or offloaded
lora_tensors         The LoRA of one linear layer of PEFT, as tensors: for the adapters that are active, or row by row
                     of a batch
batched_lora         Rows of one batch with different adapters: every LoRA of a linear layer as two batched products
batched_expert_lora  LoRA of routed experts by its factors
load_adapters        Adapters of any placement side by side in one PEFT model, each on just the matrices that its file
                     names
"""
