"""Benchmarks, which print ratios from alternating runs.

decode        `mla-tune bench decode`: decoding stock and absorbed, over context and batch
decode_cases  the ways of decoding that it compares
decode_rounds its measurements: one prompt, and steps at one context
decode_result its figures
meter         time and memory of a call
train         `mla-tune bench train`: training with each kind of checkpointing, and TRL's SFTTrainer
train_cases   the cases that it compares
train_worker  the process that trains one case
"""
