"""Faster or smaller replacements of parts of a model in training.  Each computes what the stock part computes.

autotune           Choose the attention and the experts' implementation by measurement, where the recipe says `auto`
packed_attention   Attention over samples laid end to end, without mask and padding
chunked_loss       Cross-entropy without the logits of all tokens
lora_linear        LoRA as W x + s·B(A x), added in place
rms_norm           RMSNorm with its gradient written out, which saves less for the backward pass
mla_checkpointing  Recompute norms and MLA up-projections in the backward pass (`train.activation_checkpointing: mla`)
"""
