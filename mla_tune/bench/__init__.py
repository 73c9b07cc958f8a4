"""Benchmarks of decoding and training; they alternate the cases that they compare, and report ratios.

decode         `bench decode`: time decoding with stock transformers, absorbed attention, and unmerged adapters
decode_cases   The cases that `bench decode` compares, the model that they share, and caches of random latents
decode_rounds  The measurements of `bench decode`: one prompt into an empty cache, and decoding steps at one context
decode_result  The figures of `bench decode` as dataclasses; `DecodeBench.to_json` is the document of `--json`
meter          Measure a call: its time, its transient memory, a CUDA graph of it; and the copy bandwidth of a device
train          `bench train`: train the same data with each case, in alternating rounds and separate processes
train_cases    The cases that `bench train` compares: mla-tune with each kind of checkpointing, and TRL's SFTTrainer
train_worker   The process that trains one case of `bench train`: a share of the data for each line on standard input
"""
