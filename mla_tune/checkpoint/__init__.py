"""Checkpoint folders as files: read by header, decoded in numpy, written whole or not at all.  No torch.

index          the tensors of a folder from its safetensors headers: which tensor lies where
dtypes         stored codes ↔ float arrays, for the dtypes that numpy lacks too
tensor_io      rows of one tensor into numpy
quantized/     weights in fewer bits: the socket for formats, and the formats
writer         one safetensors file, written tensor by tensor in any order
atomic_files   JSON and copied files that appear whole or not at all
absorbed       the absorbed tensors beside a checkpoint: file names and origin
manifest       the manifest of a merged checkpoint
pickles        pickle files, which are never opened
"""
