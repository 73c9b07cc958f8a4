"""Faster or smaller replacements of parts of a model in training.  Each computes what the stock part computes.

autotune           which attention and which experts' implementation is the fastest here
packed_attention   attention of samples laid end to end, without mask and padding
chunked_loss       cross-entropy without the logits of all tokens
lora_linear        W x + s·B(A x) without a tensor as large as W
rms_norm           RMSNorm with a gradient of its own, which keeps less
mla_checkpointing  `train.activation_checkpointing: mla`
"""
