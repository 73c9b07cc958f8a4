"""Logits of base + adapters, of the merged model and of absorbed attention, computed layer by layer and compared.

compare             The comparison of logits: does the merged model compute what base + adapters compute?
differences         How far two sets of logits differ, and the report on a comparison of logits
memory              How much memory a comparison of logits needs, and how much is free
empty_model         Build a transformers model from config.json without memory for its parameters, which are on the meta
                    device
streamed_model      A transformers model whose weights are read from a checkpoint layer by layer, while it computes
streamed_weights    Which tensors of a checkpoint each parameter of a model needs, and the memory that they are read
                    into
peft_reference      The reference of the comparison of logits: base + unmerged adapters by PEFT, and the base alone, in
                    one pass
absorbed_reference  Absorbed attention in transformers' decoder layers, for the comparison of logits: prefill only, no
                    cache
"""
