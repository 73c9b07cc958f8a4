"""Runs of several processes, one for each GPU.

launch     start processes, and read which one this is
team       what the processes do together: decide, wait, gather weights; FSDP2
sampler    the order of rows, the same global batches as one process has
deepspeed  where DeepSpeed ZeRO-3 differs from torch
"""
