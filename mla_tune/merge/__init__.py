"""Merging: adapters + base → a checkpoint in the base's own key names, a few rows in memory at a time.

run           `merge_absorb`: all steps in order, and what happens when one fails
plan          headers → every file and tensor of the output, or an error
output        what a plan consists of: files, tensors, and where the numbers of each come from
changes       what the adapters do to the base, key by key; what can't be merged is refused here
execute       the shards of a plan, written by several threads
apply         rows of one tensor: weight plus delta, rounded once
retention     how much of the delta survives the rounding
absorb_plan   which absorbed tensors there will be
absorb        the absorbed tensors, computed from what was written
export        index, config.json, the base's other files and the manifest
staging       the folder that a merge is built in: locked, resumable, renamed at the end
report        what a merge will do and what it did, as dataclasses
notes         the sentences about a merge that a user has to know
"""
