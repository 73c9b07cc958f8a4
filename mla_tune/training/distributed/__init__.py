"""Runs with several processes, one for each GPU.

launch     Start the processes of a run, and find out which of them this one is
team       Let the processes of a run act together: share results, wait, shard and gather weights
sampler    Order rows so that several processes have the same global batches as one
deepspeed  Handle what differs under DeepSpeed ZeRO-3, where parameters are handles without numbers
"""
