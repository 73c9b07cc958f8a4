"""Checkpoint folders: headers, reading rows, quantized formats, writing shards.  Everything is numpy, without torch.

index         Read the safetensors headers of a checkpoint folder: which tensor lies where
dtypes        Convert stored codes to floats and back, for dtypes that numpy lacks too
tensor_io     Read rows of a tensor out of a safetensors file into numpy
quantized/    Formats of quantized weights, behind one interface
writer        Write one safetensors file, tensor by tensor in any order
atomic_files  Write files that appear complete or not at all
absorbed      The files with absorbed tensors beside a checkpoint: names, contents, what they were made from
manifest      Read the manifest of a merged checkpoint
pickles       Shell commands that convert pickle files to safetensors: pickles are never opened here
"""
