"""Logits of base + adapters, of the merged model and of absorbed attention, compared layer by layer.

compare             The comparison of logits: does the merged model say what base + adapters say?
streamed_model      A transformers model whose weights are read from a checkpoint piece by piece, while it computes
streamed_weights    The numbers of a checkpoint where a model keeps them, and the memory they are read into
peft_reference      Base and adapters, unmerged, by PEFT, and the base's own output beside it, from the same weights
absorbed_reference  Absorbed attention for the comparison of logits, in the decoder layers of transformers: prefill
                    only, no cache
"""
