"""The proof of a merged checkpoint: it recomputes every number with arithmetic of its own.

verify         The proof of one output, numbers, absorbed tensors and logits: for `merge-absorb`, and for `verify` on
               any folder
result         What a proof leaves behind: the result of `verify`, and the part of it that travels between two
               processes
weights        The proof: a merged checkpoint, made by any tool, against its base and its adapters, number by number
layout         What a merged checkpoint must consist of, from headers and config.json: keys, shapes, dtypes, and where
               each tensor's numbers come from
tensors        The proof of one tensor: every number of it, computed again
decoders       The proof's own decoders of quantized weights, one for each format, by the format's name
dequantize     What the tensors of a checkpoint stand for, and the factors of adapters, in torch: what the proof
               computes with
read           Bytes of tensors into torch, some rows at a time: the proof's own reader
absorbed       The proof of absorbed tensors: split bit for bit from, or the product of, the matrices that lie in the
               checkpoint
prover         Where the proof of a merge runs: in this process, or in one of its own beside the merge
prover_worker  The process that proves a merge (see `prover`): `python -m mla_tune.verification.prover_worker`
"""
