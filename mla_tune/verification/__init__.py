"""The proof of a merged checkpoint: it recomputes every number with arithmetic of its own.

verify         `verify`: prove the weights, absorbed tensors and logits of a merged checkpoint
result         What a proof returns: the result of `verify`, and the documents that the proving process sends to the
               merge
weights        The proof of all weights: compare a merged checkpoint, tensor by tensor, with its base and adapters
layout         What a merged checkpoint must consist of, from headers and config.json: keys, shapes, dtypes, and the
               source of each tensor's numbers
tensors        The proof of one tensor: recompute every number of it and compare it with the number that was written
exact_sum      The exact sum of one tensor, W + Σ w·s·B·A or a DoRA's rows, recomputed in torch, and the error of float
               sums
rounding       Rounding to the dtype, or to the codes, of one output tensor, and the projection of its numbers onto the
               change
decoders       The proof's own decoders of quantized weights, one class for each format
dequantize     The numbers of a checkpoint, quantized weights included, and the LoRA factors of adapters, as torch
               tensors
read           The proof's own reader: bytes of safetensors files as torch tensors, some rows at a time
absorbed       The proof of absorbed tensors: each must be the split, or the product, of the matrices in the merged
               checkpoint
prover         Where the proof of a merge runs: in this process, or in a second process while this one merges
prover_worker  The second process that proves a merge: `python -m mla_tune.verification.prover_worker`, started by
               `prover`
"""
